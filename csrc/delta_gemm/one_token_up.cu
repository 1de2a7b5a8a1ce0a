#include "common/cuda_launch.cuh"
#include "delta_gemm/elements.cuh"
#include "delta_gemm/few_tokens_up_product.cuh"
#include "delta_gemm/one_token.cuh"

// y += U z for one token; see one_token.cuh. A tile: 1, 2, 4 or 8 adjacent blocks of U's lanes, so
// 32 to 256 outputs, all components. U's codes become an operand of the byte product while `down`
// still runs: a thread turns its four components' words, so that a word holds one output of all
// four, takes the codes out and puts them to shared memory,
//
//   group of 16 components | block | 16 outputs | thread 4g + t of the product: 2 words
//
// the words of quad t for rows g and g + 8: outputs 2g and 2g + 1 of the 16. Then come z's digits,
// in columns 0 1 2, and each warp has 16 outputs and every so many-th pair of groups.
namespace adamix {
namespace {

constexpr int kTileRows = 16;                            // outputs of a byte product
constexpr int kBlockRows = kBlockCodes / kTileRows;      // of those in a block
constexpr int kRowWords = 64;                            // of 16 outputs and components
constexpr int kBlockWords = kBlockRows * kRowWords + 8;  // 8: blocks begin in different banks
constexpr int kMaxShift = 3;                             // a tile is in one panel
constexpr int kSumDigits = 4;  // of an output in shared memory: one is padding
constexpr int kMaxGroups = groups_of(kOneRank) + kMaxBits;

struct UpPlan {
  int shift;        // a tile has 1 << shift blocks
  int stages;       // of a chunk: what is in shared memory at a time
  int plane_words;  // of a digit of z: planes begin in different banks
  int first_tile[kMaxLayers];
};

struct alignas(16) UpShared {
  SharedRows rows;
  int32_t sums[kBlockRows << kMaxShift][kTileRows][kSumDigits];
  uint32_t largest[32];                            // of each warp's values
  int64_t level_offset[32];                        // sum of (2^b - 1) · z of each warp's numbers
  uint8_t top_codes[(kMaxGroups + 15) / 16 * 16];  // the largest code of a group's width
};

// Four components' blocks of 32 outputs, one output a word, four components in its bytes as in a
// field.
template <int kBits>
__device__ __forceinline__ void unpack_quad(const uint32_t (&words)[kQuadLanes][kMaxBits],
                                            uint32_t* target) {
  uint32_t byte[kFieldCodes][kBits];  // of all outputs that are in it
#pragma unroll
  for (int j = 0; j < kBits; ++j) {
    const uint32_t four[4] = {words[0][j], words[2][j], words[1][j], words[3][j]};
    uint32_t turned[4];
    transpose(four, turned);
#pragma unroll
    for (int i = 0; i < 4; ++i) byte[i][j] = turned[i];
  }
#pragma unroll
  for (int pair = 0; pair < kBlockCodes / 2; ++pair) {
    const int field = pair / 2, first = pair % 2;  // code 2 * first is in byte first, the next
                                                   // in the byte after the next
    const int row = pair / (kTileRows / 2), g = pair % (kTileRows / 2);
    *reinterpret_cast<uint2*>(target + row * kRowWords + g * 8) = make_uint2(
        read_field<kBits>(byte[first], field), read_field<kBits>(byte[first + 2], field));
  }
}

template <typename T>
class OneTokenUp {
 public:
  __device__ OneTokenUp(const DeltaGemmCudaArgs& args, const UpPlan& plan, UpShared& shared)
      : args_(args), plan_(plan), shared_(shared) {
    planes_ = reinterpret_cast<uint32_t*>(&shared + 1);
    codes_ = planes_ + kDigits * plan.plane_words;
    layer_ = 0;
    const int block = static_cast<int>(blockIdx.x);
    while (layer_ + 1 < args.layer_count && block >= plan.first_tile[layer_ + 1]) ++layer_;
    out_ = static_cast<int>(args.layers[layer_].out);
    first_block_ = (block - plan.first_tile[layer_]) << plan.shift;
  }

  __device__ void run() {
    RowOfToken row_of_token;
    row_of_token.fetch(args_, layer_, shared_.rows);
    zero_sums();
    row_of_token.store(shared_.rows);
    __syncthreads();
    row_ = row_of_token.row(args_, shared_.rows);
    if (row_ == nullptr) return wait_for_previous_kernel();
    const int shift = plan_.shift;
    const Widths widths(row_, args_.max_rank, [shift](int count) {
      return (groups_of(count) + (1 << (kMaxShift - shift)) - 1) >> (kMaxShift - shift);
    });
    // Not without waiting: else the kernel after could overtake `down`.
    if (widths.empty()) return wait_for_previous_kernel();
    run_tile(widths);
  }

 private:
  __device__ __forceinline__ void run_tile(const Widths& widths) {
    set_top_codes(widths);
    int32_t sum[4] = {};
    int64_t offset = 0;
    int first_group = 0;
#pragma unroll 1
    for (int stage = 0; stage < widths.units(); stage += plan_.stages) {
      const int last = min(widths.units(), stage + plan_.stages);
      const int end_group =
          last < widths.units() ? group_of_stage(widths.find(last)) : widths.groups();
      if (stage > 0) __syncthreads();  // the codes before are multiplied
      unpack(widths, stage, last, first_group);
      if (stage == 0) offset = prepare_z(widths.groups());
      __syncthreads();
      multiply(first_group, end_group - first_group, sum);
      first_group = end_group;
    }
    put_warp_sum(offset, shared_.level_offset, false);
    add_sums(sum);
    __syncthreads();
    add_to_y();
  }

  // --- codes

  __device__ __forceinline__ int group_of_stage(const Place& stage) const {
    return stage.groups + (stage.unit << (kMaxShift - plan_.shift));
  }

  __device__ __forceinline__ void set_top_codes(const Widths& widths) {
#pragma unroll 1
    for (int first = 0; first < widths.groups(); first += kOneThreads) {
      const int group = first + static_cast<int>(threadIdx.x);
      int bits = kMaxBits;
#pragma unroll
      for (int i = 0; i < kMaxBits - 1; ++i) bits -= widths.end_of_width(i) <= group;
      if (group < widths.groups()) {
        shared_.top_codes[group] = static_cast<uint8_t>((1 << bits) - 1);
      }
    }
  }

  // A stage: a thread a quad and block, blocks side by side, quads of up to 8 groups behind.
  __device__ __forceinline__ void unpack(const Widths& widths, int first, int last,
                                         int first_group) {
    const int shift = plan_.shift, lane = threadIdx.x % 32;
    const int panel = first_block_ / kPanelBlocks, blocks = panel_blocks(out_, panel);
    const int block = lane & ((1 << shift) - 1), of_panel = first_block_ % kPanelBlocks + block;
    const int quad = lane >> shift, j = quad % kGroupQuads;
    const uint32_t* start =
        args_.arena + row_[kTableUOffset] + panel * kPanelBlocks * widths.column_words();
#pragma unroll 1
    for (int unit = first + static_cast<int>(threadIdx.x / 32); unit < last; unit += kOneWarps) {
      const Place stage = widths.find(unit);
      const int group = (stage.unit << (kMaxShift - shift)) + quad / kGroupQuads;  // of the width
      const int component = group * kGroupLanes + j, bits = stage.bits;
      const int left = stage.count - component;
      const uint32_t* width = start + blocks * stage.words;
      uint32_t words[kQuadLanes][kMaxBits] = {};
      load_blocks(width + (blocks * component + of_panel) * bits, kGroupQuads * blocks * bits,
                  of_panel < blocks ? (left + kGroupQuads - 1) / kGroupQuads : 0, bits,
                  is_aligned(width), words);
      if (left + j <= 0) continue;  // behind the width's last group
      uint32_t* target =
          codes_ + (((stage.groups + group - first_group) << shift) + block) * kBlockWords + j * 2;
      for_width(bits, [&](auto width) { unpack_quad<decltype(width)::value>(words, target); });
    }
  }

  // --- z

  // z's digits, and the sum of (2^b - 1) · z of the thread's numbers. A barrier must follow.
  __device__ __forceinline__ int64_t prepare_z(int groups) {
    wait_for_previous_kernel();
    const auto* z = reinterpret_cast<const float4*>(one_token_z(args_, layer_));
    const int quads = groups * kGroupQuads;
    float4 first = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    uint32_t largest = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < quads; i += kOneThreads) {
      const float4 four = z[i];
      if (i < kOneThreads) first = four;
      largest = max(max(largest, magnitude_bits(four.x)), magnitude_bits(four.y));
      largest = max(max(largest, magnitude_bits(four.z)), magnitude_bits(four.w));
    }
    const int row = first_block_ * kBlockCodes + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < outputs()) y_ = widen(y()[row]);
    put_warp_max(largest, shared_.largest);
    __syncthreads();
    const Unit unit = unit_for(max_of_warps(shared_.largest));
    unit_ = unit.unit;
    int64_t offset = 0;
    float4 four = first;
#pragma unroll 1
    for (int i = threadIdx.x; i < quads;) {
      const float values[kQuadLanes] = {four.x, four.y, four.z, four.w};
      uint32_t digit[kDigits];
      digits_of_field(values, unit, digit);
      int sums[kDigits];
#pragma unroll
      for (int d = 0; d < kDigits; ++d) {
        planes_[d * plan_.plane_words + i] = digit[d];
        sums[d] = sum_bytes(digit[d], 0);
      }
      offset += join_digits(sums[0], sums[1], sums[2]) * shared_.top_codes[i / kGroupQuads];
      i += kOneThreads;
      if (i < quads) four = z[i];
    }
    return offset;
  }

  // --- product

  // A warp's 16 outputs times its pairs of groups.
  __device__ __forceinline__ void multiply(int first_group, int groups, int32_t (&sum)[4]) const {
    const int shift = plan_.shift, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int splits = kOneWarps / kBlockRows >> shift;
    const int group_words = kBlockWords << shift;
    const uint32_t* digits = planes_ + min(lane / 4, kDigits - 1) * plan_.plane_words +
                             first_group * kGroupQuads + lane % 4;
    const uint32_t* codes = codes_ + tile_row() / kBlockRows * kBlockWords +
                            tile_row() % kBlockRows * kRowWords + lane * 2;
#pragma unroll 2
    for (int group = (warp >> shift) / kBlockRows * 2; group < groups; group += splits * 2) {
      const uint32_t* upper = codes + group * group_words;
      const bool two = group + 1 < groups;
      const uint2 a = *reinterpret_cast<const uint2*>(upper);
      uint2 b = make_uint2(0, 0);
      uint32_t z = 0;
      if (two) {
        b = *reinterpret_cast<const uint2*>(upper + group_words);
        z = digits[(group + 1) * kGroupQuads];
      }
      mma_u8s8(sum, a.x, a.y, b.x, b.y, digits[group * kGroupQuads], z);
    }
  }

  // Which 16 outputs of the tile are the warp's.
  __device__ __forceinline__ int tile_row() const {
    return threadIdx.x / 32 & ((kBlockRows << plan_.shift) - 1);
  }

  __device__ __forceinline__ void zero_sums() {
    const int rows = kTileRows * kBlockRows << plan_.shift;
    if (static_cast<int>(threadIdx.x) < rows) {
      reinterpret_cast<uint4*>(shared_.sums)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void add_sums(const int32_t (&sum)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (t >= kSumDigits / 2) return;
    int32_t* where = &shared_.sums[tile_row()][g][t * 2];
    atomicAdd(where, sum[0]);
    atomicAdd(where + 1, sum[1]);
    atomicAdd(where + 8 * kSumDigits, sum[2]);
    atomicAdd(where + 8 * kSumDigits + 1, sum[3]);
  }

  // --- y, one output a thread

  __device__ __forceinline__ T* y() const { return static_cast<T*>(args_.layers[layer_].y); }

  __device__ __forceinline__ int outputs() const {
    return min(out_ - first_block_ * kBlockCodes, kBlockCodes << plan_.shift);
  }

  __device__ __forceinline__ void add_to_y() {
    const int i = threadIdx.x;
    if (i / 32 >= kBlockCodes << plan_.shift >> 5) return;
    const int64_t offset = sum_of_warps(shared_.level_offset);
    if (i >= outputs()) return;
    const int32_t* sums = shared_.sums[i / kTileRows][i % kTileRows / 2 + i % 2 * 8];
    const int64_t sum = join_digits(sums[0], sums[1], sums[2]);
    const float delta = static_cast<float>(2 * sum - offset) * unit_;
    y()[first_block_ * kBlockCodes + i] = narrow<T>(y_ + delta);
  }

  const DeltaGemmCudaArgs& args_;
  const UpPlan& plan_;
  UpShared& shared_;
  uint32_t* planes_;  // [digit][plane_words]
  uint32_t* codes_;   // as drawn above
  int layer_, out_, first_block_;
  const int64_t* row_ = nullptr;
  float unit_ = 0.0f, y_ = 0.0f;
};

template <typename T>
__global__ void __launch_bounds__(kOneThreads, 2)
    one_token_up_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                        const __grid_constant__ UpPlan plan) {
  auto& shared = *static_cast<UpShared*>(dynamic_shared());
  let_next_kernel_start();
  OneTokenUp<T>(args, plan, shared).run();
}

auto kernel_of(Element element) {
  return element == Element::kFloat  ? one_token_up_kernel<float>
         : element == Element::kHalf ? one_token_up_kernel<__half>
                                     : one_token_up_kernel<__nv_bfloat16>;
}

// Tiles of 1 << shift blocks, those of all layers one after the other.
int count_tiles(const DeltaGemmCudaArgs& args, int shift, int* first) {
  int tiles = 0;
  for (int i = 0; i < args.layer_count; ++i) {
    first[i] = tiles;
    const int64_t each = int64_t{kBlockCodes} << shift;
    tiles += static_cast<int>((args.layers[i].out + each - 1) / each);
  }
  return tiles;
}

}  // namespace

cudaError_t launch_one_token_up(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  // As small as two thread blocks a multiprocessor allow.
  UpPlan plan = {};
  int tiles = count_tiles(args, plan.shift, plan.first_tile);
  while (tiles > 2 * device.multiprocessors && plan.shift < kMaxShift) {
    tiles = count_tiles(args, ++plan.shift, plan.first_tile);
  }
  const int groups = (static_cast<int>(args.max_rank) + kMaxPadding) / kGroupLanes;
  plan.plane_words = (groups * kGroupQuads + 31) / 32 * 32 + 8;
  const int fixed = static_cast<int>(sizeof(UpShared)) + kDigits * plan.plane_words * 4;
  const int group_bytes = kBlockWords * 4 << plan.shift;
  const int of_stage = 1 << (kMaxShift - plan.shift);
  const int room = (device.shared_bytes / 2 - fixed) / (group_bytes * of_stage);
  plan.stages = room * of_stage >= groups ? groups + kMaxBits : room;
  const int bytes = fixed + std::min(room * of_stage, groups) * group_bytes;
  const Grid grid = {dim3(static_cast<unsigned>(tiles)), kOneThreads, static_cast<size_t>(bytes)};
  return launch_overlapped(kernel_of(args.element), grid, device, stream, args, plan);
}

}  // namespace adamix
