#include <algorithm>

#include "common/cuda_launch.cuh"
#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_up_walk.cuh"

// y += U z. A tile: 256 outputs (one panel of U) of a group, all components; see few_tokens.cuh.
namespace adamix {
namespace {

struct UpPlan {
  // Panels of a batch: there is room for their sums beside the digits of one token's z, of two.
  int panels_of_one, panels_of_two;
};

struct alignas(16) UpShared {
  SharedRoutes routes;
  Run runs[kUpRuns];                   // of the chunk
  uint8_t top_codes[kUpRuns];          // the largest code of the width of 16 positions
  uint32_t largest[kGroupTokens][32];  // of each warp's values
  Unit units[kGroupTokens];            // of z
  // Sum of (2^b - 1) · z of each warp's numbers.
  int64_t level_offset[kGroupTokens][32];
};

using UpStream = StageStream<UpWalk, kUpDepth, kUpStageWords>;

template <typename T, bool kEachPart>
class Up {
 public:
  __device__ Up(const DeltaGemmCudaArgs& args, const UpPlan& plan, UpShared& shared)
      : args_(args), plan_(plan), shared_(shared) {
    rings_ = reinterpret_cast<uint32_t*>(&shared + 1);
    ring_ = rings_ + threadIdx.x / 32 * kUpRingWords;
    z_planes_ = reinterpret_cast<int8_t*>(rings_ + blockDim.x / 32 * kUpRingWords);
  }

  __device__ void run() {
    const UpTiles cut = {args_.layers};
    find_route<kEachPart>(args_, shared_.routes, cut);
    __syncthreads();
    for_parts<kEachPart>(args_, shared_.routes, cut,
                         [this](const Part& part, const Entry& entry) { run_part(part, entry); });
    if (!waited_) wait_for_previous_kernel();  // else the kernel after could overtake `down`
  }

 private:
  __device__ void run_part(const Part& part, const Entry& entry) {
    layer_ = part.layer;
    entry_ = &entry;
    out_ = args_.layers[layer_].out;
    factor_ = make_factor(args_.arena + entry.up.offset, entry.up.counts, out_);
    tokens_ = {shared_.routes.group_token[part.group][0],
               shared_.routes.group_token[part.group][1]};
    const bool one = tokens_.id[1] < 0;
    const int columns = one ? kDigits : kColumns;
    sums_ = reinterpret_cast<int32_t*>(z_planes_ + columns * kZPlaneBytes);
    panel_words_ = columns * kUpColumnStride;
    have_z_ = false;
    // Batches of panels, all about as large.
    const int room = one ? plan_.panels_of_one : plan_.panels_of_two,
              panels = part.end - part.begin;
    const int each = panels <= room ? panels : divide_up(panels, divide_up(panels, room));
    for (int panel = part.begin; panel < part.end; panel += each) {
      if (panel > part.begin || !kEachPart) __syncthreads();  // the sums before are read
      run_batch(panel, min(panel + each, part.end));
    }
  }

  __device__ void run_batch(int first_panel, int last_panel) {
    const int runs = UpRuns::count(entry_->up.counts);
    const int first_end =
        positions() <= kUpPositions ? runs : UpRuns::end_until(entry_->up.counts, kUpPositions);
    // A panel alone, the case of one group: every warp leaves its sums where its ring was.
    alone_ = last_panel - first_panel == 1 && first_end == runs && blockDim.x >= kPanelCodes;
    int begin = 0;  // of the chunk in z
    for (int first = 0, last = first_end; first < runs;) {
      if (!have_z_ || first_end < runs) list_runs(first, last, begin);
      __syncthreads();
      run_chunk(first_panel, last_panel, first, last);
      first = last;
      if (first < runs) {
        begin = UpRuns::at(entry_->up.counts, first).position;
        last = UpRuns::end_until(entry_->up.counts, begin + kUpPositions);
      }
    }
    add_to_y(first_panel, last_panel);
  }

  __device__ void list_runs(int first_run, int last_run, int begin) {
    for (int i = threadIdx.x; i < last_run - first_run; i += blockDim.x) {
      Run run = UpRuns::at(entry_->up.counts, first_run + i);
      run.set_shape(run.bits(), run.lanes(), min(run.same(), last_run - first_run - i));
      shared_.runs[i] = run;
      const int at = (run.position - begin) / 16;
      for (int j = 0; j < up_lanes_of(run.bits()) / 16; ++j) {
        shared_.top_codes[at + j] = static_cast<uint8_t>((1 << run.bits()) - 1);
      }
    }
  }

  __device__ UpShare share_of_warp(int panels, int runs) const {
    const int begin = shared_.runs[0].before, lane = threadIdx.x % 32;
    const Run last_run = shared_.runs[runs - 1];
    const int cost =
        last_run.before + last_run.block_words() - begin + runs * UpRuns::kStageCost;  // a panel
    const auto stage_at = [&](int words, int& run) {
      int left, panel = divide(words, cost, left);
      run = 0;
      for (int first = 0; first < runs; first += 32) {
        const int i = first + lane;
        const bool before =
            i < runs && shared_.runs[i].before - begin + i * UpRuns::kStageCost < left;
        run += __popc(__ballot_sync(kWarp, before));
      }
      if (run == runs) run = 0, ++panel;
      return panel;
    };
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int total = cost * panels;
    int rest, run, next_run;
    const int panel = stage_at(divide(total * warp, warps, rest), run);
    const int next =
        stage_at(warp + 1 < warps ? divide(total * (warp + 1), warps, rest) : total, next_run);
    return {panel, run, (next - panel) * runs + next_run - run};
  }

  __device__ void run_chunk(int first_panel, int last_panel, int first_run, int last_run) {
    const int runs = last_run - first_run;
    const UpShare share = share_of_warp(last_panel - first_panel, runs);
    // Under way while z is prepared, and at first while `down` still runs.
    UpStream stream(
        {shared_.runs, runs, factor_, first_panel + share.panel, share.run, share.stages}, ring_);
    if (!waited_) wait_for_previous_kernel();
    waited_ = true;
    fetch_y(first_panel, last_panel);
    if (!alone_ && first_run == 0) zero_words(sums_, (last_panel - first_panel) * panel_words_);
    load_z(first_run, runs);

    const int first_position = shared_.runs[0].position;
    const int8_t* z =
        z_planes_ + plane_of_thread(tokens_) * kZPlaneBytes + threadIdx.x % 4 * 4 - first_position;
    int32_t sum[kBlockFields][2][4] = {};
    int panel = share.panel, next = share.run;
    for (int left = share.stages; left > 0;) {
      const Run run = shared_.runs[next];
      int stages = min(left, run.same());
      left -= stages;
      next += stages;
      const int8_t* digits = z + run.position;
      for_width(run.bits(), [&](auto width) {
        constexpr int kBits = decltype(width)::value;
#pragma unroll 1
        for (; stages > 0; --stages) {
          const uint32_t* stage = stream.next();
          // Lanes that are not there hold what was there before: any codes, times zeros.
          multiply_up<kBits>(stage, *reinterpret_cast<const uint32_t*>(digits),
                             *reinterpret_cast<const uint32_t*>(digits + 16), sum);
          digits += UpRuns::lanes_of(kBits);
        }
      });
      if (!alone_ && (left == 0 || next == runs)) {
        flush(sum, sums_ + panel * panel_words_,
              [](int32_t* where, int32_t value) { atomicAdd(where, value); });
        next = 0;
        ++panel;
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
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (tokens_.of(t / 2) >= 0) {
      int32_t* column = panel + first_column(t) * kUpColumnStride + g;
      for_rows([&](int row, int field, int r, int i) { put(column + row, sum[field][r][i]); });
      if (t % 2 == 0) {
        column += kUpColumnStride;
        for_rows(
            [&](int row, int field, int r, int i) { put(column + row, sum[field][r][i + 1]); });
      }
    }
    for_rows([&](int, int field, int r, int i) { sum[field][r][i] = sum[field][r][i + 1] = 0; });
  }

  // body(row of thread g = 0, field, r, i) for the sums [field][r][i] of a thread's first column.
  template <typename Body>
  __device__ static void for_rows(Body body) {
#pragma unroll
    for (int j = 0; j < kBlockCodes; ++j) {
      body(j * kUpRowStride, j / kFieldCodes, j % kFieldCodes / 2, j % 2 * 2);
    }
  }

  // The digits of the group's z, of so many runs, lane t + 4i of each 16 at byte 4t + i. Ends with
  // a barrier.
  __device__ void load_z(int first_run, int runs) {
    const bool all_runs = runs == UpRuns::count(entry_->up.counts);
    if (all_runs && have_z_) return __syncthreads();
    const int position = shared_.runs[0].position;
    const Run last = shared_.runs[runs - 1];
    const int bytes = last.position + UpRuns::lanes_of(last.bits()) - position;
    const auto* z = static_cast<const float*>(args_.scratch);
    if (!have_z_) measure_z(z);
    have_z_ = true;
#pragma unroll 1
    for (int i = 0; i < kGroupTokens; ++i) {
      if (tokens_.of(i) < 0) continue;
      const Unit unit = shared_.units[i];
      const float* row = z + z_row(args_, layer_, tokens_.of(i)) + position;
      int64_t offset = 0;
      for (int at = threadIdx.x; at < bytes; at += blockDim.x) {
        const int number = to_number(row[at], unit);
        offset += int64_t{number} * shared_.top_codes[at / 16];
        const uint32_t digits = digits_of(number);
        const int byte = at / 16 * 16 + at % 4 * 4 + at % 16 / 4;
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
          z_planes_[(i * kDigits + d) * kZPlaneBytes + byte] =
              static_cast<int8_t>(digits >> 8 * (kDigits - 1 - d));
        }
      }
      put_warp_sum(offset, shared_.level_offset[i], first_run > 0);
    }
    __syncthreads();
  }

  // Of z in memory.
  __device__ int positions() const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) count += padded_count(entry_->up.counts.at[i], kMaxBits - i);
    return count;
  }

  __device__ void measure_z(const float* z) {
    const int count = positions();
#pragma unroll 1
    for (int i = 0; i < kGroupTokens; ++i) {
      if (tokens_.of(i) < 0) continue;
      const float* row = z + z_row(args_, layer_, tokens_.of(i));
      uint32_t largest = 0;
      for (int at = threadIdx.x; at < count; at += blockDim.x) {
        largest = max(largest, magnitude_bits(row[at]));
      }
      put_warp_max(largest, shared_.largest[i]);
    }
    __syncthreads();
    if (threadIdx.x < 32 * kGroupTokens) {
      const Unit unit = unit_for(max_of_warps(shared_.largest[threadIdx.x / 32]));
      if (threadIdx.x % 32 == 0) shared_.units[threadIdx.x / 32] = unit;
    }
    __syncthreads();
  }

  // y on its way: into registers where a thread has one output, else into L2, a line of 128 bytes a
  // thread; one that lies across two is met by its neighbour but for the last.
  __device__ void fetch_y(int first_panel, int last_panel) {
    const int each = alone_ ? 1 : static_cast<int>(128 / sizeof(T));
    const int i = static_cast<int>(threadIdx.x) * each;
    if (i >= outputs_of(first_panel, last_panel)) return;
#pragma unroll
    for (int token = 0; token < kGroupTokens; ++token) {
      if (tokens_.id[token] < 0) continue;
      const T* y = y_of(token, first_panel) + i;
      if (alone_) {
        y_[token] = widen(*y);
      } else {
        prefetch(y);
      }
    }
  }

  __device__ T* y_of(int token, int panel) const {
    const DeltaLayer& layer = args_.layers[layer_];
    return static_cast<T*>(layer.y) + tokens_.of(token) * layer.y_row_stride +
           int64_t{panel} * kPanelCodes;
  }

  __device__ int outputs_of(int first_panel, int last_panel) const {
    return static_cast<int>(min(out_, int64_t{last_panel} * kPanelCodes)) -
           first_panel * kPanelCodes;
  }

  __device__ static int row_of(int i) {
    return i % kBlockCodes * kUpRowStride + i % kPanelCodes / kBlockCodes;
  }

  __device__ __forceinline__ int64_t sum_of_batch(int i, int token) const {
    return read_sum(sums_ + i / kPanelCodes * panel_words_, kUpColumnStride, row_of(i), token);
  }

  __device__ __forceinline__ int64_t sum_of_rings(int i, int token) const {
    const auto* sums = reinterpret_cast<const int32_t*>(rings_);
    int64_t sum = 0;
#pragma unroll 2
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
      sum += read_sum(sums + warp * kUpRingWords, kUpColumnStride, row_of(i), token);
    }
    return sum;
  }

  // A thread has two adjacent outputs, or one where that keeps more threads busy.
  __device__ void add_to_y(int first_panel, int last_panel) const {
    const DeltaLayer& layer = args_.layers[layer_];
    const bool aligned =
        reinterpret_cast<uintptr_t>(layer.y) % (2 * sizeof(T)) == 0 && layer.y_row_stride % 2 == 0;
    const int outputs = outputs_of(first_panel, last_panel);
#pragma unroll 1
    for (int token = 0; token < kGroupTokens; ++token) {
      if (tokens_.of(token) < 0) continue;
      T* y = y_of(token, first_panel);
      const int64_t offset = sum_of_warps(shared_.level_offset[token]);
      const float unit = shared_.units[token].unit;
      const auto delta = [&](int64_t sum) { return static_cast<float>(2 * sum - offset) * unit; };
      if (alone_) {
        const int i = threadIdx.x;
        if (i < outputs) {
          const float before = token == 0 ? y_[0] : y_[1];
          y[i] = narrow<T>(before + delta(sum_of_rings(i, token)));
        }
        continue;
      }
#pragma unroll 4
      for (int i = threadIdx.x * 2; i < outputs; i += blockDim.x * 2) {
        Two<T> two(y + i, outputs - i, aligned);
        two.add(delta(sum_of_batch(i, token)), delta(sum_of_batch(i + 1, token)));
        two.store();
      }
    }
  }

  const DeltaGemmCudaArgs& args_;
  const UpPlan& plan_;
  UpShared& shared_;
  uint32_t* rings_;   // of all warps
  uint32_t* ring_;    // of this one
  int8_t* z_planes_;  // [column][kZPlaneBytes]
  int32_t* sums_;     // [panel][column], kUpColumnStride words each
  int layer_ = 0;
  int64_t out_ = 0;
  const Entry* entry_ = nullptr;
  Factor factor_;
  Tokens tokens_;
  int panel_words_ = 0;  // of sums
  bool have_z_ = false;  // its digits, or at least its unit
  bool alone_ = false;
  float y_[kGroupTokens];  // of the thread's output, if alone
  bool waited_ = false;
};

template <typename T, bool kEachPart>
__global__ void __launch_bounds__(kMaxUpWarps * 32, 1)
    up_kernel(const __grid_constant__ DeltaGemmCudaArgs args, const __grid_constant__ UpPlan plan) {
  auto& shared = *static_cast<UpShared*>(dynamic_shared());
  let_next_kernel_start();
  Up<T, kEachPart>(args, plan, shared).run();
}

template <bool kEachPart>
auto kernel_of(Element element) {
  return element == Element::kFloat  ? up_kernel<float, kEachPart>
         : element == Element::kHalf ? up_kernel<__half, kEachPart>
                                     : up_kernel<__nv_bfloat16, kEachPart>;
}

}  // namespace

cudaError_t launch_few_tokens_up(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  // What the rings leave is the pool; at least room for one panel.
  constexpr int kLeastPool = kColumns * (kUpColumnStride * 4 + kZPlaneBytes);
  const int room = device.shared_bytes - static_cast<int>(sizeof(UpShared)) - kReservedBytes;
  const int bytes = room / 16 * 16;
  const int warps = warps_for(bytes - kLeastPool, kUpRingWords, kMaxUpWarps);
  const int pool = bytes - warps * kUpRingWords * 4;
  const auto panels_for = [pool](int columns) {
    return (pool / columns - kZPlaneBytes) / (kUpColumnStride * 4);
  };
  const UpPlan plan = {panels_for(kDigits), panels_for(kColumns)};
  const Grid grid = {dim3(static_cast<unsigned>(device.multiprocessors)), warps * 32,
                     sizeof(UpShared) + static_cast<size_t>(bytes)};
  const bool one_part = WarpRoute::fits(args, device.multiprocessors);
  const auto kernel = one_part ? kernel_of<true>(args.element) : kernel_of<false>(args.element);
  return launch_overlapped(kernel, grid, device, stream, args, plan);
}

}  // namespace adamix
