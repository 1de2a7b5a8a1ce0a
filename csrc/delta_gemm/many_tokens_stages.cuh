#pragma once

#include "common/cuda_instructions.cuh"
#include "delta_gemm/routes.cuh"
#include "delta_gemm/sort_tokens.cuh"
#include "delta_gemm/tile_product.cuh"

// The shared memory of down and up (many_tokens_pipeline.cuh), and how its stages go to and fro
// between producers and consumers:
//
//   shared memory   | stage 0 | stage 1 | .. | barriers, a task for each | scales, notes |
//   stage           | tile of 256 (128) tokens | tile of 128 components or outputs |
//
// A stage has two mbarriers:
//
//   full    each thread of the group that filled it arrives when its copies have landed, and each
//           warp for what its lanes have stored: so a group goes on before its copies are there
//   empty   each warp of the consumers arrives when it has read it
//
// For a warp, lane 0 arrives behind __syncwarp, which orders what the lanes did before. Tasks are
// written and read by threads that arrive themselves: racecheck need not follow more than that.
//
// wgmma reads through the asynchronous proxy, and a proxy fence must stand on the way from a write
// to it. Who stores fences before the arrival; for copies the consumers do behind the wait, for
// cp.async, unlike cp.async.bulk, is not said to write through that proxy.
namespace adamix {

constexpr int kTileRows = 128;  // components or outputs
constexpr int kGroupThreads = 128;
constexpr int kProducers = 2, kConsumers = 2;  // groups
constexpr int kThreads = (kProducers + kConsumers) * kGroupThreads;
static_assert(kTileTokens == kConsumers * kProductTokens, "each consumer group has its tokens");

constexpr int kMaxStages = 8;  // more fit nowhere
constexpr int kStageBytes = (kTileTokens + kTileRows) * kLineBytes;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kFullArrivals = kGroupThreads + kGroupWarps;
constexpr int kEmptyArrivals = kConsumers * kGroupWarps;

// Named barriers, of the groups; 0 is __syncthreads.
constexpr int kFirstConsumerBarrier = 1;
constexpr int kFirstProducerBarrier = kFirstConsumerBarrier + kConsumers;

constexpr int kLineStride = kGroupThreads / kLineChunks;  // lines whose chunks lie alike
constexpr int kThreadLines = kTileTokens / kLineStride;   // of which a producer thread has a chunk

// What a group of producers notes of a product.
struct alignas(16) Notes {
  uint32_t rows[kLineStride][kThreadLines];  // of x for the lines of a tile, see XTiles
  Counts counts;
  uint32_t m;  // see Weights
};

// What consumers must know of a product: in the first stage of it.
struct Task {
  int64_t scale_offset;
  int steps;  // 0: there are no more products
  int first_row, rank;
  int first_token, tokens;
  int layer, part;
};

struct BehindStages {
  uint64_t full[kMaxStages], empty[kMaxStages];
  Task tasks[kMaxStages];
  float scales[kConsumers][kTileRows];
  Notes notes[kProducers];
};

struct Stages {
  int count;
  uint32_t address;  // shared

  // In so many bytes.
  __device__ explicit Stages(int bytes) : address(shared_address(dynamic_shared())) {
    count = min((bytes - static_cast<int>(sizeof(BehindStages))) / kStageBytes, kMaxStages);
  }

  // By all threads, once.
  __device__ void begin() const {
    const int stage = threadIdx.x;
    if (stage < count) {
      mbarrier_init(full(stage), kFullArrivals);
      mbarrier_init(empty(stage), kEmptyArrivals);
    }
    __syncthreads();
  }

  __device__ uint32_t tokens(int stage) const { return address + stage * kStageBytes; }
  __device__ uint32_t weights(int stage) const { return tokens(stage) + kTileTokens * kLineBytes; }
  __device__ uint32_t full(int stage) const { return tokens(count) + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(kMaxStages + stage); }
  __device__ BehindStages& behind() const {
    char* shared = static_cast<char*>(dynamic_shared());
    return *reinterpret_cast<BehindStages*>(shared + count * kStageBytes);
  }
};

// Behind what its lanes did with a stage.
__device__ __forceinline__ void arrive_for_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

}  // namespace adamix
