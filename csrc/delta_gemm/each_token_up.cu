#include "common/cuda_launch.cuh"
#include "delta_gemm/each_token_up_codes.cuh"
#include "delta_gemm/elements.cuh"

// y += U z; see each_token.cuh. A tile: 1, 2 or 4 adjacent blocks of U's lanes, so 32 to 128
// outputs, all components; a thread block has some of a token's that follow each other. U's codes
// become an operand of the byte product (each_token_up_codes.cuh), those of the first tile while
// `down` still runs. Then come z's digits, in columns 0 1 2, and each warp has 16 outputs and every
// so many-th pair of groups. Wider tiles: each_token_wide_up.cu.
namespace adamix {
namespace {

constexpr int kMaxShift = kWideShift - 1;
constexpr int kWarpBlocks = 32 / kGroupQuads;  // that a warp turns at a time
constexpr int kSumDigits = 4;                  // of an output in shared memory: one is padding

struct UpPlan {
  int shift;   // a tile has 1 << shift blocks
  int stages;  // of a chunk: what is in shared memory at a time
  int z_row;
  int plane_words;  // of a digit of z: planes begin in different banks
  int first_tile[kMaxLayers + 1];
};

struct alignas(16) UpShared {
  SharedRows<kEachThreads> rows;
  int32_t sums[kBlockRows << kMaxShift][kTileRows][kSumDigits];
  uint32_t largest[32];      // of each warp's values
  int64_t tops[kEachWarps];  // sums of each warp's numbers times the largest code of their width
};

// kOneTile: a thread block has one tile.
template <typename T, int kShift, bool kOneTile>
class EachTokenUp {
  // Of a tile, and what else follows from it.
  static constexpr int kBlocks = 1 << kShift, kOutputs = kBlockCodes * kBlocks;
  static constexpr int kRows = kBlockRows * kBlocks;          // of 16 outputs
  static constexpr int kSplits = kEachWarps / kRows;          // warps that share them
  static constexpr int kStageGroups = kWarpBlocks / kBlocks;  // of a stage
  static constexpr int kGroupWords = kBlockWords * kBlocks;
  static constexpr int kUnroll = kSplits > 2 ? 1 : 2;  // steps of a warp, which has some or many

 public:
  __device__ EachTokenUp(const DeltaGemmCudaArgs& args, const UpPlan& plan, UpShared& shared)
      : args_(args), plan_(plan), shared_(shared) {
    planes_ = reinterpret_cast<uint32_t*>(&shared + 1);
    codes_ = planes_ + kDigits * plan.plane_words;
  }

  __device__ void run() {
    bool waited = false;
    if constexpr (kOneTile) {
      const int tile = static_cast<int>(blockIdx.x);
      for (layer_ = 0; tile >= plan_.first_tile[layer_ + 1];) ++layer_;
      const int first = tile - plan_.first_tile[layer_];
      waited = run_layer(first, first + 1);
    } else {
      waited = run_part();
    }
    // Not without waiting: else the kernel after could overtake `down`.
    if (!waited) wait_for_previous_kernel();
  }

 private:
  __device__ __forceinline__ static int token() { return static_cast<int>(blockIdx.y); }

  // Tiles may be of several layers. Whether any has waited for `down`.
  __device__ __forceinline__ bool run_part() {
    const int tiles = plan_.first_tile[args_.layer_count], part = static_cast<int>(blockIdx.x);
    int rest;
    const int begin = divide(tiles * part, static_cast<int>(gridDim.x), rest);
    const int end = divide(tiles * part + tiles, static_cast<int>(gridDim.x), rest);
    bool begun = false, waited = false;
#pragma unroll 1
    for (layer_ = 0; layer_ < args_.layer_count; ++layer_) {
      const int first = max(begin - plan_.first_tile[layer_], 0);
      const int last = min(end, plan_.first_tile[layer_ + 1]) - plan_.first_tile[layer_];
      if (first >= last) continue;
      if (begun) __syncthreads();  // the layer before is done
      begun = true;
      waited |= run_layer(first, last);
    }
    return waited;
  }

  // Whether it has waited for `down`.
  __device__ __forceinline__ bool run_layer(int first, int last) {
    RowOfToken<> row_of_token;
    row_of_token.fetch(args_, layer_, token());
    zero_sums();
    row_of_token.store(shared_.rows);
    __syncthreads();
    const int row = RowOfToken<>::find(args_, shared_.rows);
    if (row < 0) return false;
    row_ = shared_.rows.words + row;
    const Widths widths(row_, u_columns(), args_.max_rank, [](uint32_t count) {
      return (groups_of(count) + kStageGroups - 1) / kStageGroups;
    });
    if (widths.empty()) return false;
    out_ = static_cast<int>(args_.layers[layer_].out);
    blocks_ = static_cast<int>((static_cast<uint32_t>(out_) + kBlockCodes - 1) / kBlockCodes);
    // Not where every warp soon has all that it reads.
    const bool soon = (kOneTile || last - first == 1) && widths.units() <= kEachWarps;
    prefetched_ = first * kBlocks / kPanelBlocks + soon;
    end_panel_ = (last * kBlocks + kPanelBlocks - 1) / kPanelBlocks;
#pragma unroll 1
    for (int tile = first; tile < (kOneTile ? first + 1 : last); ++tile) {
      first_block_ = tile * kBlocks;
      run_tile(widths, kOneTile || tile == first);
    }
    return true;
  }

  __device__ __forceinline__ void run_tile(const Widths& widths, bool first_tile) {
    prefetch_panels(widths);
    if (!first_tile) load_y();
    int first_group = 0;
#pragma unroll 1
    for (int stage = 0; stage < widths.units(); stage += plan_.stages) {
      const int last = min(widths.units(), stage + plan_.stages);
      const int end_group =
          last < widths.units() ? group_of_stage(widths.find(last)) : widths.groups();
      if (stage > 0) __syncthreads();  // the codes before are multiplied
      unpack(widths, stage, last, first_group);
      const Operands part = operands(first_group);  // before the wait
      if (first_tile && stage == 0) prepare_z(widths);
      __syncthreads();
      multiply(part, end_group - first_group);
      first_group = end_group;
    }
    if (first_tile) put_warp_sum(tops_, shared_.tops, false);
    __syncthreads();
    if (first_tile) tops_ = sum_of_warps(shared_.tops);
    add_to_y();
  }

  // --- codes

  __device__ __forceinline__ int group_of_stage(const Place& stage) const {
    return stage.groups + stage.unit * kStageGroups;
  }

  // So that words come from L2: the panel of the tile and the one behind it.
  __device__ __forceinline__ void prefetch_panels(const Widths& widths) {
    constexpr int kLine = 32;
    const int panel = static_cast<uint32_t>(first_block_) / kPanelBlocks;
#pragma unroll 1
    for (; prefetched_ < min(panel + 2, end_panel_); ++prefetched_) {
      const int first = prefetched_ * kPanelBlocks;
      const int count = min(blocks_ - first, kPanelBlocks) * widths.column_words();
      const uint32_t* words = args_.arena + row_[kTableUOffset] + first * widths.column_words();
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) * kLine; i < count; i += kEachThreads * kLine) {
        prefetch(words + i);
      }
    }
  }

  // A stage: a thread a quad and block, blocks side by side, quads of up to 8 groups behind.
  __device__ __forceinline__ void unpack(const Widths& widths, int first, int last,
                                         int first_group) {
    const int lane = threadIdx.x % 32, quad = lane / kBlocks, j = quad % kGroupQuads;
    const int panel = static_cast<uint32_t>(first_block_) / kPanelBlocks;
    const int blocks = min(blocks_ - panel * kPanelBlocks, kPanelBlocks);
    const int block = lane % kBlocks, of_panel = first_block_ - panel * kPanelBlocks + block;
    const uint32_t* start =
        args_.arena + row_[kTableUOffset] + panel * kPanelBlocks * widths.column_words();
#pragma unroll 1
    for (int unit = first + static_cast<int>(threadIdx.x / 32); unit < last; unit += kEachWarps) {
      const Place stage = widths.find(unit);
      const int group = stage.unit * kStageGroups + quad / kGroupQuads;  // of the width
      const int component = group * kGroupLanes + j;
      const int left = stage.count - component;
      const uint32_t* width = start + blocks * stage.words;
      if (left + j <= 0) continue;  // behind the width's last group
      int at[kQuadLanes];  // the width's first block in place of what is not there: times zeros
#pragma unroll
      for (int i = 0; i < kQuadLanes; ++i) {
        const bool there = i * kGroupQuads < left && of_panel < blocks;
        at[i] = there ? blocks * (component + i * kGroupQuads) + of_panel : 0;
      }
      uint32_t* target =
          codes_ + ((stage.groups + group - first_group) * kBlocks + block) * kBlockWords + j * 2;
      for_width(stage.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        uint32_t words[kQuadLanes][kMaxBits];
        load_blocks<kBits>(width, at, words);
        unpack_quad<kBits>(words, target);
      });
    }
  }

  // --- z

  // z's digits. A barrier must follow.
  __device__ __forceinline__ void prepare_z(const Widths& widths) {
    wait_for_previous_kernel();
    const auto* z = reinterpret_cast<const float4*>(z_of(args_, layer_, token(), plan_.z_row));
    unit_ = store_z<kEachThreads>(z, widths, shared_.largest, planes_, plan_.plane_words, tops_,
                                  [&] { load_y(); });
  }

  // --- product

  // Where a warp's part of a chunk begins.
  struct Operands {
    const uint32_t *codes, *z;
  };

  __device__ __forceinline__ Operands operands(int first_group) const {
    const int lane = threadIdx.x % 32, begin = threadIdx.x / 32 / kRows * 2;
    return {codes_ + begin * kGroupWords + tile_row() / kBlockRows * kBlockWords +
                tile_row() % kBlockRows * kRowWords + lane * 2,
            planes_ + min(lane / 4, kDigits - 1) * plan_.plane_words +
                (first_group + begin) * kGroupQuads + lane % 4};
  }

  // A warp's 16 outputs times its pairs of groups.
  __device__ __forceinline__ void multiply(const Operands& operands, int groups) {
    auto [codes, z] = operands;
    const int begin = threadIdx.x / 32 / kRows * 2;
    int32_t sum[4] = {};
#pragma unroll kUnroll
    for (int left = groups - begin; left > 0; left -= kSplits * 2) {
      const uint2 a = *reinterpret_cast<const uint2*>(codes);
      uint2 b = make_uint2(0, 0);
      uint32_t next = 0;
      if (left > 1) {
        b = *reinterpret_cast<const uint2*>(codes + kGroupWords);
        next = z[kGroupQuads];
      }
      mma_u8s8(sum, a.x, a.y, b.x, b.y, z[0], next);
      codes += kSplits * 2 * kGroupWords;
      z += kSplits * 2 * kGroupQuads;
    }
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (t >= kSumDigits / 2) return;
    int32_t* where = &shared_.sums[tile_row()][g][t * 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) atomicAdd(where + i / 2 * 8 * kSumDigits + i % 2, sum[i]);
  }
  static_assert(int64_t{255} * 128 * kEachRank < int64_t{1} << 31);

  // Which 16 outputs of the tile are the warp's.
  __device__ __forceinline__ static int tile_row() { return threadIdx.x / 32 % kRows; }

  __device__ __forceinline__ void zero_sums() {
    if (threadIdx.x < kOutputs) {
      reinterpret_cast<uint4*>(shared_.sums)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    }
  }

  // --- y, one output a thread

  __device__ __forceinline__ T* y() const {
    const DeltaLayer& layer = args_.layers[layer_];
    return static_cast<T*>(layer.y) + token() * layer.y_row_stride + first_block_ * kBlockCodes;
  }

  __device__ __forceinline__ bool has_output() const {
    const int left = out_ - first_block_ * kBlockCodes, i = threadIdx.x;
    return i < kOutputs && i < left;
  }

  __device__ __forceinline__ void load_y() {
    if (has_output()) y_ = y()[threadIdx.x];
  }

  // The sums are zeros then, as the next tile wants them.
  __device__ __forceinline__ void add_to_y() {
    if (!has_output()) return;
    const uint32_t i = threadIdx.x;
    auto* sums =
        reinterpret_cast<uint4*>(shared_.sums[i / kTileRows][i % kTileRows / 2 + i % 2 * 8]);
    const uint4 sum = *sums;
    *sums = make_uint4(0, 0, 0, 0);
    const int64_t levels = 2 * join_digits(sum.x, sum.y, sum.z) - tops_;
    y()[i] = narrow<T>(widen(y_) + static_cast<float>(levels) * unit_);
  }

  const DeltaGemmCudaArgs& args_;
  const UpPlan& plan_;
  UpShared& shared_;
  uint32_t* planes_;  // [digit][plane_words]
  uint32_t* codes_;   // as drawn above
  int layer_, out_, blocks_, first_block_;
  int prefetched_, end_panel_;  // of the layer's tiles
  const int64_t* row_ = nullptr;
  float unit_ = 0.0f;
  int64_t tops_ = 0;  // sum of all numbers times the largest code of their width
  T y_;               // before
};

template <typename T, int kShift, bool kOneTile>
__global__ void __launch_bounds__(kEachThreads, kEachPerMultiprocessor)
    each_token_up_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                         const __grid_constant__ UpPlan plan) {
  auto& shared = *static_cast<UpShared*>(dynamic_shared());
  let_next_kernel_start();
  EachTokenUp<T, kShift, kOneTile>(args, plan, shared).run();
}

template <int kShift, bool kOneTile>
auto kernel_of(Element element) {
  return element == Element::kFloat  ? each_token_up_kernel<float, kShift, kOneTile>
         : element == Element::kHalf ? each_token_up_kernel<__half, kShift, kOneTile>
                                     : each_token_up_kernel<__nv_bfloat16, kShift, kOneTile>;
}

template <bool kOneTile>
auto kernel_of(Element element, int shift) {
  static_assert(kMaxShift == 2);
  return shift == 0   ? kernel_of<0, kOneTile>(element)
         : shift == 1 ? kernel_of<1, kOneTile>(element)
                      : kernel_of<2, kOneTile>(element);
}

}  // namespace

cudaError_t launch_each_token_up(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  UpPlan plan = {};
  plan.shift = tile_shift_of(args, device);
  if (plan.shift == kWideShift) return launch_each_token_wide_up(args, device, stream);
  const int most = parts_of_token(args, device);
  const int tiles = count_tiles(args, plan.shift, plan.first_tile);
  plan.z_row = each_token_z_row(args);
  const int groups = plan.z_row / kGroupLanes;
  plan.plane_words = plane_words_of(plan.z_row);
  const int fixed = static_cast<int>(sizeof(UpShared)) + kDigits * plan.plane_words * 4;
  const int group_bytes = kBlockWords * 4 << plan.shift;
  const int of_stage = kWarpBlocks >> plan.shift;
  const int share =
      (device.shared_bytes + kReservedBytes) / kEachPerMultiprocessor - kReservedBytes;
  const int room = (share - fixed) / (group_bytes * of_stage);
  plan.stages = room * of_stage >= groups ? groups + kMaxBits : room;
  const int bytes = fixed + std::min(room * of_stage, groups) * group_bytes;
  const Grid grid = {
      dim3(static_cast<unsigned>(std::min(most, tiles)), static_cast<unsigned>(args.tokens)),
      kEachThreads, static_cast<size_t>(bytes)};
  const auto kernel = tiles <= most ? kernel_of<true>(args.element, plan.shift)
                                    : kernel_of<false>(args.element, plan.shift);
  return launch_overlapped(kernel, grid, device, stream, args, plan);
}

}  // namespace adamix
