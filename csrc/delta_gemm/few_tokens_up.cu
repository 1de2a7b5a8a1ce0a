#include <algorithm>

#include "common/cuda_launch.cuh"
#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_up_product.cuh"
#include "delta_gemm/word_stream.cuh"

// y += U z. A tile: 256 outputs (one panel of U) of a group, all components; see few_tokens.cuh.
namespace adamix {
namespace {

constexpr int kUpPanels = 4;        // of a batch: 28 KiB of sums
constexpr int kUpPositions = 2048;  // components whose z is in shared memory at a time
constexpr int kMaxUpWarps = 12;     // of 168 registers: 64 of them hold sums

constexpr int kUpRingWords = UpShape::kDepth * UpShape::kStageWords;  // a warp

// Rows of a panel in shared memory: thread g holds outputs 32g ..; 9 and 296 keep both the adding
// and the reading free of bank conflicts.
constexpr int kUpRowStride = 9;
constexpr int kUpColumnStride = 296;
constexpr int kZPlaneBytes = kUpPositions + 16;
static_assert(kColumns * kUpColumnStride <= kUpRingWords, "a ring has room for a panel's sums");

struct alignas(16) UpShared {
  SharedRoutes routes;
  int32_t sums[kUpPanels][kColumns][kUpColumnStride];
  int8_t z[kColumns][kZPlaneBytes];
  uint32_t largest[2 * 32];
  int64_t level_offset[kGroupTokens][32];  // of each warp's numbers
};

// A warp's way through its part of (panels of a batch) x (runs of a chunk), in stages.
struct UpWalk {
  StageSource<UpShape> stage;
  int first_run, last_run;
  int left;  // stages

  __device__ bool done() const { return left == 0; }

  __device__ void next(const RunTable<UpShape::Run>& table, const Factor& factor) {
    if (--left == 0) return;
    UpShape::Run& run = stage.run;
    const bool same_width = !run.last_of_width();
    if (run.index + 1 == last_run) {
      ++stage.panel;
      run = table.at(first_run);
    } else {
      if (same_width) {
        stage.source += UpShape::Run::lanes_of(run.bits) * run.bits * factor.blocks(stage.panel);
      }
      run = table.behind(run);
      if (same_width) return;
    }
    stage.place(factor);
  }
};

class Up {
 public:
  __device__ Up(const DeltaGemmCudaArgs& args, UpShared& shared) : args_(args), shared_(shared) {
    ring_ = reinterpret_cast<uint32_t*>(&shared + 1) + threadIdx.x / 32 * kUpRingWords;
  }

  __device__ void run() {
    make_groups(args_, shared_.routes);
    const DeltaLayer* layers = args_.layers;
    share_out(args_, shared_.routes, [layers](int layer, const Entry& entry) {
      const int panels = static_cast<int>(panel_count(layers[layer].out));
      return Work{int64_t{panels} * words_of_runs<UpShape::Run>(entry.counts), panels};
    });
    for_share(args_, shared_.routes,
              [this](int e, int begin, int end) { run_entry(e, begin, end); });
    if (!waited_) wait_for_previous_kernel();  // else the kernel after could overtake `down`
  }

 private:
  // The panels that begin in [begin, end) of the entry.
  __device__ void run_entry(int e, int begin, int end) {
    const int group = e % shared_.routes.groups;
    layer_ = e / shared_.routes.groups;
    entry_ = &entry_at(args_, shared_.routes, e);
    table_.load(entry_->counts);
    out_ = args_.layers[layer_].out;
    factor_ = make_factor(args_.arena + entry_->u_offset, entry_->counts, out_);
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) tokens_.id[i] = shared_.routes.group_token[group][i];
    have_z_ = false;
    const int cost = shared_.routes.by_tile ? 1 : words_of_runs<UpShape::Run>(entry_->counts);
    const int first = (begin + cost - 1) / cost, last = (end + cost - 1) / cost;
    for (int panel = first; panel < last; panel += kUpPanels) {
      run_batch(panel, min(last, panel + kUpPanels));
    }
  }

  __device__ void run_batch(int first_panel, int last_panel) {
    __syncthreads();  // the sums of the batch before are read
    const int runs = table_.runs();
    const int first_end = table_.runs_until(kUpPositions);
    // A panel alone, the case of one group: every warp leaves its sums where its ring was.
    alone_ = last_panel - first_panel == 1 && first_end == runs;
    if (!alone_) zero_words(shared_.sums, (last_panel - first_panel) * kColumns * kUpColumnStride);
    for (int first = 0, last = first_end; first < runs;) {
      run_chunk(first_panel, last_panel, first, last, last - first == runs);
      first = last;
      if (first < runs) last = table_.runs_until(table_.at(first).position + kUpPositions);
    }
    add_to_y(first_panel, last_panel);
  }

  __device__ UpWalk walk_of_warp(int first_panel, int last_panel, int first_run,
                                 int last_run) const {
    const int bits = lane_width();
    const Items runs(table_.runs_between(first_run, last_run), UpShape::Run::lanes_of(bits) * bits);
    const int width = last_run - first_run, cost = runs.total_cost();
    const auto stage_at = [&](int words) {
      const int panel = words / cost;
      return panel * width + runs.before(words - panel * cost);
    };
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int total = cost * (last_panel - first_panel);
    const int first = stage_at(total * warp / warps), last = stage_at(total * (warp + 1) / warps);
    UpWalk walk = {{}, first_run, last_run, last - first};
    if (walk.left == 0) return walk;
    walk.stage.panel = first_panel + first / width;
    walk.stage.first_block = 0;
    walk.stage.run = table_.at(first_run + first % width);
    walk.stage.place(factor_);
    return walk;
  }

  __device__ void run_chunk(int first_panel, int last_panel, int first_run, int last_run,
                            bool all_runs) {
    UpWalk use = walk_of_warp(first_panel, last_panel, first_run, last_run);
    // Under way while z is prepared, and at first while `down` still runs.
    StageStream<UpShape, UpWalk> stream(use, ring_, table_, factor_);
    if (!waited_) wait_for_previous_kernel();
    waited_ = true;
    prefetch_y(first_panel, last_panel);
    const int first_position = load_z(first_run, last_run, all_runs);
    __syncthreads();

    const int8_t* z = shared_.z[plane_of_thread(tokens_)] + threadIdx.x % 4 * 4 - first_position;
    int32_t sum[kBlockFields][2][4] = {};
    while (!use.done()) {
      const uint32_t* stage = stream.next(table_, factor_);
      const int8_t* digits = z + use.stage.run.position;
      const uint32_t z0 = *reinterpret_cast<const uint32_t*>(digits);
      const uint32_t z1 = *reinterpret_cast<const uint32_t*>(digits + 16);
      // Lanes that are not there hold what was there before: any codes, times zeros.
      for_width(use.stage.run.bits,
                [&](auto bits) { multiply_up<decltype(bits)::value>(stage, z0, z1, sum); });
      const int panel = use.stage.panel;
      use.next(table_, factor_);
      if (!alone_ && (use.done() || use.stage.panel != panel)) {
        flush(sum, shared_.sums[panel - first_panel][0],
              [](int32_t* where, int32_t value) { atomicAdd(where, value); });
      }
    }
    if (alone_) {
      __syncwarp();  // the last stage is read
      flush(sum, reinterpret_cast<int32_t*>(ring_),
            [](int32_t* where, int32_t value) { *where = value; });
    }
    __syncthreads();
  }

  // put(where, sum) for all of a panel's sums, which are zero then.
  template <typename Put>
  __device__ void flush(int32_t (&sum)[kBlockFields][2][4], int32_t* panel, Put put) const {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int field = 0; field < kBlockFields; ++field) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = (field * kFieldCodes + 2 * r) * kUpRowStride + g;
        put_sums(sum[field][r], panel, kUpColumnStride, row, kUpRowStride, tokens_, put);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[field][r][i] = 0;
      }
    }
  }

  // The digits of the group's z, runs [first, last), lane t + 4i of each 16 at byte 4t + i; zeros
  // where a run is short. Returns the position of the first byte.
  __device__ int load_z(int first_run, int last_run, bool all_runs) {
    const UpShape::Run begin = table_.at(first_run);
    if (all_runs && have_z_) return begin.position;
    const int bytes = table_.at(last_run - 1).end_position() - begin.position;
    const auto* z = static_cast<const float*>(args_.scratch);
    if (!have_z_) measure_z(z);
    have_z_ = true;
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      if (first_run == 0) level_offset_[i] = 0;
      if (tokens_.id[i] < 0) continue;
      const float* row = z + (layer_ * args_.tokens + tokens_.id[i]) * args_.max_rank;
      for (int at = threadIdx.x; at < bytes; at += blockDim.x) {
        int bits = 0;
        const int component = component_at(begin.position + at, bits);
        const int number = component >= 0 ? to_number(row[component], unit_[i]) : 0;
        level_offset_[i] += int64_t{number} * static_cast<int>(max_code(bits));
        const uint32_t digits = digits_of(number);
        const int byte = at / 16 * 16 + at % 4 * 4 + at % 16 / 4;
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
          shared_.z[i * kDigits + d][byte] = static_cast<int8_t>(digits >> 8 * (kDigits - 1 - d));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) put_warp_sum(level_offset_[i], shared_.level_offset[i]);
    return begin.position;
  }

  // The component at a position, or -1, and its width.
  __device__ int component_at(int position, int& bits) const {
    int component = -1, before = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const int lanes = UpShape::Run::lanes_of(kMaxBits - i), count = entry_->counts.at[i];
      const int padded = (count + lanes - 1) / lanes * lanes;
      if (position >= 0 && position < padded) {
        bits = kMaxBits - i;
        component = position < count ? before + position : -1;
      }
      position -= padded;
      before += count;
    }
    return component;
  }

  __device__ void measure_z(const float* z) {
    uint32_t largest[kGroupTokens] = {};
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      if (tokens_.id[i] < 0) continue;
      const float* row = z + (layer_ * args_.tokens + tokens_.id[i]) * args_.max_rank;
      for (int c = threadIdx.x; c < entry_->rank; c += blockDim.x) {
        largest[i] = max(largest[i], magnitude_bits(row[c]));
      }
    }
    find_units(largest, shared_.largest, unit_);
  }

  // A line of 128 bytes a thread; one that lies across two is met by its neighbour but for the
  // last.
  __device__ void prefetch_y(int first_panel, int last_panel) const {
    const DeltaLayer& layer = args_.layers[layer_];
    const int64_t size = args_.element == Element::kFloat ? 4 : 2, line = 128 / size;
    const int64_t o = int64_t{first_panel} * kPanelCodes + threadIdx.x * line;
    if (o >= min(out_, int64_t{last_panel} * kPanelCodes)) return;
#pragma unroll
    for (int token = 0; token < kGroupTokens; ++token) {
      if (tokens_.id[token] < 0) continue;
      const int64_t at = tokens_.id[token] * layer.y_row_stride + o;
      prefetch(static_cast<const char*>(layer.y) + at * size);
    }
  }

  __device__ int64_t sum_of(int panel, int row, int token) const {
    if (!alone_) return read_sum(shared_.sums[panel][0], kUpColumnStride, row, token);
    int64_t sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
      const auto* sums = reinterpret_cast<const int32_t*>(&shared_ + 1) + warp * kUpRingWords;
      sum += read_sum(sums, kUpColumnStride, row, token);
    }
    return sum;
  }

  __device__ void add_to_y(int first_panel, int last_panel) const {
    const DeltaLayer& layer = args_.layers[layer_];
    int64_t offset[kGroupTokens];
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) offset[i] = sum_of_warps(shared_.level_offset[i]);
    const int values = (last_panel - first_panel) * kPanelCodes;
    for (int i = threadIdx.x; i < values; i += blockDim.x) {
      const int panel = i / kPanelCodes, code = i % kBlockCodes, g = i % kPanelCodes / kBlockCodes;
      const int64_t o = int64_t{first_panel} * kPanelCodes + i;
      if (o >= out_) continue;
#pragma unroll
      for (int token = 0; token < kGroupTokens; ++token) {
        if (tokens_.id[token] < 0) continue;
        const int64_t at = tokens_.id[token] * layer.y_row_stride + o;
        const float y = load_element(layer.y, at, args_.element);
        const int64_t levels = 2 * sum_of(panel, code * kUpRowStride + g, token) - offset[token];
        store_element(layer.y, at, args_.element,
                      y + static_cast<float>(levels) * unit_[token].unit);
      }
    }
  }

  const DeltaGemmCudaArgs& args_;
  UpShared& shared_;
  uint32_t* ring_;  // of the warp
  int layer_ = 0;
  int64_t out_ = 0;
  const Entry* entry_ = nullptr;
  RunTable<UpShape::Run> table_;
  Factor factor_;
  Tokens tokens_;
  Unit unit_[kGroupTokens];             // of z
  int64_t level_offset_[kGroupTokens];  // sum of (2^b - 1) · z of the numbers this thread made
  bool have_z_ = false;                 // its digits, or at least its unit
  bool alone_ = false;
  bool waited_ = false;
};

__global__ void __launch_bounds__(kMaxUpWarps * 32, 1)
    up_kernel(const __grid_constant__ DeltaGemmCudaArgs args) {
  auto& shared = *static_cast<UpShared*>(dynamic_shared());
  let_next_kernel_start();
  Up(args, shared).run();
}

}  // namespace

cudaError_t launch_few_tokens_up(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const int bytes = device.shared_bytes - static_cast<int>(sizeof(UpShared)) - kReservedBytes;
  const int warps = warps_for(bytes, kUpRingWords, most_warps(args, kMaxUpWarps));
  const Grid grid = {dim3(static_cast<unsigned>(device.multiprocessors)), warps * 32,
                     sizeof(UpShared) + static_cast<size_t>(warps * kUpRingWords * 4)};
  return launch_overlapped(up_kernel, grid, device, stream, args);
}

}  // namespace adamix
