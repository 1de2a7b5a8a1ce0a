#include "common/cuda_launch.cuh"
#include "delta_gemm/each_token.cuh"
#include "delta_gemm/elements.cuh"
#include "delta_gemm/few_tokens_down_product.cuh"

// z = scale · V x; see each_token.cuh. A run is 8 components of one width, and a thread block has
// some that follow each other, each warp every 16th panel of them. In a panel, a thread has two
// blocks of one component, which are rows of a byte product as they lie, and a column of x's digits
// for each half of the panel:
//
//   thread 4g + t       | columns 0 1 2: digits of | columns 4 5 6: digits of
//                       | the first half of x      | the second half
//   row g: block t of component g      sums                 -
//   row g + 8: block 4 + t                -                sums
namespace adamix {
namespace {

constexpr int kRunLanes = 8;
constexpr int kHalfBlocks = kPanelBlocks / 2;
constexpr int kAtOnce = 4;             // vectors of x on their way to a thread
constexpr int kLine = 32;              // words
constexpr int kSumDigits = 4;          // of a component in shared memory: one is padding
constexpr int kMostRuns = kEachWarps;  // of a thread block: a warp each for what comes of them

struct DownPlan {
  int panels, blocks;  // of x
  int plane_bytes;     // of a digit of x: planes begin in different banks
  int z_row;
  int first_part[kMaxLayers + 1];  // of a layer: thread blocks of a token
};

struct alignas(16) DownShared {
  SharedRows<kEachThreads> rows;
  int32_t sums[kMostRuns][kRunLanes][kSumDigits];
  uint32_t largest[32];       // of each warp's values
  int64_t all_x[kEachWarps];  // sums of each warp's numbers
};

// A thread's sums of codes of a panel, added to those before.
template <int kBits>
__device__ __forceinline__ void multiply_run(const uint32_t (&words)[2][kMaxBits],
                                             const uint32_t (&x)[kBlockFields], int32_t (&sum)[4]) {
  int32_t sums[kFieldPairs][4] = {};
#pragma unroll
  for (int m = 0; m < kFieldPairs; ++m) {
    const FieldPair pair = field_pair(kBits, m);
    mma_u8s8(sums[pair.sum], read_field<kBits>(words[0], pair.first, pair.at),
             read_field<kBits>(words[1], pair.first, pair.at),
             read_field<kBits>(words[0], pair.second, pair.at),
             read_field<kBits>(words[1], pair.second, pair.at), x[pair.first], x[pair.second]);
  }
  int32_t joined[4];
  join_kinds<kBits>(sums, joined);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += joined[i];
}
static_assert(int64_t{255} * 128 * kEachInputs < int64_t{1} << 31);

// A unit of work.
struct RunPanel {
  int number, panel;  // of the thread block's runs; of x
  Place run;
};

// kVector: x may be read 16 bytes at a time. kOneRun: a thread block has one run.
template <typename T, bool kVector, bool kOneRun>
class EachTokenDown {
 public:
  __device__ EachTokenDown(const DeltaGemmCudaArgs& args, const DownPlan& plan, DownShared& shared)
      : args_(args), plan_(plan), shared_(shared), in_(static_cast<int>(args.in)) {
    planes_ = reinterpret_cast<int8_t*>(&shared + 1);
    while (part() >= plan.first_part[layer_ + 1]) ++layer_;
  }

  __device__ void run() {
    RowOfToken<> row_of_token;
    load_eight(first_, static_cast<int>(threadIdx.x) * 8);
    row_of_token.fetch(args_, layer_, token());
    const uint32_t largest = measure_x();
    constexpr int kSums = kMostRuns * kRunLanes * kSumDigits;
    static_assert(kSums == kEachThreads);
    shared_.sums[0][0][threadIdx.x] = 0;
    put_warp_max(Eight<T>::bits_of_largest(largest), shared_.largest);
    row_of_token.store(shared_.rows);
    __syncthreads();
    const int row = RowOfToken<>::find(args_, shared_.rows);
    if (row < 0) return;
    row_ = shared_.rows.words + row;
    const Widths widths(row_, v_columns(), args_.max_rank,
                        [](uint32_t count) { return (count + kRunLanes - 1) / kRunLanes; });
    if (widths.empty()) return;
    take_runs(widths.units());
    if (first_run_ >= end_run_) return;
    panel_words_ = widths.column_words() * kPanelBlocks;
    multiply_runs(widths);
  }

 private:
  __device__ __forceinline__ static int token() { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ static int part() { return static_cast<int>(blockIdx.x); }

  __device__ __forceinline__ void take_runs(int runs) {
    const int number = part() - plan_.first_part[layer_];
    if constexpr (kOneRun) {
      first_run_ = number, end_run_ = min(number + 1, runs);
    } else {
      const int parts = plan_.first_part[layer_ + 1] - plan_.first_part[layer_];
      int rest;
      first_run_ = divide(runs * number, parts, rest);
      end_run_ = divide(runs * number + runs, parts, rest);
    }
  }

  __device__ __forceinline__ void multiply_runs(const Widths& widths) {
    const int warp = threadIdx.x / 32;
    const RunPanel first = step(widths, {-1, warp - kEachWarps, {}});
    uint32_t words[2][kMaxBits];
    if (first.number < runs()) load(first, words);
    prefetch_panels(widths, first.run);
    const int own = kEachWarps - 1 - warp;  // the last warps have the fewest units
    Place own_run = {};
    ZPlace place = {0, 0};
    float scale = 0.0f;
    if (own < runs()) {
      own_run = kOneRun ? first.run : widths.find(first_run_ + own);
      if (has_component(own_run)) place = place_of_z(own_run), scale = load_scale(own_run);
    }
    int64_t sum_x = 0;  // of the thread's numbers
    const float unit = load_x(sum_x);
    __syncthreads();
    multiply_units(widths, first, words);
    put_warp_sum(sum_x, shared_.all_x, false);
    __syncthreads();
    if (own >= runs()) return;
    const int64_t all_x = sum_of_warps(shared_.all_x);
    if (place.position == place.end) return;
    const int64_t levels = 2 * codes(own) - int64_t{max_code(own_run.bits)} * all_x;
    put_z(place, scale * (static_cast<float>(levels) * unit));
  }

  // Every 16th one is a warp's.
  __device__ __forceinline__ void multiply_units(const Widths& widths, RunPanel at,
                                                 uint32_t (&words)[2][kMaxBits]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int8_t* column = planes_ + min(g % 4, kDigits - 1) * plan_.plane_bytes +
                           (g / 4 * kHalfBlocks + t) * kBlockCodes;
    int32_t sum[4] = {};
#pragma unroll 1
    while (at.number < runs()) {
      uint32_t x[kBlockFields];
      load_words(reinterpret_cast<const uint32_t*>(column + at.panel * kPanelCodes), x);
      for_width(at.run.bits,
                [&](auto width) { multiply_run<decltype(width)::value>(words, x, sum); });
      const RunPanel next = step(widths, at);
      if (next.number != at.number) add_sums(at.number, sum);
      at = next;
      if (at.number < runs()) load(at, words);
    }
  }

  // Rows g are in columns 0 .. 3, rows g + 8 in columns 4 .. 7: both are component g.
  __device__ __forceinline__ void add_sums(int number, int32_t (&sum)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int32_t* where = &shared_.sums[number][g][t % 2 * 2];
    atomicAdd(where, t < 2 ? sum[0] : sum[2]);
    atomicAdd(where + 1, t < 2 ? sum[1] : sum[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 0;
  }

  // --- units

  __device__ __forceinline__ int runs() const { return kOneRun ? 1 : end_run_ - first_run_; }

  // 16 further, panels first.
  __device__ __forceinline__ RunPanel step(const Widths& widths, RunPanel at) const {
    const int before = at.number;
    at.number = max(before, 0), at.panel += kEachWarps;
    if constexpr (kOneRun) {
      at.number = at.panel >= plan_.panels;
      if (before < 0) at.run = widths.find(first_run_);
    } else {
#pragma unroll 1
      for (; at.panel >= plan_.panels; at.panel -= plan_.panels) ++at.number;
      if (at.number != before && at.number < runs()) at.run = widths.find(first_run_ + at.number);
    }
    return at;
  }

  __device__ __forceinline__ static int lanes_of(const Place& run) {
    return min(run.count - run.unit * kRunLanes, kRunLanes);
  }

  // --- words

  __device__ __forceinline__ int blocks_of(int panel) const {
    return min(plan_.blocks - panel * kPanelBlocks, kPanelBlocks);
  }

  // Before a run, in one block of codes.
  __device__ __forceinline__ static int words_before(const Place& run) {
    return run.words + run.unit * kRunLanes * run.bits;
  }

  __device__ __forceinline__ const uint32_t* panel_words(int panel) const {
    return args_.arena + row_[kTableVOffset] + panel * panel_words_;
  }

  // In place of what is not there, the run's first block: multiplied with zeros, or in rows that
  // nobody reads.
  __device__ __forceinline__ void load(const RunPanel& unit, uint32_t (&words)[2][kMaxBits]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, blocks = blocks_of(unit.panel);
    const uint32_t* first = panel_words(unit.panel) + words_before(unit.run) * blocks;
    const int block = g * blocks + t, left = g < lanes_of(unit.run) ? blocks - t : 0;
    const int at[2] = {left > 0 ? block : 0, left > kHalfBlocks ? block + kHalfBlocks : 0};
    for_width(unit.run.bits,
              [&](auto width) { load_blocks<decltype(width)::value>(first, at, words); });
  }

  // What is read later, so that it comes from L2: of every panel a stretch, a line of 128 bytes a
  // lane.
  __device__ __forceinline__ void prefetch_panels(const Widths& widths, const Place& of) const {
    const int warp = threadIdx.x / 32;
    if (runs() == 1 && plan_.panels <= kEachWarps) return;
    const Place first = kOneRun ? of : widths.find(first_run_);
    const Place last = kOneRun ? of : widths.find(end_run_ - 1);
    const int begin = words_before(first), end = words_before(last) + lanes_of(last) * last.bits;
#pragma unroll 1
    for (int panel = runs() > 1 ? warp : warp + kEachWarps; panel < plan_.panels;
         panel += kEachWarps) {
      const int blocks = blocks_of(panel);
      const uint32_t* words = panel_words(panel);
#pragma unroll 1
      for (int i = begin * blocks + threadIdx.x % 32 * kLine; i < end * blocks; i += 32 * kLine) {
        prefetch(words + i);
      }
    }
  }

  // --- x

  __device__ __forceinline__ const T* x() const {
    return static_cast<const T*>(args_.x) + token() * args_.x_row_stride;
  }

  // first_ stays, since there are seldom more.
  __device__ __forceinline__ uint32_t measure_x() {
    constexpr int kStep = kEachThreads * 8;
    const int first = static_cast<int>(threadIdx.x) * 8;
    uint32_t largest = 0;
#pragma unroll 1
    for (int k = kStep; k < in_; k += kAtOnce * kStep) {
      Eight<T> eights[kAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) load_eight(eights[j], first + k + j * kStep);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) largest = eights[j].largest(largest);
    }
    return first_.largest(largest);
  }

  // Inputs k .. k + 7, if there are any.
  __device__ __forceinline__ void load_eight(Eight<T>& eight, int k) const {
    if constexpr (kVector) {
      if (k < in_) eight.load_vector(x() + k);
    } else {
      eight.load(x(), k, in_, false);
    }
  }

  // Digits of whole panels, zeros behind the last input; sums the numbers, returns their unit.
  __device__ __forceinline__ float load_x(int64_t& sum) {
    const Unit unit = unit_for(max_of_warps(shared_.largest, kEachWarps));
    const int eights = plan_.panels * kPanelCodes / 8;
    Eight<T> eight = first_;
#pragma unroll 1
    for (int i = threadIdx.x; i < eights;) {
      sum += store_digits(eight, unit, reinterpret_cast<uint32_t*>(planes_ + i * 8),
                          plan_.plane_bytes / 4);
      i += kEachThreads;
      eight = {};
      load_eight(eight, i * 8);
    }
    return unit.unit;
  }

  // --- z, a warp a run, a lane a component

  __device__ __forceinline__ static bool has_component(const Place& run) {
    return static_cast<int>(threadIdx.x % 32) < lanes_of(run);
  }

  __device__ __forceinline__ static int component_of(const Place& run) {
    return run.components + run.unit * kRunLanes + static_cast<int>(threadIdx.x % 32);
  }

  __device__ __forceinline__ ZPlace place_of_z(const Place& run) const {
    return find_in_z(row_ + kTableFirstUCount, component_of(run), [](int count, int) {
      return static_cast<int>(groups_of(static_cast<uint32_t>(count))) * kGroupLanes;
    });
  }

  __device__ __forceinline__ float load_scale(const Place& run) const {
    return __uint_as_float(args_.arena[row_[kTableScaleOffset] + component_of(run)]);
  }

  // And zeros in the padding.
  __device__ __forceinline__ void put_z(const ZPlace& place, float value) const {
    float* z = z_of(args_, layer_, token(), plan_.z_row);
#pragma unroll 1
    for (int i = place.position; i < place.end; ++i, value = 0.0f) z[place_in_groups(i)] = value;
  }

  __device__ __forceinline__ int64_t codes(int run) const {
    const int32_t* sums = shared_.sums[run][threadIdx.x % kRunLanes];
    return join_digits(sums[0], sums[1], sums[2]);
  }

  const DeltaGemmCudaArgs& args_;
  const DownPlan& plan_;
  DownShared& shared_;
  const int in_;
  int8_t* planes_;  // [digit][plane_bytes]
  const int64_t* row_ = nullptr;
  Eight<T> first_ = {};
  int layer_ = 0;
  int first_run_, end_run_;
  int panel_words_ = 0;
};

template <typename T, bool kVector, bool kOneRun>
__global__ void __launch_bounds__(kEachThreads, kEachPerMultiprocessor)
    each_token_down_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                           const __grid_constant__ DownPlan plan) {
  auto& shared = *static_cast<DownShared*>(dynamic_shared());
  wait_for_previous_kernel();
  let_next_kernel_start();  // only now: what it reads early is what came before this kernel
  EachTokenDown<T, kVector, kOneRun>(args, plan, shared).run();
}

template <bool kVector, bool kOneRun>
auto kernel_of(Element element) {
  return element == Element::kFloat  ? each_token_down_kernel<float, kVector, kOneRun>
         : element == Element::kHalf ? each_token_down_kernel<__half, kVector, kOneRun>
                                     : each_token_down_kernel<__nv_bfloat16, kVector, kOneRun>;
}

auto kernel_of(Element element, bool vector, bool one_run) {
  return vector    ? one_run ? kernel_of<true, true>(element) : kernel_of<true, false>(element)
         : one_run ? kernel_of<false, true>(element)
                   : kernel_of<false, false>(element);
}

// How many thread blocks a token has for each layer: one a run if it is the only token, else as V's
// share of the codes, were all ranks as those of one ratio.
void divide_parts(const DeltaGemmCudaArgs& args, const Device& device, DownPlan& plan) {
  const int runs = static_cast<int>(args.max_rank) / kRunLanes + kMaxBits;  // of a layer, at most
  const int least = (runs + kMostRuns - 1) / kMostRuns;
  const auto weight = [&](int layer) {
    const auto in = static_cast<double>(args.in), out = static_cast<double>(args.layers[layer].out);
    return in * out / (in + out);
  };
  double all = 0.0;
  for (int i = 0; i < args.layer_count; ++i) all += weight(i);
  const int parts = parts_of_token(args, device);
  for (int i = 0; i < args.layer_count; ++i) {
    const int own = args.tokens == 1
                        ? runs
                        : std::clamp(static_cast<int>(parts * weight(i) / all), least, runs);
    plan.first_part[i + 1] = plan.first_part[i] + own;
  }
}

}  // namespace

cudaError_t launch_each_token_down(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const int panels = static_cast<int>(panel_count(args.in));
  DownPlan plan = {panels,
                   static_cast<int>(block_count(args.in)),
                   panels * kPanelCodes + 16,
                   each_token_z_row(args),
                   {}};
  divide_parts(args, device, plan);
  const auto parts = static_cast<unsigned>(plan.first_part[args.layer_count]);
  const Grid grid = {dim3(parts, static_cast<unsigned>(args.tokens)), kEachThreads,
                     sizeof(DownShared) + kDigits * static_cast<size_t>(plan.plane_bytes)};
  const bool vector = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.in % 8 == 0 &&
                      (args.tokens == 1 || args.x_row_stride % 8 == 0);
  const auto kernel = kernel_of(args.element, vector, args.tokens == 1);
  return launch_overlapped(kernel, grid, device, stream, args, plan);
}

}  // namespace adamix
