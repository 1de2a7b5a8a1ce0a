#include <algorithm>

#include "common/cuda_launch.cuh"
#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_down_walk.cuh"

// z = scale · V x. A tile: a run of 16 components (8 of wide codes) of a group, all panels of V;
// see few_tokens.cuh.
namespace adamix {
namespace {

constexpr int kDownTiles = 32;  // of a batch: as many as a warp has lanes
constexpr int kMaxDownWarps = 16;
constexpr int kDownDepth = 4;
constexpr int kAtOnce = 4;  // vectors of x on their way to a thread
constexpr int kDownRingWords = kDownDepth * kDownStageWords;  // a warp

struct DownPlan {
  int x_bytes;  // for the digits of x, as many panels at a time as there is room for:
  int panels_of_one, panels_of_two;  // of a group of one token, of two
};

__host__ __device__ constexpr int x_plane_bytes(int panels) {
  return panels * kPanelCodes + 16;  // 16: planes begin in different banks
}

// A warp's share of (tiles of a batch) x (panels of a chunk): where it begins, how many.
struct alignas(16) DownShare {
  int tile, panel, stages;
};

struct alignas(16) DownShared {
  SharedRoutes routes;
  Run tiles[kDownTiles];  // of the batch
  DownShare shares[kMaxDownWarps];
  int32_t sums[kDownTiles][kColumns][kDownLanes];
  float scales[kDownTiles][kDownLanes];
  uint32_t largest[kGroupTokens][32];  // of each warp's values
  Unit units[kGroupTokens];            // of x
  int64_t sum_x[kGroupTokens][32];     // of each warp's numbers
};

using DownStream = StageStream<DownWalk, kDownDepth, kDownStageWords>;

template <typename T, bool kEachPart>
class Down {
 public:
  __device__ Down(const DeltaGemmCudaArgs& args, const DownPlan& plan, DownShared& shared)
      : args_(args), plan_(plan), shared_(shared), panels_(panel_count(args.in)) {
    x_planes_ = reinterpret_cast<int8_t*>(&shared + 1);
    auto* rings = reinterpret_cast<uint32_t*>(x_planes_ + plan.x_bytes);
    ring_ = rings + threadIdx.x / 32 * kDownRingWords;
  }

  __device__ void run() {
    const DownTiles cut = {panels_};
    if constexpr (kEachPart) {
      WarpRoute route;
      const bool routes = threadIdx.x < 32;
      if (routes) route.read_slots(args_);
      if (routes) route.read_entries(args_, shared_.routes);
      if (args_.tokens == 1) {  // x does not wait for its route: it is of this token or of none
        begin_x(Tokens{0, -1});
        measured_ = true;  // behind the barrier
      }
      __syncwarp();
      if (routes) route.take_part(shared_.routes, cut);
    } else {
      find_route<kEachPart>(args_, shared_.routes, cut);
    }
    __syncthreads();
    for_parts<kEachPart>(args_, shared_.routes, cut,
                         [this](const Part& part, const Entry& entry) { run_part(part, entry); });
  }

 private:
  __device__ void run_part(const Part& part, const Entry& entry) {
    layer_ = part.layer;
    entry_ = &entry;
    factor_ = make_factor(args_.arena + entry.down.offset, entry.down.counts, args_.in);
    const Tokens tokens = {shared_.routes.group_token[part.group][0],
                           shared_.routes.group_token[part.group][1]};
    if (!(tokens == tokens_)) begin_x(tokens);
    for (int tile = part.begin; tile < part.end; tile += kDownTiles) {
      run_batch(tile, min(part.end - tile, kDownTiles));
    }
  }

  __device__ void run_batch(int first_tile, int tiles) {
    zero_words(shared_.sums, tiles * kColumns * kDownLanes);
    const int i = threadIdx.x;
    if (i < 32) {
      Run run = {0, 0, 0, 0};
      if (i < tiles) run = DownRuns::at(entry_->down.counts, first_tile + i);
      shared_.tiles[i] = run;
      share_stages(run, tiles, chunk_panels_);
    }
    for (int panel = 0; panel < panels_; panel += chunk_panels_) {
      run_chunk(panel, min(panels_, panel + chunk_panels_), tiles);
    }
    store_z(tiles);
    __syncthreads();  // tiles and sums are read
  }

  // They arrive together with the first words.
  __device__ void fetch_scales(int tiles) {
    for (int i = threadIdx.x; i < tiles * kDownLanes; i += blockDim.x) {
      const Run& run = shared_.tiles[i / kDownLanes];
      const int lane = i % kDownLanes;
      if (lane >= run.lanes()) continue;
      copy_async_4(shared_address(&shared_.scales[i / kDownLanes][lane]),
                   args_.arena + entry_->scale_offset + run.component + lane);
    }
    commit_copies();
  }

  // Warps have shares of equal cost: words of (tile, panel), tiles outside. By one warp, whose
  // lanes know a tile each, for all.
  __device__ void share_stages(const Run& run, int tiles, int width) {
    const int lane = threadIdx.x, warps = blockDim.x / 32;
    const int cost = lane < tiles ? run.block_words() + DownRuns::kStageCost : 0;  // a panel
    const int first = __shfl_sync(kWarp, run.before, 0);
    const int before = (run.before - first + lane * DownRuns::kStageCost) * width;
    const int total = __reduce_add_sync(kWarp, cost) * width;
    int rest;
    const int begin = lane < warps ? divide(total * lane, warps, rest) : total;
    int tile = 0;  // the last that begins before or there
    for (int step = kDownTiles / 2; tiles > 1 && step > 0; step /= 2) {
      const int there = __shfl_sync(kWarp, before, tile + step);
      if (tile + step < tiles && there <= begin) tile += step;
    }
    const int left = begin - __shfl_sync(kWarp, before, tile);
    int panel = divide_up(left, __shfl_sync(kWarp, cost, tile));
    if (panel >= width) panel = 0, ++tile;
    const int stage = tile * width + panel;
    const int stages = __shfl_down_sync(kWarp, stage, 1) - stage;
    if (lane < warps) shared_.shares[lane] = {tile, panel, stages};
  }

  __device__ void run_chunk(int first_panel, int last_panel, int tiles) {
    // x is measured and the shares are known before a barrier, digits are loaded behind one; words
    // come last, or they would be in the way of x.
    const bool known = !measured_, loads = !loaded_;
    if (known) __syncthreads();
    measured_ = true;
    if (loads) load_x(first_panel, last_panel, known ? 0 : busy_threads());
    if (!known) __syncthreads();
    if (first_panel == 0) fetch_scales(tiles);
    const DownShare share = shared_.shares[threadIdx.x / 32];
    DownStream stream({shared_.tiles, factor_, first_panel, last_panel, share.tile,
                       first_panel + share.panel, share.stages},
                      ring_);
    if (known && loads) __syncthreads();
    const int8_t* x = x_planes_ + plane_of_thread(tokens_) * x_plane_bytes(chunk_panels_);
    int tile = share.tile, panel = share.panel;
    for (int left = share.stages; left > 0;) {
      int stages = min(left, last_panel - first_panel - panel);
      left -= stages;
      const int8_t* digits = x + panel * kPanelCodes;
      int32_t sum[4];
      for_width(shared_.tiles[tile].bits(), [&](auto width) {
        constexpr int kBits = decltype(width)::value;
        int32_t sums[kFieldPairs][4] = {};
#pragma unroll 1
        for (; stages > 0; --stages) {
          multiply_down<kBits>(stream.next(), digits, sums);
          digits += kPanelCodes;
        }
        join_kinds<kBits>(sums, sum);
      });
      add_sums(sum, shared_.sums[tile]);
      ++tile;
      panel = 0;
    }
    wait_copies<0>();  // of scales, where a warp has no stage
    __syncthreads();
    // The last chunk may be narrower.
    const int width = min(chunk_panels_, panels_ - last_panel);
    if (width > 0 && threadIdx.x < 32) share_stages(shared_.tiles[threadIdx.x], tiles, width);
  }

  // Rows g and g + 8 of a thread's two columns.
  __device__ void add_sums(const int32_t (&sum)[4], int32_t (*columns)[kDownLanes]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (tokens_.of(t / 2) < 0) return;
    int32_t* where = &columns[first_column(t)][g];
    atomicAdd(where, sum[0]);
    atomicAdd(where + 8, sum[2]);
    if (t % 2 != 0) return;
    atomicAdd(where + kDownLanes, sum[1]);
    atomicAdd(where + kDownLanes + 8, sum[3]);
  }

  // --- x

  // A group's tokens, and each warp's part of their largest values. A barrier must follow.
  __device__ void begin_x(const Tokens& tokens) {
    tokens_ = tokens;
    loaded_ = measured_ = false;
    const int busy = busy_threads(), mine = static_cast<int>(threadIdx.x) - busy;
    chunk_panels_ = tokens.id[1] < 0 ? plan_.panels_of_one : plan_.panels_of_two;
    const int in = static_cast<int>(args_.in), step = (static_cast<int>(blockDim.x) - busy) * 8;
    const bool vector = vector_x() && in % 8 == 0;
#pragma unroll 1
    for (int i = 0; i < kGroupTokens; ++i) {
      if (tokens_.of(i) < 0) continue;
      uint32_t largest = 0;
#pragma unroll 1
      for (int k = mine < 0 ? in : mine * 8; k < in; k += kAtOnce * step) {
        Eight<T> eights[kAtOnce] = {};
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int at = k + j * step;
          if (vector && at < in) eights[j].load_vector(x_row(i) + at);
          if (!vector) eights[j].load(x_row(i), at, in, false);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) largest = eights[j].largest(largest);
      }
      put_warp_max(Eight<T>::bits_of_largest(largest), shared_.largest[i]);
    }
  }

  // The first warp has other work while x is prepared, if there are others.
  __device__ static int busy_threads() { return blockDim.x > 32 ? 32 : 0; }

  // The digits of the group's tokens, panels [first, last), in the byte order of fields; zeros
  // behind the last input; by all but the first `busy` threads. A barrier must follow.
  __device__ void load_x(int first_panel, int last_panel, int busy) {
    loaded_ = last_panel - first_panel == panels_;
    const int plane_words = x_plane_bytes(chunk_panels_) / 4;
    const int eights = (last_panel - first_panel) * kPanelCodes / 8;
#pragma unroll 1
    for (int i = 0; i < kGroupTokens; ++i) {
      if (tokens_.of(i) < 0) continue;
      const Unit unit = unit_for(max_of_warps(shared_.largest[i]));
      if (threadIdx.x == 0) shared_.units[i] = unit;
      auto* planes = reinterpret_cast<uint32_t*>(x_planes_) + i * kDigits * plane_words;
      int64_t sum = 0;
      const int mine = static_cast<int>(threadIdx.x) - busy, step = blockDim.x - busy;
      for (int at = mine < 0 ? eights : mine; at < eights; at += step) {
        Eight<T> eight;
        eight.load(x_row(i), int64_t{first_panel} * kPanelCodes + at * 8, args_.in, vector_x());
        sum += store_digits(eight, unit, planes + at * 2, plane_words);
      }
      put_warp_sum(sum, shared_.sum_x[i], first_panel > 0);
    }
  }

  __device__ const T* x_row(int token) const {
    return static_cast<const T*>(args_.x) + tokens_.of(token) * args_.x_row_stride;
  }

  __device__ bool vector_x() const {
    return reinterpret_cast<uintptr_t>(args_.x) % 16 == 0 &&
           args_.x_row_stride * sizeof(T) % 16 == 0;
  }

  // --- z

  // Of the components of the batch's tiles.
  __device__ void store_z(int tiles) const {
    auto* z = static_cast<float*>(args_.scratch);
#pragma unroll 1
    for (int token = 0; token < kGroupTokens; ++token) {
      if (tokens_.of(token) < 0) continue;
      const int64_t sum_x = sum_of_warps(shared_.sum_x[token]);
      const float unit = shared_.units[token].unit;
      float* z_of_token = z + z_row(args_, layer_, tokens_.of(token));
      for (int i = threadIdx.x; i < tiles * kDownLanes; i += blockDim.x) {
        const int tile = i / kDownLanes, row = i % kDownLanes;
        const Run run = shared_.tiles[tile];
        if (row >= run.lanes()) continue;
        const int64_t levels = 2 * read_sum(shared_.sums[tile][0], kDownLanes, row, token) -
                               static_cast<int64_t>((1 << run.bits()) - 1) * sum_x;
        put_z(z_of_token, *entry_, run.component + row,
              shared_.scales[tile][row] * (static_cast<float>(levels) * unit));
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
  Factor factor_;
  Tokens tokens_ = {-1, -1};
  bool measured_ = false;  // whether their largest values are in shared memory
  bool loaded_ = false;    // whether all their digits are
};

template <typename T, bool kEachPart>
__global__ void __launch_bounds__(kMaxDownWarps * 32, 1)
    down_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                const __grid_constant__ DownPlan plan) {
  auto& shared = *static_cast<DownShared*>(dynamic_shared());
  wait_for_previous_kernel();
  let_next_kernel_start();  // only now: what it reads early is what came before this kernel
  Down<T, kEachPart>(args, plan, shared).run();
}

template <bool kEachPart>
auto kernel_of(Element element) {
  return element == Element::kFloat  ? down_kernel<float, kEachPart>
         : element == Element::kHalf ? down_kernel<__half, kEachPart>
                                     : down_kernel<__nv_bfloat16, kEachPart>;
}

// Chunks of panels, all about as large, of which so many planes of digits have room.
int panels_at_once(const DeltaGemmCudaArgs& args, int x_bytes, int planes) {
  const int panels = static_cast<int>(panel_count(args.in));
  const int room = std::max((x_bytes / planes - 16) / kPanelCodes, 1);
  const int chunks = (panels + room - 1) / room;
  return (panels + chunks - 1) / chunks;
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
  const int beside = bytes - kMaxDownWarps * kDownRingWords * 4;
  const int most = std::max(beside, std::min(one, bytes / 2));
  const int tokens = args.tokens == 1 ? 1 : kGroupTokens;
  DownPlan plan = {std::max(std::min(tokens * one, most) / 16 * 16, kColumns * x_plane_bytes(1)), 0,
                   0};
  plan.panels_of_one = panels_at_once(args, plan.x_bytes, kDigits);
  plan.panels_of_two = panels_at_once(args, plan.x_bytes, kColumns);
  const int warps = warps_for(bytes - plan.x_bytes, kDownRingWords, kMaxDownWarps);
  const Grid grid = {
      dim3(static_cast<unsigned>(device.multiprocessors)), warps * 32,
      sizeof(DownShared) + static_cast<size_t>(plan.x_bytes + warps * kDownRingWords * 4)};
  const bool one_part = WarpRoute::fits(args, device.multiprocessors);
  const auto kernel = one_part ? kernel_of<true>(args.element) : kernel_of<false>(args.element);
  return launch_overlapped(kernel, grid, device, stream, args, plan);
}

}  // namespace adamix
