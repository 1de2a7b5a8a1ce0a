#include <algorithm>

#include "common/cuda_launch.cuh"
#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_down_product.cuh"
#include "delta_gemm/word_stream.cuh"

// z = scale · V x. A tile: 16 components of a group, all panels of V; see few_tokens.cuh.
namespace adamix {
namespace {

constexpr int kDownTiles = 32;  // of a batch: 12 KiB of sums
constexpr int kMaxDownWarps = 16;

constexpr int kDownRingWords = DownShape::kDepth * DownShape::kStageWords;  // a warp

struct DownPlan {
  int x_bytes;  // for the digits of x, as many panels at a time as there is room for
};

__host__ __device__ constexpr int x_plane_bytes(int panels) {
  return panels * kPanelCodes + 16;  // 16: planes begin in different banks
}

struct alignas(16) DownShared {
  SharedRoutes routes;
  int32_t sums[kDownTiles][kColumns][kDownLanes];
  DownShape::Run tiles[kDownTiles];  // of the batch
  float scales[kDownTiles][kDownLanes];
  int64_t sum_x[kGroupTokens][32];  // of each warp's numbers
  uint32_t largest[2 * 32];
};

// A warp's way through its part of (tiles of a batch) x (panels of a chunk), in stages.
struct DownWalk {
  StageSource<DownShape> stage;
  int first_panel, last_panel;
  int left;  // stages

  __device__ bool done() const { return left == 0; }

  __device__ void next(const RunTable<DownShape::Run>& table, const Factor& factor) {
    if (--left == 0) return;
    const int bits = stage.run.bits, blocks = DownShape::blocks_of(bits);
    stage.source += blocks * bits;
    stage.first_block += blocks;
    if (stage.first_block < kPanelBlocks) return;
    stage.first_block = 0;
    ++stage.panel;
    if (stage.panel < last_panel && factor.blocks(stage.panel) == kPanelBlocks) {
      stage.source += factor.panel_words - kPanelBlocks * bits;
      return;
    }
    if (stage.panel == last_panel) {
      stage.panel = first_panel;
      stage.run = table.behind(stage.run);
    }
    stage.place(factor);
  }
};

class Down {
 public:
  __device__ Down(const DeltaGemmCudaArgs& args, const DownPlan& plan, DownShared& shared)
      : args_(args), plan_(plan), shared_(shared), panels_(panel_count(args.in)) {
    x_planes_ = reinterpret_cast<int8_t*>(&shared + 1);
    auto* rings = reinterpret_cast<uint32_t*>(x_planes_ + plan.x_bytes);
    ring_ = rings + threadIdx.x / 32 * kDownRingWords;
    loaded_.id[0] = loaded_.id[1] = -1;
  }

  __device__ void run() {
    make_groups(args_, shared_.routes);
    const int panels = panels_;
    share_out(args_, shared_.routes, [panels](int, const Entry& entry) {
      return Work{int64_t{panels} * words_of_runs<DownShape::Run>(entry.counts),
                  runs_of_entry<DownShape::Run>(entry.counts)};
    });
    for_share(args_, shared_.routes,
              [this](int e, int begin, int end) { run_entry(e, begin, end); });
  }

 private:
  // The tiles that begin in [begin, end) of the entry.
  __device__ void run_entry(int e, int begin, int end) {
    const int group = e % shared_.routes.groups;
    layer_ = e / shared_.routes.groups;
    entry_ = &entry_at(args_, shared_.routes, e);
    table_.load(entry_->counts);
    factor_ = make_factor(args_.arena + entry_->v_offset, entry_->counts, args_.in);
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) tokens_.id[i] = shared_.routes.group_token[group][i];
    // Chunks of panels, all about as large; a group of one token has half the digits.
    const int planes = tokens_.id[1] < 0 ? kDigits : kColumns;
    const int room = (plan_.x_bytes / planes - 16) / kPanelCodes;
    const int chunks = (panels_ + room - 1) / room;
    chunk_panels_ = (panels_ + chunks - 1) / chunks;
    const int tile_words = kDownLanes * lane_width() * panels_;
    const Items tiles(table_.runs_between(0, table_.runs()),
                      shared_.routes.by_tile ? 1 : tile_words);
    const int first = tiles.before(begin), last = tiles.before(end);
    for (int tile = first; tile < last; tile += kDownTiles) {
      run_batch(tile, min(last, tile + kDownTiles));
    }
  }

  __device__ void run_batch(int first_tile, int last_tile) {
    __syncthreads();  // the sums of the batch before are read
    zero_words(shared_.sums, (last_tile - first_tile) * kColumns * kDownLanes);
    fetch_tiles(first_tile, last_tile);
    for (int panel = 0; panel < panels_; panel += chunk_panels_) {
      run_chunk(first_tile, last_tile, panel, min(panels_, panel + chunk_panels_));
    }
    store_z(first_tile, last_tile);
  }

  // Where the batch's tiles are, and their scales, which arrive together with the first words.
  __device__ void fetch_tiles(int first_tile, int last_tile) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int tile = threadIdx.x / 32; first_tile + tile < last_tile; tile += warps) {
      const DownShape::Run run = table_.at(first_tile + tile);
      if (lane == 0) shared_.tiles[tile] = run;
      if (lane < run.lanes()) {
        copy_async_4(shared_address(&shared_.scales[tile][lane]),
                     args_.arena + entry_->scale_offset + run.component + lane);
      }
    }
    commit_copies();
  }

  // Warps have shares of equal cost: they differ in tiles, panels and halves of panels.
  __device__ DownWalk walk_of_warp(int first_tile, int last_tile, int first_panel,
                                   int last_panel) const {
    const int width = last_panel - first_panel, bits = lane_width();
    const int parts = kPanelBlocks / DownShape::blocks_of(bits);
    const Items stages(table_.runs_between(first_tile, last_tile) * width * parts,
                       DownShape::blocks_of(bits) * bits);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, cost = stages.total_cost();
    const int first = stages.before(cost * warp / warps);
    const int last = stages.before(cost * (warp + 1) / warps);
    DownWalk walk = {{}, first_panel, last_panel, last - first};
    if (walk.left == 0) return walk;
    // Item `first`: a part of a panel of a tile of its width.
    const int lane = stages.lane_of(first), item = first - stages.first_of(lane);
    const int blocks = DownShape::blocks_of(kMaxBits - lane);
    const int panel = item * blocks / kPanelBlocks, tile = panel / width;
    walk.stage.first_block = item * blocks % kPanelBlocks;
    walk.stage.panel = first_panel + panel - tile * width;
    walk.stage.run = table_.at(max(first_tile, table_.first_run(lane)) + tile);
    walk.stage.place(factor_);
    return walk;
  }

  __device__ void run_chunk(int first_tile, int last_tile, int first_panel, int last_panel) {
    DownWalk use = walk_of_warp(first_tile, last_tile, first_panel, last_panel);
    // Under way while x is prepared.
    StageStream<DownShape, DownWalk> stream(use, ring_, table_, factor_);
    load_x(first_panel, last_panel);
    __syncthreads();

    const int8_t* x = x_planes_ + plane_of_thread(tokens_) * x_plane_bytes(chunk_panels_) -
                      first_panel * kPanelCodes;
    int32_t sums[kFieldPairs][4] = {};
    while (!use.done()) {
      const uint32_t* stage = stream.next(table_, factor_);
      const int8_t* digits =
          x + use.stage.panel * kPanelCodes + use.stage.first_block * kBlockCodes;
      for_width(use.stage.run.bits,
                [&](auto bits) { multiply_down<decltype(bits)::value>(stage, digits, sums); });
      const int tile = use.stage.run.index, bits = use.stage.run.bits;
      use.next(table_, factor_);
      if (use.done() || use.stage.run.index != tile) {
        flush(sums, bits, shared_.sums[tile - first_tile][0]);
      }
    }
    wait_copies<0>();  // of scales, where a warp has no stage
    __syncthreads();
  }

  __device__ void flush(int32_t (&sums)[kFieldPairs][4], int bits, int32_t* tile) const {
    int32_t sum[4] = {};
#pragma unroll
    for (int kind = 0; kind < kFieldPairs; ++kind) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += sums[kind][i] >> sum_shift(bits, kind);
        sums[kind][i] = 0;
      }
    }
    put_sums(sum, tile, kDownLanes, threadIdx.x % 32 / 4, 8, tokens_,
             [](int32_t* where, int32_t value) { atomicAdd(where, value); });
  }

  // The digits of the group's tokens, panels [first, last), in the byte order of fields; zeros
  // behind the last input. Kept while the group stays.
  __device__ void load_x(int first_panel, int last_panel) {
    const bool whole = last_panel - first_panel == panels_;
    if (whole && loaded_ == tokens_) return;
    if (!(loaded_ == tokens_)) measure_x();
    loaded_ = tokens_;
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      if (first_panel == 0) sum_x_[i] = 0;
      if (tokens_.id[i] < 0) continue;
      const int64_t row = tokens_.id[i] * args_.x_row_stride;
      const int plane_bytes = x_plane_bytes(chunk_panels_);
      int8_t* planes = x_planes_ + i * kDigits * plane_bytes;
      const int quads = (last_panel - first_panel) * kPanelCodes / kFieldCodes;
      for (int quad = threadIdx.x; quad < quads; quad += blockDim.x) {
        const int64_t k = int64_t{first_panel} * kPanelCodes + quad * kFieldCodes;
        float values[kFieldCodes];
        load_four(args_.x, row + k, args_.in - k, vector_x(), args_.element, values);
        uint32_t digits[kFieldCodes];
#pragma unroll
        for (int j = 0; j < kFieldCodes; ++j) {
          const int number = to_number(values[j], unit_[i]);
          sum_x_[i] += number;
          digits[j] = digits_of(number);
        }
        // A digit of four numbers becomes one word, in the byte order of a field.
        const uint32_t low = __byte_perm(digits[0], digits[2], 0x5140);
        const uint32_t high = __byte_perm(digits[1], digits[3], 0x5140);
        const uint32_t low_top = __byte_perm(digits[0], digits[2], 0x0062);
        const uint32_t high_top = __byte_perm(digits[1], digits[3], 0x0062);
        auto* target = reinterpret_cast<uint32_t*>(planes + quad * kFieldCodes);
        target[0] = __byte_perm(low_top, high_top, 0x5410);
        target[plane_bytes / 4] = __byte_perm(low, high, 0x7632);
        target[plane_bytes / 2] = __byte_perm(low, high, 0x5410);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) put_warp_sum(sum_x_[i], shared_.sum_x[i]);
  }

  __device__ bool vector_x() const {
    return reinterpret_cast<uintptr_t>(args_.x) % 16 == 0 && args_.x_row_stride % kFieldCodes == 0;
  }

  __device__ void measure_x() {
    uint32_t largest[kGroupTokens] = {};
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      if (tokens_.id[i] < 0) continue;
      const int64_t row = tokens_.id[i] * args_.x_row_stride;
      for (int64_t k = threadIdx.x * kFieldCodes; k < args_.in; k += blockDim.x * kFieldCodes) {
        float values[kFieldCodes];
        load_four(args_.x, row + k, args_.in - k, vector_x(), args_.element, values);
#pragma unroll
        for (int j = 0; j < kFieldCodes; ++j)
          largest[i] = max(largest[i], magnitude_bits(values[j]));
      }
    }
    find_units(largest, shared_.largest, unit_);
  }

  __device__ void store_z(int first_tile, int last_tile) const {
    auto* z = static_cast<float*>(args_.scratch);
    int64_t sum_x[kGroupTokens];
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) sum_x[i] = sum_of_warps(shared_.sum_x[i]);
    const int values = (last_tile - first_tile) * kDownLanes;
    for (int i = threadIdx.x; i < values; i += blockDim.x) {
      const int tile = i / kDownLanes, row = i % kDownLanes;
      const DownShape::Run& run = shared_.tiles[tile];
      if (row >= run.lanes()) continue;
      const float scale = shared_.scales[tile][row];
#pragma unroll
      for (int token = 0; token < kGroupTokens; ++token) {
        if (tokens_.id[token] < 0) continue;
        const int64_t codes = read_sum(shared_.sums[tile][0], kDownLanes, row, token);
        const int64_t levels = 2 * codes - static_cast<int64_t>(max_code(run.bits)) * sum_x[token];
        z[(layer_ * args_.tokens + tokens_.id[token]) * args_.max_rank + run.component + row] =
            scale * (static_cast<float>(levels) * unit_[token].unit);
      }
    }
  }

  const DeltaGemmCudaArgs& args_;
  const DownPlan& plan_;
  DownShared& shared_;
  const int panels_;
  int8_t* x_planes_;  // [column][plane]
  uint32_t* ring_;    // of the warp
  int chunk_panels_ = 0;
  int layer_ = 0;
  const Entry* entry_ = nullptr;
  RunTable<DownShape::Run> table_;
  Factor factor_;
  Tokens tokens_;
  Tokens loaded_;                     // whose digits are in shared memory
  Unit unit_[kGroupTokens];           // of their x
  int64_t sum_x_[kGroupTokens] = {};  // of the numbers that this thread made
};

__global__ void __launch_bounds__(kMaxDownWarps * 32, 1)
    down_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                const __grid_constant__ DownPlan plan) {
  auto& shared = *static_cast<DownShared*>(dynamic_shared());
  wait_for_previous_kernel();
  let_next_kernel_start();  // only now: what it reads early is what came before this kernel
  Down(args, plan, shared).run();
}

}  // namespace

cudaError_t launch_few_tokens_down(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const int bytes = device.shared_bytes - static_cast<int>(sizeof(DownShared)) - kReservedBytes;
  // Room for the digits of two tokens where all warps have their rings besides, of one where that
  // takes no more than half.
  const int one = kDigits * x_plane_bytes(static_cast<int>(panel_count(args.in)));
  const int most_beside = most_warps(args, kMaxDownWarps);
  const int beside = bytes - most_beside * kDownRingWords * 4;
  const int most = std::max(beside, std::min(one, bytes / 2));
  const DownPlan plan = {std::max(std::min(2 * one, most) / 16 * 16, kColumns * x_plane_bytes(1))};
  const int warps = warps_for(bytes - plan.x_bytes, kDownRingWords, most_beside);
  const Grid grid = {
      dim3(static_cast<unsigned>(device.multiprocessors)), warps * 32,
      sizeof(DownShared) + static_cast<size_t>(plan.x_bytes + warps * kDownRingWords * 4)};
  return launch_overlapped(down_kernel, grid, device, stream, args, plan);
}

}  // namespace adamix
