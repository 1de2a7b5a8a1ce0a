#pragma once

#include "common/cuda_instructions.cuh"
#include "delta_gemm/many_tokens_stages.cuh"
#include "delta_gemm/many_tokens_weights.cuh"
#include "delta_gemm/tile_product.cuh"

// The two kinds of warps of down and up (many_tokens.cu):
//
//   producers   two groups of 4 warps, in turns: fill a stage with 64 columns (k) of both operands
//               x, z   16-byte asynchronous copies
//               V, U   packed words -> levels in bf16 (fp16 for fp16 x), exact
//   consumers   two groups of 4 warps, half of the tokens each: multiply stages as they come, then
//               write
//
// Tiles: tile_product.cuh. 256 tokens on Hopper, where a level that was decoded serves more of
// them. Stages, and how they go to and fro: many_tokens_stages.cuh.
namespace adamix {

// A producer thread has one chunk of every 16th line of a tile of tokens. A line without a token is
// left as it is: nobody reads what becomes of it.
__device__ __forceinline__ int thread_lines(int tokens, int thread) {
  return (tokens - thread / kLineChunks + kLineStride - 1) / kLineStride;
}
constexpr int kThreadLineBytes = kLineStride * kLineBytes;  // from one to the next
constexpr int kSomeLines = kThreadLines / kConsumers;       // copied at a time: of a consumer group

// x, row by row.
struct XRows {
  const char* data;
  int64_t row_bytes;
  int codes;         // numbers of a row
  const int* order;  // row of a sorted token
  int64_t count;     // of rows
  bool aligned;      // whether rows begin at multiples of 16 bytes, less than 2^32 of them away
};

// A thread's share of x's tiles of one product.
class XTiles {
 public:
  using Source = XRows;

  // A thread's share of the rows' places: in units of 16 bytes, or in rows that are not aligned.
  __device__ static void note(const XRows& rows, const Product& product, int thread, Notes& notes) {
    const auto units = static_cast<uint32_t>(rows.aligned ? rows.row_bytes / 16 : 1);
#pragma unroll
    for (int line = thread; line < kTileTokens; line += kGroupThreads) {
      const int row = line < product.tokens ? rows.order[product.first_token + line] : 0;
      notes.rows[line % kLineStride][line / kLineStride] =
          row >= 0 && row < rows.count ? row * units : 0;
    }
  }

  // From a step on, every kProducers'th.
  __device__ void begin(const XRows& rows, const Product& product, int step, int thread,
                        const Notes& notes) {
    const int line = thread / kLineChunks, chunk = thread % kLineChunks;
    lines_ = thread_lines(product.tokens, thread);
    rows_ = reinterpret_cast<const uint4*>(notes.rows[line]);
    k_ = step * kStepCodes + chunk * 8;
    source_ = rows.data + k_ * 2;
    target_ = 16 * chunk_of(line, chunk);
  }

  // 64 k, zeros behind the last, into the tile at a shared address.
  __device__ void copy(const XRows& rows, uint32_t tile) {
    const bool whole = rows.aligned && k_ / kStepCodes * kStepCodes + kStepCodes <= rows.codes;
    if (whole && lines_ % kSomeLines == 0) {
#pragma unroll 1
      for (int i = 0; i < lines_; i += kSomeLines) {
        copy_some(tile + target_ + i * kThreadLineBytes, rows_ + i / 4);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < lines_; ++i) {
        const uint32_t row = reinterpret_cast<const uint32_t*>(rows_)[i];
        const char* source = source_ + int64_t{row} * (rows.aligned ? 16 : rows.row_bytes);
        const uint32_t target = tile + target_ + i * kThreadLineBytes;
        if (whole) {
          copy_async_16(target, source);
        } else {
          store_shared(target, piece(rows, source));
        }
      }
    }
    k_ += kProducers * kStepCodes;
    source_ += kProducers * kStepCodes * 2;
  }

 private:
  __device__ void copy_some(uint32_t target, const uint4* rows) const {
    uint4 fours[kSomeLines / 4];
#pragma unroll
    for (int i = 0; i < kSomeLines / 4; ++i) fours[i] = rows[i];
#pragma unroll
    for (int i = 0; i < kSomeLines; ++i) {
      const uint4& four = fours[i / 4];
      const uint32_t row =
          i % 4 < 2 ? (i % 4 == 0 ? four.x : four.y) : (i % 4 == 2 ? four.z : four.w);
      copy_async_16(target + i * kThreadLineBytes, source_ + uint64_t{row} * 16);
    }
  }

  __device__ uint4 piece(const XRows& rows, const char* source) const {
    const auto* numbers = reinterpret_cast<const uint16_t*>(source);
    uint32_t pair[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (k_ + j < rows.codes) pair[j / 2] |= uint32_t{numbers[j]} << j % 2 * 16;
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }

  const uint4* rows_;  // shared, four at a time
  int lines_;
  const char* source_;
  int k_;
  uint32_t target_;
};

// z, tile by tile as it will lie in shared memory.
struct ZTilesInMemory {
  const char* data;    // of the layer
  int64_t step_bytes;  // of 64 k of all tokens
};

class ZTiles {
 public:
  using Source = ZTilesInMemory;

  __device__ static void note(const ZTilesInMemory&, const Product&, int, Notes&) {}

  __device__ void begin(const ZTilesInMemory& z, const Product& product, int step, int thread,
                        const Notes&) {
    lines_ = thread_lines(product.tokens, thread);
    target_ = 16 * thread;
    source_ = z.data + step * z.step_bytes + int64_t{product.first_token} * kLineBytes + target_;
  }

  __device__ void copy(const ZTilesInMemory& z, uint32_t tile) {
    int i = 0;
#pragma unroll 1
    for (; i + kSomeLines <= lines_; i += kSomeLines) {
#pragma unroll
      for (int j = 0; j < kSomeLines; ++j) copy_line(tile, i + j);
    }
#pragma unroll 1
    for (; i < lines_; ++i) copy_line(tile, i);
    source_ += kProducers * z.step_bytes;
  }

 private:
  __device__ void copy_line(uint32_t tile, int i) const {
    copy_async_16(tile + target_ + i * kThreadLineBytes, source_ + i * kThreadLineBytes);
  }

  int lines_;
  const char* source_;
  uint32_t target_;
};

// Producers walk the products, each of the groups all of them, and count the same steps.
template <typename T, bool kUp>
class Producer {
 public:
  __device__ Producer(const Stages& stages, int group)
      : stages_(stages), group_(group), notes_(stages.behind().notes[group]), stage_(group) {}

  using Tokens = std::conditional_t<kUp, ZTiles, XTiles>;
  using Source = typename Tokens::Source;

  // The source is read behind wait_for_previous_kernel().
  __device__ void run(const Product& product, const Source& source) {
    int step = product.first_step + (group_ + steps_) % kProducers;
    steps_ += product.last_step - product.first_step;  // at least one
    if (step >= product.last_step) return;
    begin(product, source, step);
    wait_for_previous_kernel();
    for (; step < product.last_step; step += kProducers) {
      take_stage();
      if (step == product.first_step) note_task(product);
      tokens_.copy(source, stages_.tokens(stage_));
      copies_arrive(stages_.full(stage_));
      weights_.store(stages_.weights(stage_));
      const bool more = step + kProducers < product.last_step;
      if (more) weights_.aim(product, notes_.counts, step + kProducers);
      give_stage();
      if (more) weights_.load();
    }
  }

  // At the end: a stage that says so.
  __device__ void finish() {
    wait_for_previous_kernel();
    if (steps_ % kProducers == group_) {
      take_stage();
      note_task(Product{});
      copies_arrive(stages_.full(stage_));
      give_stage();
    }
    commit_copies();
    wait_copies<0>();  // no thread ends while they are under way
  }

 private:
  __device__ void begin(const Product& product, const Source& source, int step) {
    const int thread = threadIdx.x % kGroupThreads;
    const auto meet = [&] { barrier_sync(kFirstProducerBarrier + group_, kGroupThreads); };
    meet();  // the notes of the product before are read
    if (thread == 0) notes_.counts = product.counts, notes_.m = weights_.kM;
    meet();
    weights_.begin(product, notes_.counts, notes_.m, thread);
    weights_.aim(product, notes_.counts, step);
    weights_.load();
    Tokens::note(source, product, thread, notes_);
    meet();
    tokens_.begin(source, product, step, thread, notes_);
  }

  // Waits until the next stage may be filled.
  __device__ void take_stage() { mbarrier_wait(stages_.empty(stage_), parity_); }

  // Copies may still be under way.
  __device__ void give_stage() {
    fence_shared_for_wgmma();
    arrive_for_warp(stages_.full(stage_));
    stage_ += kProducers;
    if (stage_ >= stages_.count) stage_ -= stages_.count, parity_ ^= 1;
  }

  __device__ void note_task(const Product& product) {
    if (threadIdx.x % kGroupThreads != 0) return;
    stages_.behind().tasks[stage_] = {product.scale_offset, product.last_step - product.first_step,
                                      product.first_row,    product.rank,
                                      product.first_token,  product.tokens,
                                      product.layer,        product.part};
  }

  const Stages stages_;
  const int group_;
  Notes& notes_;
  Weights<T, kUp> weights_;
  Tokens tokens_;
  int steps_ = 0;        // of all products so far
  int stage_;            // the next one
  uint32_t parity_ = 1;  // of the phase that ends when it is empty: so it is at first
};

template <typename T, bool kUp>
class Consumer {
 public:
  using Sums = TileProduct<T, !kUp>;

  __device__ Consumer(const Stages& stages, int group) : stages_(stages), group_(group) {}

  // All products there are. result_of(task).begin() comes as soon as there is time to wait,
  // .store(sums) at the end; neither where none of the tokens are this group's.
  template <typename ResultOf>
  __device__ void run(ResultOf result_of) {
    for (;;) {
      wait_for_stage();
      const Task task = read_task();
      if (group_ * kProductTokens < task.tokens) {
        multiply(task.steps, result_of(task));
      } else {
        pass(task.steps);
      }
      if (task.steps == 0) return;
    }
  }

 private:
  template <typename Result>
  __device__ void multiply(int steps, Result result) {
    Sums sums;
    start<true>(sums);
    result.begin();
    for (int step = 1; step < steps; ++step) {
      const int before = stage_;  // may still be read
      next_stage();
      wait_for_stage();
      start<false>(sums);
      sums.template wait<1>();
      arrive_for_warp(stages_.empty(before));
    }
    sums.template wait<0>();
    arrive_for_warp(stages_.empty(stage_));
    next_stage();
    result.store(sums);
  }

  template <bool kFirst>
  __device__ void start(Sums& sums) const {
    fence_shared_for_wgmma();
    sums.template start<kFirst>(stages_.tokens(stage_) + group_ * kProductTokens * kLineBytes,
                                stages_.weights(stage_));
  }

  __device__ void pass(int steps) {
#pragma unroll 1
    for (int step = 0; step < max(steps, 1); ++step) {
      if (step > 0) wait_for_stage();
      arrive_for_warp(stages_.empty(stage_));
      next_stage();
    }
  }

  __device__ void wait_for_stage() const { mbarrier_wait(stages_.full(stage_), parity_); }

  __device__ void next_stage() {
    if (++stage_ == stages_.count) stage_ = 0, parity_ ^= 1;
  }

  // Read by lane 0, which will arrive.
  __device__ Task read_task() const {
    Task task = {};
    if (threadIdx.x % 32 == 0) task = stages_.behind().tasks[stage_];
    const auto share = [](auto& number) { number = __shfl_sync(0xffffffffu, number, 0); };
    share(task.scale_offset), share(task.steps);
    share(task.first_row), share(task.rank);
    share(task.first_token), share(task.tokens);
    share(task.layer), share(task.part);
    return task;
  }

  const Stages stages_;
  const int group_;
  int stage_ = 0;
  uint32_t parity_ = 0;  // of the phase that ends when it is full
};

}  // namespace adamix
