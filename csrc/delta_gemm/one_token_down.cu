#include "common/cuda_launch.cuh"
#include "delta_gemm/elements.cuh"
#include "delta_gemm/few_tokens_down_product.cuh"
#include "delta_gemm/one_token.cuh"

// z = scale · V x for one token; see one_token.cuh. A unit of work is a run of 8 components of one
// width: in a panel, a thread has two blocks of one of them, which are rows of a byte product as
// they lie, and a column of x's digits for each half of the panel:
//
//   thread 4g + t       | columns 0 1 2: digits of | columns 4 5 6: digits of
//                       | the first half of x      | the second half
//   row g: block t of component g      sums                 -
//   row g + 8: block 4 + t                -                sums
namespace adamix {
namespace {

constexpr int kRunLanes = 8;
constexpr int kHalfBlocks = kPanelBlocks / 2;
constexpr int kAtOnce = 4;     // vectors of x on their way to a thread
constexpr int kSumDigits = 4;  // of a component in shared memory: one is padding

struct DownPlan {
  int panels, blocks;  // of x
  int plane_bytes;     // of a digit of x: planes begin in different banks
  int z_row;
};

struct alignas(16) DownShared {
  SharedRows rows;
  int32_t sums[kRunLanes][kSumDigits];
  uint32_t largest[32];  // of each warp's values
};

// A thread's sums of a panel over levels, added to those before: of codes, and by the same
// operation of ones, since level = 2 * code - (2^b - 1).
template <int kBits>
__device__ __forceinline__ void multiply_run(const uint32_t (&words)[2][kMaxBits],
                                             const uint32_t (&x)[kBlockFields], int32_t (&sum)[4]) {
  int32_t sums[kFieldPairs][4] = {}, ones[4] = {};
#pragma unroll
  for (int m = 0; m < kFieldPairs; ++m) {
    const FieldPair pair = field_pair(kBits, m);
    mma_u8s8(sums[pair.sum], read_field<kBits>(words[0], pair.first, pair.at),
             read_field<kBits>(words[1], pair.first, pair.at),
             read_field<kBits>(words[0], pair.second, pair.at),
             read_field<kBits>(words[1], pair.second, pair.at), x[pair.first], x[pair.second]);
    mma_u8s8(ones, kEveryByte, kEveryByte, kEveryByte, kEveryByte, x[pair.first], x[pair.second]);
  }
  int32_t joined[4];
  join_kinds<kBits>(sums, joined);
  constexpr int kTop = static_cast<int>(max_code(kBits));
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += 2 * joined[i] - kTop * ones[i];
}
static_assert(int64_t{2} * 255 * 128 * kOneInputs < int64_t{1} << 31);

// kVector: x may be read 16 bytes at a time.
template <typename T, bool kVector>
class OneTokenDown {
 public:
  __device__ OneTokenDown(const DeltaGemmCudaArgs& args, const DownPlan& plan, DownShared& shared)
      : args_(args), plan_(plan), shared_(shared), in_(static_cast<int>(args.in)) {
    planes_ = reinterpret_cast<int8_t*>(&shared + 1);
  }

  __device__ void run() {
    RowOfToken row_of_token;
    load_eight(first_, static_cast<int>(threadIdx.x) * 8);
    row_of_token.fetch(args_, static_cast<int>(blockIdx.y));
    const uint32_t largest = measure_x();
    if (threadIdx.x < kRunLanes * kSumDigits) shared_.sums[0][threadIdx.x] = 0;
    put_warp_max(Eight<T>::bits_of_largest(largest), shared_.largest);
    row_of_token.store(shared_.rows);
    __syncthreads();
    const int row = RowOfToken::find(args_, shared_.rows);
    if (row < 0) return;
    row_ = shared_.rows.words + row;
    const Widths widths(row_, static_cast<int>(args_.max_rank),
                        [](uint32_t count) { return (count + kRunLanes - 1) / kRunLanes; });
    const int run = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32;
    if (widths.empty() || run >= widths.units()) return;
    run_ = widths.find(run);
    lanes_ = min(run_.count - run_.unit * kRunLanes, kRunLanes);
    panel_words_ = widths.column_words() * kPanelBlocks;
    uint32_t words[2][kMaxBits];
    if (warp < plan_.panels) load(warp, words);
    prefetch_panels(warp + kOneWarps);
    float* z = nullptr;
    float scale = 0.0f;
    if (warp == kOneWarps - 1) {  // the one with the fewest panels
      z = place_of_z();
      if (has_component()) scale = load_scale();
    }
    const float unit = load_x();
    __syncthreads();
    multiply_panels(words);
    __syncthreads();
    if (z != nullptr) *z = has_component() ? scale * (levels() * unit) : 0.0f;
  }

 private:
  __device__ __forceinline__ void multiply_panels(uint32_t (&words)[2][kMaxBits]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int panel = threadIdx.x / 32;
    const int8_t* column = planes_ + min(g % 4, kDigits - 1) * plan_.plane_bytes +
                           panel * kPanelCodes + (g / 4 * kHalfBlocks + t) * kBlockCodes;
    int32_t sum[4] = {};
#pragma unroll 1
    while (panel < plan_.panels) {
      uint32_t x[kBlockFields];
      load_words(reinterpret_cast<const uint32_t*>(column), x);
      for_width(run_.bits,
                [&](auto width) { multiply_run<decltype(width)::value>(words, x, sum); });
      column += kOneWarps * kPanelCodes;
      panel += kOneWarps;
      if (panel < plan_.panels) load(panel, words);
    }
    // Rows g in columns 0 .. 3, rows g + 8 in columns 4 .. 7: both are component g.
    int32_t* where = &shared_.sums[g][t % 2 * 2];
    atomicAdd(where, t < 2 ? sum[0] : sum[2]);
    atomicAdd(where + 1, t < 2 ? sum[1] : sum[3]);
  }

  // --- words

  __device__ __forceinline__ int blocks_of(int panel) const {
    return min(plan_.blocks - panel * kPanelBlocks, kPanelBlocks);
  }

  __device__ __forceinline__ const uint32_t* words_of(int panel, int blocks) const {
    return args_.arena + row_[kTableVOffset] + panel * panel_words_ +
           (run_.words + run_.unit * kRunLanes * run_.bits) * blocks;
  }

  // In place of what is not there, the run's first block: multiplied with zeros, or in rows that
  // nobody reads.
  __device__ __forceinline__ void load(int panel, uint32_t (&words)[2][kMaxBits]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, blocks = blocks_of(panel);
    const uint32_t* first = words_of(panel, blocks);
    const int block = g * blocks + t, left = g < lanes_ ? blocks - t : 0;
    const int at[2] = {left > 0 ? block : 0, left > kHalfBlocks ? block + kHalfBlocks : 0};
    for_width(run_.bits,
              [&](auto width) { load_blocks<decltype(width)::value>(first, at, words); });
  }

  // What the warp reads later, so that it comes from L2: a line of 128 bytes a lane.
  __device__ __forceinline__ void prefetch_panels(int panel) const {
    const int word = threadIdx.x % 32 * 32;
#pragma unroll 1
    for (; panel < plan_.panels; panel += kOneWarps) {
      const int blocks = blocks_of(panel);
      if (word < lanes_ * run_.bits * blocks) prefetch(words_of(panel, blocks) + word);
    }
  }

  // --- x

  __device__ __forceinline__ const T* x() const { return static_cast<const T*>(args_.x); }

  // first_ stays, since there are seldom more.
  __device__ __forceinline__ uint32_t measure_x() {
    constexpr int kStep = kOneThreads * 8;
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

  // Digits of whole panels, zeros behind the last input; returns their unit.
  __device__ __forceinline__ float load_x() {
    const Unit unit = unit_for(max_of_warps(shared_.largest, kOneWarps));
    const int eights = plan_.panels * kPanelCodes / 8;
    Eight<T> eight = first_;
#pragma unroll 1
    for (int i = threadIdx.x; i < eights;) {
      store_digits(eight, unit, reinterpret_cast<uint32_t*>(planes_ + i * 8),
                   plan_.plane_bytes / 4);
      i += kOneThreads;
      eight = {};
      load_eight(eight, i * 8);
    }
    return unit.unit;
  }

  // --- z, by one warp: lane 8i + c has component c of the run or, where that is the last of its
  // width, number c of those behind it in the group, which are zeros

  __device__ __forceinline__ bool has_component() const {
    return static_cast<int>(threadIdx.x % 32) < lanes_;
  }

  // Null: the lane has none.
  __device__ __forceinline__ float* place_of_z() const {
    constexpr int kRuns = kGroupLanes / kRunLanes;
    const int lane = threadIdx.x % 32, run = run_.unit % kRuns + lane / kRunLanes;
    const bool last = (run_.unit + 1) * kRunLanes >= run_.count;
    if (run >= kRuns || (lane >= kRunLanes && !last)) return nullptr;
    const int i = run * kRunLanes + lane % kRunLanes;  // of the group's components
    return static_cast<float*>(args_.scratch) + static_cast<int>(blockIdx.y) * plan_.z_row +
           (run_.groups + run_.unit / kRuns) * kGroupLanes + i % kGroupQuads * kQuadLanes +
           i / kGroupQuads;
  }

  __device__ __forceinline__ float load_scale() const {
    const int component = run_.components + run_.unit * kRunLanes + threadIdx.x % 32;
    return __uint_as_float(args_.arena[row_[kTableScaleOffset] + component]);
  }

  __device__ __forceinline__ float levels() const {
    const int32_t* sums = shared_.sums[threadIdx.x % kRunLanes];
    return static_cast<float>(join_digits(sums[0], sums[1], sums[2]));
  }

  const DeltaGemmCudaArgs& args_;
  const DownPlan& plan_;
  DownShared& shared_;
  const int in_;
  int8_t* planes_;  // [digit][plane_bytes]
  const int64_t* row_ = nullptr;
  Eight<T> first_ = {};
  Place run_;
  int lanes_ = 0, panel_words_ = 0;
};

template <typename T, bool kVector>
__global__ void __launch_bounds__(kOneThreads, 2)
    one_token_down_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                          const __grid_constant__ DownPlan plan) {
  auto& shared = *static_cast<DownShared*>(dynamic_shared());
  wait_for_previous_kernel();
  let_next_kernel_start();  // only now: what it reads early is what came before this kernel
  OneTokenDown<T, kVector>(args, plan, shared).run();
}

template <bool kVector>
auto kernel_of(Element element) {
  return element == Element::kFloat  ? one_token_down_kernel<float, kVector>
         : element == Element::kHalf ? one_token_down_kernel<__half, kVector>
                                     : one_token_down_kernel<__nv_bfloat16, kVector>;
}

}  // namespace

cudaError_t launch_one_token_down(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const int panels = static_cast<int>(panel_count(args.in));
  const DownPlan plan = {panels, static_cast<int>(block_count(args.in)), panels * kPanelCodes + 16,
                         one_token_z_row(args)};
  const int runs = static_cast<int>(args.max_rank) / kRunLanes + kMaxBits;  // at most
  const Grid grid = {dim3(runs, args.layer_count), kOneThreads,
                     sizeof(DownShared) + kDigits * static_cast<size_t>(plan.plane_bytes)};
  const bool vector = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.in % 8 == 0;
  const auto kernel = vector ? kernel_of<true>(args.element) : kernel_of<false>(args.element);
  return launch_overlapped(kernel, grid, device, stream, args, plan);
}

}  // namespace adamix
