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
//   stage       tile of 128 tokens | tile of 128 components or outputs     (tile_product.cuh)
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

// Rows of x or z.
struct Rows {
  const char* data;
  int64_t row_bytes;
  int64_t codes;     // numbers of a row
  const int* order;  // row of a sorted token; null: they are sorted
  int64_t count;     // of rows
  bool aligned;      // whether rows begin at multiples of 16 bytes, less than 2^32 of them away
};

// A thread's share of the token tiles of one product: one chunk of every 16th line.
class TokenTiles {
 public:
  __device__ void begin(const Rows& rows, const Product& product, int thread) {
    thread_ = thread;
    const auto units = static_cast<uint32_t>(rows.aligned ? rows.row_bytes / 16 : 1);
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      int row = -1;
      if (line_of(i) < product.tokens) {
        row = product.first_token + line_of(i);
        if (rows.order != nullptr) row = rows.order[row];
      }
      at_[i] = row >= 0 && row < rows.count ? row * units : kNone;
    }
  }

  // 64 k; what is in lines without a token does not matter, k behind the last is zero.
  __device__ void copy(const Rows& rows, int step, uint4* tile) const {
    const int chunk = thread_ % kLineChunks;
    if (rows.aligned && (step + 1) * kStepCodes <= rows.codes) {
      const auto* source =
          reinterpret_cast<const uint4*>(rows.data) + (step * kLineChunks + chunk);
      const uint32_t target = shared_address(tile + chunk_of(line_of(0), chunk));
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const int there = i * kLineStride * kLineChunks * 16;
        if (at_[i] != kNone) copy_async_16(target + there, source + at_[i]);
      }
    } else {
      copy_pieces(rows, step * kStepCodes + chunk * 8, tile + chunk_of(line_of(0), chunk));
    }
    commit_copies();
  }

 private:
  static constexpr int kLineStride = kGroupThreads / kLineChunks;  // lines whose chunks lie alike
  static constexpr int kLines = kTileTokens / kLineStride;
  static constexpr uint32_t kNone = 0xffffffffu;

  __device__ int line_of(int i) const { return thread_ / kLineChunks + i * kLineStride; }

  __device__ void copy_pieces(const Rows& rows, int k, uint4* target) const {
#pragma unroll 1
    for (int i = 0; i < kLines; ++i) {
      uint32_t at = kNone;
#pragma unroll
      for (int j = 0; j < kLines; ++j) at = i == j ? at_[j] : at;
      if (at == kNone) continue;
      const int64_t row = rows.aligned ? int64_t{at} * 16 : at * rows.row_bytes;
      const auto* numbers = reinterpret_cast<const uint16_t*>(rows.data + row);
      uint32_t pair[4] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (k + j < rows.codes) pair[j / 2] |= uint32_t{numbers[k + j]} << j % 2 * 16;
      }
      target[i * kLineStride * kLineChunks] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }

  int thread_;
  uint32_t at_[kLines];  // of the row: in units of 16 bytes, or in rows that are not aligned
};

// Producer and consumer walk the same products and count the same steps.
template <typename T, bool kUp>
class Producer {
 public:
  __device__ Producer(const Stages& stages, int group)
      : stages_(stages), group_(group), stage_(group) {}

  __device__ void run(const Product& product, const Rows& rows) {
    const int thread = threadIdx.x % kGroupThreads;
    int step = product.first_step + (group_ + steps_) % kProducers;
    steps_ += product.last_step - product.first_step;
    if (step >= product.last_step) return;
    weights_.begin(product, thread);
    weights_.load(product, step);
    tokens_.begin(rows, product, thread);
    for (; step < product.last_step; step += kProducers) {
      if (stages_.count == kProducers) hand_over();  // or it would wait for itself
      if (all_used_) barrier_sync(stages_.empty(stage_), kFullThreads);
      tokens_.copy(rows, step, stages_.tokens(stage_));
      weights_.template store<T>(stages_.weights(stage_));
      if (step + kProducers < product.last_step) weights_.load(product, step + kProducers);
      wait_copies<1>();  // of the stage before: its copies have had this long
      give_open_stage();
      open_stage_ = stage_;
      stage_ += kProducers;
      if (stage_ >= stages_.count) stage_ = group_, all_used_ = true;
    }
  }

  // At the end: all stages are given over, and every barrier is met by all.
  __device__ void finish() {
    hand_over();
    const int used = all_used_ ? stages_.count : stage_;
    for (int stage = group_; stage < used; stage += kProducers) {
      barrier_sync(stages_.empty(stage), kFullThreads);
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
  Weights<kUp> weights_;
  TokenTiles tokens_;
  int steps_ = 0;          // of all products so far
  int stage_;              // the next one
  bool all_used_ = false;  // whether it has been filled before
  int open_stage_ = -1;    // filled, its copies under way
};

template <typename T, bool kUp>
class Consumer {
 public:
  using Sums = TileProduct<T, !kUp>;

  __device__ Consumer(const Stages& stages, int group) : stages_(stages), group_(group) {}

  // Multiplies all steps of a product; result.load() as soon as there is time to wait for it, and
  // at the end result.store(sums). Both get this group's first row of tokens before.
  template <typename Result>
  __device__ void run(const Product& product, Result result) {
    const int first_row = group_ * kProductTokens;
    if (first_row >= product.tokens) return pass(product);
    Sums sums;
    int before = -1;  // the stage that may still be read
    for (int step = product.first_step; step < product.last_step; ++step) {
      barrier_sync(stages_.full(stage_), kFullThreads);
      sums.start(stages_.tokens(stage_) + chunk_of(first_row, 0), stages_.weights(stage_));
      if (before >= 0) {
        sums.template wait<1>();
        barrier_arrive(stages_.empty(before), kFullThreads);
      } else {
        result.begin(first_row);
      }
      before = stage_;
      next_stage();
    }
    sums.template wait<0>();
    if (before >= 0) barrier_arrive(stages_.empty(before), kFullThreads);
    result.store(sums);
  }

 private:
  // None of the tokens are this group's.
  __device__ void pass(const Product& product) {
    for (int step = product.first_step; step < product.last_step; ++step) {
      barrier_sync(stages_.full(stage_), kFullThreads);
      barrier_arrive(stages_.empty(stage_), kFullThreads);
      next_stage();
    }
  }

  __device__ void next_stage() { stage_ = stage_ + 1 == stages_.count ? 0 : stage_ + 1; }

  const Stages stages_;
  const int group_;
  int stage_ = 0;
};

}  // namespace adamix
