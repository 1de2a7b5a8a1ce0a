#pragma once

#include "common/cuda_instructions.cuh"
#include "delta_gemm/many_tokens_weights.cuh"
#include "delta_gemm/sort_tokens.cuh"
#include "delta_gemm/tile_product.cuh"

// The two kinds of warps of down and up (many_tokens.cu):
//
//   producers   two groups of 4 warps, in turns: fill a stage with 64 columns (k) of both operands
//               x, z   16-byte asynchronous copies
//               V, U   packed words -> levels in bf16 (fp16 for fp16 x), exact
//   consumers   two groups of 4 warps, 64 tokens each: multiply stages as they come, then write
//
//   stage       [128 tokens][64 k] | [128 components or outputs][64 k]     (tile_product.cuh)
//
// A stage goes to and fro between them by two named barriers, full and empty.
namespace adamix {

constexpr int kTileRows = 128;  // components or outputs
constexpr int kGroupThreads = 128;
constexpr int kProducers = 2, kConsumers = 2;  // groups
constexpr int kThreads = (kProducers + kConsumers) * kGroupThreads;
static_assert(kTileTokens == kConsumers * kProductTokens, "each consumer group has its tokens");

constexpr int kMaxStages = 6;  // a multiple of kProducers, so that a stage always has the same
constexpr int kStageBytes = 2 * kTileChunks * 16;
constexpr int kFullThreads = (1 + kConsumers) * kGroupThreads;  // at full and empty barriers
constexpr int kConsumerThreads = kConsumers * kGroupThreads;

// Named barriers; 0 is __syncthreads.
constexpr int kConsumerBarrier = 1;

struct Stages {
  int count;

  __device__ uint4* tokens(int stage) const {
    return static_cast<uint4*>(dynamic_shared()) + stage * 2 * kTileChunks;
  }
  __device__ uint4* weights(int stage) const { return tokens(stage) + kTileChunks; }
  __device__ int full(int stage) const { return 2 + stage; }
  __device__ int empty(int stage) const { return 2 + kMaxStages + stage; }
  __device__ float* behind() const { return reinterpret_cast<float*>(tokens(count)); }
};

// x: rows of tokens wherever they are, [tokens, in].
struct XRows {
  const char* data;
  int64_t row_bytes;
  int64_t codes;
  const int* order;
  int64_t tokens;
  bool aligned;  // whether 16 bytes at a time may be copied

  __device__ const char* row(int sorted) const {
    const int token = order[sorted];
    return token >= 0 && token < tokens ? data + token * row_bytes : nullptr;
  }
};

// z: sorted, padded with zeros.
struct ZRows {
  const char* data;
  int64_t row_bytes;
  int64_t codes;
  static constexpr bool aligned = true;

  __device__ const char* row(int sorted) const { return data + sorted * row_bytes; }
};

// 64 k of the tile's tokens; rows that are not there stay as they are, k behind the last is zero.
template <typename Rows>
__device__ inline void copy_tokens(const Rows& rows, const Product& product, int step, int thread,
                                   uint4* tile) {
  constexpr int kRowChunks = kStepCodes / 8;
  for (int i = thread; i < product.tokens * kRowChunks; i += kGroupThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    const char* source = rows.row(product.first_token + row);
    if (source == nullptr) continue;
    const int64_t k = int64_t{step} * kStepCodes + chunk * 8;
    uint4* target = tile + chunk_of(row, chunk);
    if (rows.aligned && k + 8 <= rows.codes) {
      copy_async_16(shared_address(target), source + k * 2);
      continue;
    }
    uint32_t pair[4] = {};
    const auto* numbers = reinterpret_cast<const uint16_t*>(source);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (k + j < rows.codes) pair[j / 2] |= uint32_t{numbers[k + j]} << j % 2 * 16;
    }
    *target = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
  commit_copies();
}

// Producer and consumer walk the same products and count the same steps.
template <typename T, typename Weights>
class Producer {
 public:
  __device__ Producer(const Stages& stages, int group)
      : stages_(stages), group_(group), thread_(threadIdx.x % kGroupThreads) {}

  template <typename Rows>
  __device__ void run(const Product& product, const Rows& rows) {
    weights_.begin(product, thread_);
    int step = product.first_step + (group_ + kProducers - step_ % kProducers) % kProducers;
    const int count = product.last_step - product.first_step, begin = step_;
    if (step < product.last_step) weights_.load(product, step);
    for (; step < product.last_step; step += kProducers) {
      const int number = begin + step - product.first_step, stage = number % stages_.count;
      if (stages_.count == kProducers) hand_over();  // or it would wait for itself
      if (number >= stages_.count) barrier_sync(stages_.empty(stage), kFullThreads);
      copy_tokens(rows, product, step, thread_, stages_.tokens(stage));
      weights_.template store<T>(stages_.weights(stage), thread_);
      if (step + kProducers < product.last_step) weights_.load(product, step + kProducers);
      wait_copies<1>();  // of the stage before: its copies have had this long
      give_open_stage();
      open_stage_ = stage;
    }
    step_ = begin + count;
  }

  // At the end: all stages are given over, and every barrier is met by all.
  __device__ void finish() {
    hand_over();
    for (int number = max(0, step_ - stages_.count); number < step_; ++number) {
      if (number % kProducers == group_) {
        barrier_sync(stages_.empty(number % stages_.count), kFullThreads);
      }
    }
  }

 private:
  __device__ void hand_over() {
    wait_copies<0>();
    give_open_stage();
  }

  __device__ void give_open_stage() {
    if (open_stage_ < 0) return;
    fence_shared_for_wgmma();
    barrier_arrive(stages_.full(open_stage_), kFullThreads);
    open_stage_ = -1;
  }

  const Stages stages_;
  const int group_;
  const int thread_;
  Weights weights_;
  int step_ = 0;         // of all products so far
  int open_stage_ = -1;  // filled, its copies under way
};

template <typename T>
class Consumer {
 public:
  __device__ Consumer(const Stages& stages, int group) : stages_(stages), group_(group) {}

  // Multiplies all steps of a product, then store(sums, this group's first row of tokens).
  template <typename Store>
  __device__ void run(const Product& product, Store store) {
    const int first_row = group_ * kProductTokens;
    if (first_row >= product.tokens) return pass(product);
    TileProduct<T> sums;
    int before = -1;  // the stage that may still be read
    for (int step = product.first_step; step < product.last_step; ++step, ++step_) {
      const int stage = step_ % stages_.count;
      barrier_sync(stages_.full(stage), kFullThreads);
      sums.start(stages_.tokens(stage) + chunk_of(first_row, 0), stages_.weights(stage));
      if (before >= 0) {
        sums.template wait<1>();
        barrier_arrive(stages_.empty(before), kFullThreads);
      }
      before = stage;
    }
    sums.template wait<0>();
    if (before >= 0) barrier_arrive(stages_.empty(before), kFullThreads);
    store(sums, first_row);
  }

 private:
  // None of the tokens are this group's.
  __device__ void pass(const Product& product) {
    for (int step = product.first_step; step < product.last_step; ++step, ++step_) {
      barrier_sync(stages_.full(step_ % stages_.count), kFullThreads);
      barrier_arrive(stages_.empty(step_ % stages_.count), kFullThreads);
    }
  }

  const Stages stages_;
  const int group_;
  int step_ = 0;
};

}  // namespace adamix
