#include "common/cuda_launch.cuh"
#include "delta_gemm/each_token_up_codes.cuh"
#include "delta_gemm/elements.cuh"

// y += U z where there are many outputs; see each_token.cuh. A thread block has a panel of U's
// lanes, 256 outputs, and all components. Its words lie side by side, and all of them that there is
// room for are on their way to shared memory while `down` still runs, as they are:
//
//   shared memory   row of the table, sums | z's digits, 3 planes | words of the panel
//
// The byte product (few_tokens_up_product.cuh) reads codes there and digits as its columns 0 1 2;
// each warp has every 8th run of 32 lanes, of wide codes 16. What bounds the time is that 8 warps
// are few: to have U in L2 already, brought there by `down`, saved nothing.
namespace adamix {
namespace {

constexpr int kWideThreads = 256;  // of 128 registers: half of them hold sums
constexpr int kWideWarps = kWideThreads / 32;
constexpr int kSumDigits = 4;                                // of an output: one is padding
constexpr int kBlockSums = kBlockCodes * kSumDigits + 4;     // 4: blocks begin in different banks
constexpr int kMostRunWords = kNarrowBits * up_lanes_of(1);  // for one block of codes
static_assert(kMostRunWords >= kMaxBits * up_lanes_of(kMaxBits));
static_assert(kWideThreads == kPanelCodes, "a thread an output");

struct WidePlan {
  int z_row;
  int plane_words;  // of a digit of z
  int room;         // words for one block of codes, of what is in shared memory at a time
  int first_panel[kMaxLayers + 1];
};

struct alignas(16) WideShared {
  SharedRows<kWideThreads> rows;
  int32_t sums[kPanelBlocks][kBlockSums];
  uint32_t largest[32];      // of each warp's values
  int64_t tops[kWideWarps];  // sums of each warp's numbers times the largest code of their width
};

template <typename T>
class EachTokenWideUp {
  using Row = RowOfToken<kWideThreads>;

 public:
  __device__ EachTokenWideUp(const DeltaGemmCudaArgs& args, const WidePlan& plan,
                             WideShared& shared)
      : args_(args), plan_(plan), shared_(shared) {
    planes_ = reinterpret_cast<uint32_t*>(&shared + 1);
    words_ = planes_ + kDigits * plan.plane_words;
    while (panel() >= plan.first_panel[layer_ + 1]) ++layer_;
    panel_ = panel() - plan.first_panel[layer_];
  }

  __device__ void run() {
    Row row_of_token;
    row_of_token.fetch(args_, layer_, token());
    zero_sums();
    row_of_token.store(shared_.rows);
    __syncthreads();
    const int row = Row::find(args_, shared_.rows);
    bool waited = false;
    if (row >= 0) {
      row_ = shared_.rows.words + row;
      const Widths widths(row_, u_columns(), args_.max_rank, [](uint32_t count) {
        const int bits = kMaxBits - static_cast<int>(threadIdx.x) % kMaxBits;
        return static_cast<uint32_t>(padded_count(static_cast<int>(count), bits) /
                                     up_lanes_of(bits));
      });
      waited = !widths.empty();
      if (waited) run_panel(widths);
    }
    // Not without waiting: else the kernel after could overtake `down`.
    if (!waited) wait_for_previous_kernel();
  }

 private:
  __device__ __forceinline__ static int token() { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ static int panel() { return static_cast<int>(blockIdx.x); }

  __device__ __forceinline__ void run_panel(const Widths& widths) {
    out_ = static_cast<int>(args_.layers[layer_].out);
    blocks_ = min(static_cast<int>(block_count(out_)) - panel_ * kPanelBlocks, kPanelBlocks);
    source_ =
        args_.arena + row_[kTableUOffset] + int64_t{panel_ * kPanelBlocks} * widths.column_words();
    int32_t sum[kBlockFields][2][4] = {};
    const int all = widths.units(),
              step = widths.column_words() <= plan_.room ? all : max(plan_.room / kMostRunWords, 1);
#pragma unroll 1
    for (int first = 0; first < all; first += step) {
      const int last = min(first + step, all);
      if (first > 0) __syncthreads();  // the words before are multiplied
      copy(widths, first, last);
      if (first == 0) prepare_z(widths);
      wait_copies<0>();
      __syncthreads();
      multiply(widths, first, last, sum);
    }
    add_sums(sum);
    put_warp_sum(tops_, shared_.tops, false);
    __syncthreads();
    tops_ = sum_of_warps(shared_.tops);
    add_to_y();
  }

  // --- words

  // Before a run, in one block of codes.
  __device__ __forceinline__ static int words_before(const Place& run) {
    return run.words + run.unit * up_lanes_of(run.bits) * run.bits;
  }

  __device__ __forceinline__ static int lanes_of(const Place& run) {
    return min(run.count - run.unit * up_lanes_of(run.bits), up_lanes_of(run.bits));
  }

  // Runs first .. last - 1 to the front of words_.
  __device__ __forceinline__ void copy(const Widths& widths, int first, int last) {
    begin_ = words_before(widths.find(first));
    const int end = last < widths.units() ? words_before(widths.find(last)) : widths.column_words();
    const uint32_t target = shared_address(words_);
    if (blocks_ == kPanelBlocks && reinterpret_cast<uintptr_t>(source_) % 16 == 0) {
      const uint32_t* from = source_ + begin_ * kPanelBlocks;
#pragma unroll 4
      for (int i = threadIdx.x * 4; i < (end - begin_) * kPanelBlocks; i += kWideThreads * 4) {
        copy_async_16(target + i * 4, from + i);
      }
    } else {
#pragma unroll 1
      for (int unit = first + static_cast<int>(threadIdx.x / 32); unit < last; unit += kWideWarps) {
        const Place run = widths.find(unit);
        const int before = words_before(run);
        Run shape = {};
        shape.set_shape(run.bits, lanes_of(run), 0);
        copy_uneven_stage(shape.shape, source_ + before * blocks_, blocks_,
                          target + (before - begin_) * kPanelBlocks * 4);
      }
    }
    commit_copies();
  }

  // --- z

  // z's digits. A barrier must follow.
  __device__ __forceinline__ void prepare_z(const Widths& widths) {
    wait_for_previous_kernel();
    const auto* z = reinterpret_cast<const float4*>(z_of(args_, layer_, token(), plan_.z_row));
    unit_ =
        store_z<kWideThreads>(z, widths, shared_.largest, planes_, plan_.plane_words, tops_, [&] {
          if (has_output()) y_ = *y();
        });
  }

  // --- product

  // Lanes behind the last of a width are any codes, times zeros of z or times none.
  __device__ __forceinline__ void multiply(const Widths& widths, int first, int last,
                                           int32_t (&sum)[kBlockFields][2][4]) {
    const int lane = threadIdx.x % 32;
    const uint32_t* plane = planes_ + min(lane / 4, kDigits - 1) * plan_.plane_words + lane % 4;
#pragma unroll 1
    for (int unit = first + static_cast<int>(threadIdx.x / 32); unit < last; unit += kWideWarps) {
      const Place run = widths.find(unit);
      const int group = run.unit * (up_lanes_of(run.bits) / kGroupLanes);  // of the width
      const uint32_t* z = plane + (run.groups + group) * kGroupQuads;
      const bool two = lanes_of(run) > kGroupLanes;
      const uint32_t z0 = z[0], z1 = two ? z[kGroupQuads] : 0;
      const uint32_t* words = words_ + (words_before(run) - begin_) * kPanelBlocks;
      for_width(run.bits,
                [&](auto bits) { multiply_up<decltype(bits)::value>(words, z0, z1, sum); });
    }
  }

  __device__ __forceinline__ void zero_sums() {
    static_assert(kWideThreads / kPanelBlocks == 32, "a warp a block");
#pragma unroll
    for (int i = 0; i < kBlockSums; i += 32) {
      const int at = i + static_cast<int>(threadIdx.x % 32);
      if (at < kBlockSums) shared_.sums[threadIdx.x / 32][at] = 0;
    }
  }

  // Of thread 4g + t columns 2t and 2t + 1 of block g's outputs.
  __device__ __forceinline__ void add_sums(const int32_t (&sum)[kBlockFields][2][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (t >= kSumDigits / 2) return;
    int32_t* where = &shared_.sums[g][t * 2];
#pragma unroll
    for (int field = 0; field < kBlockFields; ++field) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int output = field * kFieldCodes + i / 2;
        if (i % 2 == 0 || t == 0) {
          atomicAdd(where + output * kSumDigits + i % 2, sum[field][i / 4][i % 4]);
        }
      }
    }
  }
  static_assert(int64_t{255} * 128 * kEachRank < int64_t{1} << 31);

  // --- y, one output a thread

  __device__ __forceinline__ bool has_output() const {
    return panel_ * kPanelCodes + static_cast<int>(threadIdx.x) < out_;
  }

  __device__ __forceinline__ T* y() const {
    const DeltaLayer& layer = args_.layers[layer_];
    return static_cast<T*>(layer.y) + token() * layer.y_row_stride + panel_ * kPanelCodes +
           threadIdx.x;
  }

  __device__ __forceinline__ void add_to_y() {
    if (!has_output()) return;
    const int i = threadIdx.x;
    const int32_t* sums = &shared_.sums[i / kBlockCodes][i % kBlockCodes * kSumDigits];
    const int64_t levels = 2 * join_digits(sums[0], sums[1], sums[2]) - tops_;
    *y() = narrow<T>(widen(y_) + static_cast<float>(levels) * unit_);
  }

  const DeltaGemmCudaArgs& args_;
  const WidePlan& plan_;
  WideShared& shared_;
  uint32_t* planes_;  // [digit][plane_words]
  uint32_t* words_;   // of a panel of 8 blocks, from begin_ on
  int layer_ = 0, panel_ = 0;
  int out_ = 0, blocks_ = 0;
  int begin_ = 0;  // words before, for one block of codes
  const int64_t* row_ = nullptr;
  const uint32_t* source_ = nullptr;  // of the panel
  float unit_ = 0.0f;
  int64_t tops_ = 0;  // sum of all numbers times the largest code of their width
  T y_;               // before
};

template <typename T>
__global__ void __launch_bounds__(kWideThreads, kEachPerMultiprocessor)
    each_token_wide_up_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                              const __grid_constant__ WidePlan plan) {
  auto& shared = *static_cast<WideShared*>(dynamic_shared());
  let_next_kernel_start();
  EachTokenWideUp<T>(args, plan, shared).run();
}

auto kernel_of(Element element) {
  return element == Element::kFloat  ? each_token_wide_up_kernel<float>
         : element == Element::kHalf ? each_token_wide_up_kernel<__half>
                                     : each_token_wide_up_kernel<__nv_bfloat16>;
}

}  // namespace

cudaError_t launch_each_token_wide_up(const DeltaGemmCudaArgs& args, const Device& device,
                                      cudaStream_t stream) {
  WidePlan plan = {};
  const int panels = count_tiles(args, kWideShift, plan.first_panel);
  plan.z_row = each_token_z_row(args);
  plan.plane_words = plane_words_of(plan.z_row);
  const int fixed = static_cast<int>(sizeof(WideShared)) + kDigits * plan.plane_words * 4;
  const int share =
      (device.shared_bytes + kReservedBytes) / kEachPerMultiprocessor - kReservedBytes;
  // Of a run that is cut off at the end, what is behind it is read too.
  const int blocks_words = (share - fixed) / (kPanelBlocks * 4) - kMostRunWords;
  plan.room = std::max(blocks_words, kMostRunWords);
  const int bytes = fixed + (plan.room + kMostRunWords) * kPanelBlocks * 4;
  const Grid grid = {dim3(static_cast<unsigned>(panels), static_cast<unsigned>(args.tokens)),
                     kWideThreads, static_cast<size_t>(bytes)};
  return launch_overlapped(kernel_of(args.element), grid, device, stream, args, plan);
}

}  // namespace adamix
