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
  return args.tokens == 1 && args.routes.slots != nullptr && args.max_rank <= kOneRank &&
         args.in <= kOneInputs;
}

__host__ __device__ constexpr uint32_t groups_of(uint32_t count) {
  return (count + kGroupLanes - 1) / kGroupLanes;
}

// fp32 z [layers, groups of 16] in the scratch of few tokens; numbers of a row.
inline int one_token_z_row(const DeltaGemmCudaArgs& args) {
  static_assert(kMaxPadding >= kMaxBits * (kGroupLanes - 1) + kQuadLanes - 1);
  return (static_cast<int>(args.max_rank) + kMaxPadding) / kQuadLanes * kQuadLanes;
}

// Both need is_one_token(args).
cudaError_t launch_one_token_down(const DeltaGemmCudaArgs& args, cudaStream_t stream);
cudaError_t launch_one_token_up(const DeltaGemmCudaArgs& args, cudaStream_t stream);

// So many rows of a table are read beside the slot: a thread a word, a way to memory less.
constexpr int kRowsBeside = kOneThreads / kTableColumns;

struct alignas(16) SharedRows {
  int64_t words[kOneThreads];  // the last one is the slot
};
constexpr int kSlotWord = kOneThreads - 1;
static_assert(kRowsBeside * kTableColumns <= kSlotWord);

// The row of the token's slot in a layer's table, in steps: fetch, store, a barrier, find.
class RowOfToken {
 public:
  __device__ __forceinline__ void fetch(const DeltaGemmCudaArgs& args, int layer) {
    const int i = threadIdx.x, capacity = static_cast<int>(args.capacity);
    const int64_t* rows = args.layers[layer].table;
    if (capacity <= kRowsBeside) {
      if (i < capacity * kTableColumns) word_ = rows[i];
    } else if (i < kTableColumns) {  // a way to memory more
      const int slot = args.routes.slots[0];
      if (slot >= 0 && slot < capacity) word_ = rows[int64_t{slot} * kTableColumns + i];
    }
    if (i == kSlotWord) word_ = static_cast<uint32_t>(args.routes.slots[0]);
  }

  __device__ __forceinline__ void store(SharedRows& shared) const {
    shared.words[threadIdx.x] = word_;
  }

  // Where the row begins; -1: there is no such slot.
  __device__ __forceinline__ static int find(const DeltaGemmCudaArgs& args,
                                             const SharedRows& shared) {
    const int slot = static_cast<int>(shared.words[kSlotWord]);
    const int capacity = static_cast<int>(args.capacity);
    if (slot < 0 || slot >= capacity) return -1;
    return capacity <= kRowsBeside ? slot * kTableColumns : 0;
  }

 private:
  int64_t word_ = 0;
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
  __device__ __forceinline__ Widths(const int64_t* row, int max_rank, Units units_of) {
    const int i = threadIdx.x % kMaxBits;
    count_ = static_cast<uint32_t>(row[kTableFirstCount + i]);
    const uint32_t units = units_of(count_) | groups_of(count_) << 16;
    const uint32_t words = count_ + (count_ * (kMaxBits - i) << 16);
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
    const uint32_t most = static_cast<uint32_t>(max_rank);  // no sum is too large if no count is
    empty_ = low(all_words_) == 0 || low(all_words_) > max_rank ||
             __ballot_sync(kWarp, count_ > most) != 0;
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
    return {kMaxBits - i,      static_cast<int>(__shfl_sync(kWarp, count_, i)),
            unit - low(units), high(words),
            low(words),        high(units)};
  }

  // The first group behind those of width 8 - i; all lanes ask together.
  __device__ __forceinline__ int end_of_width(int i) const {
    return __shfl_sync(kWarp, high(units_until_), i);
  }

 private:
  __device__ static int low(uint32_t pair) { return static_cast<int>(pair & 0xffffu); }
  __device__ static int high(uint32_t pair) { return static_cast<int>(pair >> 16); }

  uint32_t count_;
  bool empty_;
  uint32_t units_until_, units_before_, all_units_;  // units, groups
  uint32_t words_until_, words_before_, all_words_;  // components, words
};

static_assert(kOneRank * kMaxBits < 1 << 16);  // words, and what eight counts are together

template <int kBits, int kEach, int kBlocks>
__device__ __forceinline__ void load_pieces(const uint32_t* first, const int (&at)[kBlocks],
                                            uint32_t (&words)[kBlocks][kMaxBits]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int j = 0; j < kBits; j += kEach) {
      uint32_t some[kEach];
      load_words(first + at[n] * kBits + j, some);
#pragma unroll
      for (int k = 0; k < kEach; ++k) words[n][j + k] = some[k];
    }
  }
}

// Blocks of kBits words, so many blocks behind the first, as many words at a time as divide the
// width, if the first begins at 16 bytes.
template <int kBits, int kBlocks>
__device__ __forceinline__ void load_blocks(const uint32_t* first, const int (&at)[kBlocks],
                                            uint32_t (&words)[kBlocks][kMaxBits]) {
  constexpr int kEach = kBits % 4 == 0 ? 4 : kBits % 2 == 0 ? 2 : 1;
  if (kEach == 1 || reinterpret_cast<uintptr_t>(first) % 16 == 0) {
    load_pieces<kBits, kEach>(first, at, words);
  } else {
    load_pieces<kBits, 1>(first, at, words);
  }
}

}  // namespace adamix
