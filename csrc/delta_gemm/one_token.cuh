#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common/cuda_instructions.cuh"
#include "delta_gemm/delta_gemm_cuda.h"
#include "delta_gemm/fixed_point.cuh"
#include "delta_gemm/word_stream.cuh"

// delta_gemm of a single token. Its words are read in less time than one way to memory takes, so
// what counts is how many such ways follow each other, and how many instructions stand between
// them. Two kernels, as for few tokens (few_tokens.cuh), of the same whole numbers and so with the
// same bits:
//
//   down   z = scale · V x      a thread block: 8 components of a layer, a warp every 16th panel
//   up     y += U z             a thread block: 32 to 256 outputs of a layer, all components
//
// Words go straight to registers, each thread's all at once. The slot, the tables and x are read
// side by side; a thread block is of one layer, so one row of a table tells it what is its own:
//
//   down   slot, tables, x | words   | digits of x    | product | z
//   up     slot, tables    | words   | codes in bytes | z       | digits of z | product | y
//                          while `down` runs          |
//
// Z. Components in memory go by groups of 16, every width padded to whole groups with zeros;
// component 4i + j of a group is number 4j + i of 16: four components of one thread of `up`, a quad
// of which j is the number, lie side by side.
namespace adamix {

constexpr int kOneThreads = 512;
constexpr int kOneWarps = kOneThreads / 32;
constexpr int kOneRank = 8191;         // two sums over components share a word; see Widths
constexpr int kOneInputs = 30 * 1024;  // their digits fit 99 KiB, what every device has
constexpr int kGroupLanes = 16;
constexpr int kQuadLanes = 4;
constexpr int kGroupQuads = kGroupLanes / kQuadLanes;

inline bool is_one_token(const DeltaGemmCudaArgs& args) {
  return args.tokens == 1 && args.max_rank <= kOneRank && args.in <= kOneInputs;
}

__host__ __device__ constexpr int groups_of(int count) {
  return (count + kGroupLanes - 1) / kGroupLanes;
}

// fp32 z [layers, groups of 16]: no more than few tokens' runs.
static_assert(kMaxPadding >= kMaxBits * (kGroupLanes - 1) + kQuadLanes - 1);

__device__ __forceinline__ float* one_token_z(const DeltaGemmCudaArgs& args, int layer) {
  const int row = (static_cast<int>(args.max_rank) + kMaxPadding) / kQuadLanes * kQuadLanes;
  return static_cast<float*>(args.scratch) + layer * row;
}

// Both need is_one_token(args).
cudaError_t launch_one_token_down(const DeltaGemmCudaArgs& args, cudaStream_t stream);
cudaError_t launch_one_token_up(const DeltaGemmCudaArgs& args, cudaStream_t stream);

// So many rows of a table are read beside the slot: a thread a word, a way to memory less.
constexpr int kRowsBeside = kOneThreads / kTableColumns;

struct alignas(16) SharedRows {
  int64_t words[kOneThreads];
  int slot;
};

// The token's slot where there are segments; ends with a barrier. Kept out of the way of slots.
__device__ __noinline__ inline int slot_in_segments(const TokenRoutes& routes, int64_t capacity,
                                                    SharedRows& shared) {
  if (threadIdx.x == 0) shared.slot = -1;
  __syncthreads();
#pragma unroll 1
  for (int64_t s = threadIdx.x; s < routes.segments; s += kOneThreads) {
    const int slot = routes.segment_slots[s];
    const int64_t first = routes.token_starts[s];
    if (slot < 0 || slot >= capacity || first < 0) continue;
    const int64_t end = min(first + routes.token_counts[s], routes.indices);
#pragma unroll 1
    for (int64_t i = first; i < end; ++i) {
      if (routes.token_indices[i] == routes.first_token) shared.slot = slot;
    }
  }
  __syncthreads();
  return shared.slot;
}

// The row of the token's slot in a layer's table, in two steps, a barrier between them.
class RowOfToken {
 public:
  __device__ __forceinline__ void fetch(const DeltaGemmCudaArgs& args, int layer,
                                        SharedRows& shared) {
    const int capacity = static_cast<int>(args.capacity);
    slot_ = args.routes.slots != nullptr ? args.routes.slots[0]
                                         : slot_in_segments(args.routes, capacity, shared);
    const int64_t* rows = args.layers[layer].table;
    beside_ = capacity <= kRowsBeside;
    int words = capacity * kTableColumns;
    if (!beside_) {  // a way to memory more
      there_ = slot_ >= 0 && slot_ < capacity;
      words = there_ ? kTableColumns : 0;
      rows += int64_t{slot_} * kTableColumns;
    }
    if (static_cast<int>(threadIdx.x) < words) word_ = rows[threadIdx.x];
  }

  __device__ __forceinline__ void store(SharedRows& shared) const {
    shared.words[threadIdx.x] = word_;
  }

  // Null: there is no such slot.
  __device__ __forceinline__ const int64_t* row(const DeltaGemmCudaArgs& args,
                                                const SharedRows& shared) const {
    if (!beside_) return there_ ? shared.words : nullptr;
    const bool there = slot_ >= 0 && slot_ < static_cast<int>(args.capacity);
    return there ? shared.words + slot_ * kTableColumns : nullptr;
  }

 private:
  int64_t word_ = 0;
  int slot_ = -1;
  bool beside_ = true, there_ = false;
};

// A width among those of a slot, and a unit of work among the width's.
struct Place {
  int bits;
  int count;  // components of the width
  int unit;
  // Before the width: words for one block of codes, components, groups.
  int words, components, groups;
};

// The components of a slot by width, width 8 - i in lanes i, i + 8 ..; every warp has all of it.
// Sums over the widths share words two by two, 16 bits each.
class Widths {
 public:
  // units_of(count): of a width.
  template <typename Units>
  __device__ __forceinline__ Widths(const int64_t* row, int64_t max_rank, Units units_of) {
    const int i = threadIdx.x % kMaxBits;
    count_ = static_cast<int>(row[kTableFirstCount + i]);
    const bool once = threadIdx.x % 32 < kMaxBits;
    const int rank = __reduce_add_sync(kWarp, once ? min(count_, 1 << 24) : 0);
    empty_ = rank == 0 || rank > max_rank;
    const uint32_t units = pair(units_of(count_), groups_of(count_));
    const uint32_t words = pair(count_, count_ * (kMaxBits - i));
    units_until_ = units, words_until_ = words;
#pragma unroll
    for (int distance = 1; distance < kMaxBits; distance *= 2) {
      const uint32_t more_units = __shfl_up_sync(kWarp, units_until_, distance, kMaxBits);
      const uint32_t more_words = __shfl_up_sync(kWarp, words_until_, distance, kMaxBits);
      if (i >= distance) units_until_ += more_units, words_until_ += more_words;
    }
    units_before_ = units_until_ - units, words_before_ = words_until_ - words;
    all_units_ = __shfl_sync(kWarp, units_until_, kMaxBits - 1);
    all_words_ = __shfl_sync(kWarp, words_until_, kMaxBits - 1);
  }

  __device__ __forceinline__ bool empty() const { return empty_; }  // or too large
  __device__ __forceinline__ int units() const { return low(all_units_); }
  __device__ __forceinline__ int groups() const { return high(all_units_); }
  __device__ __forceinline__ int column_words() const { return high(all_words_); }

  // Of unit 0 <= unit < units(); all lanes ask together.
  __device__ __forceinline__ Place find(int unit) const {
    const int i = __ffs(__ballot_sync(kWarp, unit < low(units_until_))) - 1;
    const uint32_t units = __shfl_sync(kWarp, units_before_, i);
    const uint32_t words = __shfl_sync(kWarp, words_before_, i);
    return {kMaxBits - i, __shfl_sync(kWarp, count_, i), unit - low(units), high(words), low(words),
            high(units)};
  }

  // The first group behind those of width 8 - i; all lanes ask together.
  __device__ __forceinline__ int end_of_width(int i) const {
    return __shfl_sync(kWarp, high(units_until_), i);
  }

 private:
  __device__ static uint32_t pair(int low, int high) {
    return static_cast<uint32_t>(low) + (static_cast<uint32_t>(high) << 16);
  }
  __device__ static int low(uint32_t pair) { return static_cast<int>(pair & 0xffffu); }
  __device__ static int high(uint32_t pair) { return static_cast<int>(pair >> 16); }

  int count_;
  bool empty_;
  uint32_t units_until_, units_before_, all_units_;  // units, groups
  uint32_t words_until_, words_before_, all_words_;  // components, words
};

static_assert(kOneRank * kMaxBits < 1 << 16);

template <int kEach, int kBlocks>
__device__ __forceinline__ void load_blocks(const uint32_t* source, int stride, int count, int bits,
                                            uint32_t (&words)[kBlocks][kMaxBits]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n, source += stride) {
    const int end = n < count ? bits : 0;
#pragma unroll
    for (int j = 0; j < kMaxBits; j += kEach) {
      if (j >= end) continue;
      uint32_t some[kEach];
      load_words(source + j, some);
#pragma unroll
      for (int k = 0; k < kEach; ++k) words[n][j + k] = some[k];
    }
  }
}

// Blocks of `bits` words, `stride` words apart, `count` of them; the rest is left as it is. As many
// words at a time as divide the width; aligned: whether the first begins at 16 bytes, but for whole
// blocks.
template <int kBlocks>
__device__ __forceinline__ void load_blocks(const uint32_t* source, int stride, int count, int bits,
                                            bool aligned, uint32_t (&words)[kBlocks][kMaxBits]) {
  if (aligned && bits % 4 == 0) {
    load_blocks<4>(source, stride, count, bits, words);
  } else if (aligned && bits % 2 == 0) {
    load_blocks<2>(source, stride, count, bits, words);
  } else {
    load_blocks<1>(source, stride, count, bits, words);
  }
}

__device__ __forceinline__ bool is_aligned(const uint32_t* words) {
  return reinterpret_cast<uintptr_t>(words) % 16 == 0;
}

}  // namespace adamix
