#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "common/cuda_instructions.cuh"
#include "common/cuda_launch.cuh"
#include "delta_gemm/delta_gemm_cuda.h"
#include "delta_gemm/fixed_point.cuh"
#include "delta_gemm/word_stream.cuh"

// delta_gemm of few tokens, each worked on alone. The words of one delta are read in less time than
// one way to memory takes, so what counts is how many such ways follow each other, and how many
// instructions stand between them. Two kernels, as for more tokens (few_tokens.cuh), of the same
// whole numbers and so with the same bits:
//
//   down   z = scale · V x      a thread block: runs of 8 components of a token and a layer
//   up     y += U z             a thread block: tiles of 32 to 128 outputs of a token, or, where
//                               there are many, a panel of 256 outputs
//
// Words go straight to registers, each thread's all at once. The slot, the tables and x are read
// side by side; a thread block is of one token, so one row of a table tells it what is its own:
//
//   down   slot, tables, x | words   | digits of x    | product | z
//   up     slot, tables    | words   | codes in bytes | z       | digits of z | product | y
//                          while `down` runs          |
//
// Tokens of one slot each read its words, all but the first from L2, and take its codes apart. That
// costs less than finding out which tokens have the same slot while there are not many.
//
// Z. Components in memory go by groups of 16, every width of U padded to whole groups with zeros;
// component 4i + j of a group is number 4j + i of 16: four components of one thread of `up`, a quad
// of which j is the number, lie side by side.
namespace adamix {

constexpr int kEachTokens = 16;             // of one launch
constexpr int64_t kEachSize = 200'000'000;  // tokens · in · out, where there are several
constexpr int kEachThreads = 512;
constexpr int kEachWarps = kEachThreads / 32;
constexpr int kEachPerMultiprocessor = 2;  // thread blocks
constexpr int kEachRank = 8191;            // two sums over components share a word; see Widths
constexpr int kEachInputs = 30 * 1024;     // their digits fit 99 KiB, what every device has
constexpr int kGroupLanes = 16;
constexpr int kQuadLanes = 4;
constexpr int kGroupQuads = kGroupLanes / kQuadLanes;

// Where it is faster: large matrices of several tokens are worked off at a better rate by the
// kernels of few_tokens.cuh, which take longer to begin.
inline bool is_each_token(const DeltaGemmCudaArgs& args) {
  int64_t size = 0;
  for (int i = 0; i < args.layer_count; ++i) size += args.tokens * args.in * args.layers[i].out;
  return (args.tokens == 1 || (args.tokens <= kEachTokens && size <= kEachSize)) &&
         args.max_rank <= kEachRank && args.in <= kEachInputs;
}

__host__ __device__ constexpr uint32_t groups_of(uint32_t count) {
  return (count + kGroupLanes - 1) / kGroupLanes;
}

// fp32 z [layers, tokens, groups of 16] in the scratch of few tokens; numbers of a row.
inline int each_token_z_row(const DeltaGemmCudaArgs& args) {
  static_assert(kMaxPadding >= kMaxBits * (kGroupLanes - 1) + kQuadLanes - 1);
  return (static_cast<int>(args.max_rank) + kMaxPadding) / kQuadLanes * kQuadLanes;
}

// Where a component stands, that is the i-th with all padding.
__device__ __forceinline__ int place_in_groups(int i) {
  const int group = i / kGroupLanes * kGroupLanes, number = i - group;
  return group + number % kGroupQuads * kQuadLanes + number / kGroupQuads;
}

__device__ __forceinline__ float* z_of(const DeltaGemmCudaArgs& args, int layer, int token,
                                       int z_row) {
  return static_cast<float*>(args.scratch) +
         (layer * static_cast<int>(args.tokens) + token) * z_row;
}

// Of a token: as many thread blocks as there is room for, divided among the tokens.
inline int parts_of_token(const DeltaGemmCudaArgs& args, const Device& device) {
  const int blocks = kEachPerMultiprocessor * device.multiprocessors;
  return std::max(blocks / static_cast<int>(args.tokens), 1);
}

constexpr int kWideShift = 3;  // tiles of 1 << 3 blocks, a panel, are each_token_wide_up.cu's

// Tiles of 1 << shift blocks, those of all layers one after the other.
inline int count_tiles(const DeltaGemmCudaArgs& args, int shift, int* first) {
  for (int i = 0; i < args.layer_count; ++i) {
    const int64_t each = int64_t{kBlockCodes} << shift;
    first[i + 1] = first[i] + static_cast<int>((args.layers[i].out + each - 1) / each);
  }
  return first[args.layer_count];
}

// Of `up`, what keeps its thread blocks busy for the least time: counted in that of a block of
// lanes, of which a tile costs about two more.
inline int tile_shift_of(const DeltaGemmCudaArgs& args, const Device& device) {
  const int parts = parts_of_token(args, device);
  int first[kMaxLayers + 1] = {}, best = 0, least = std::numeric_limits<int>::max();
  for (int shift = 0; shift <= kWideShift; ++shift) {
    const int rounds = (count_tiles(args, shift, first) + parts - 1) / parts;
    const int cost = rounds * ((1 << shift) + 2);
    if (cost < least) least = cost, best = shift;
  }
  return best;
}

// These need is_each_token(args), the last one wide tiles.
cudaError_t launch_each_token_down(const DeltaGemmCudaArgs& args, cudaStream_t stream);
cudaError_t launch_each_token_up(const DeltaGemmCudaArgs& args, cudaStream_t stream);
cudaError_t launch_each_token_wide_up(const DeltaGemmCudaArgs& args, const Device& device,
                                      cudaStream_t stream);

// A word a thread of the thread block; the last one is the slot.
template <int kThreads>
struct alignas(16) SharedRows {
  int64_t words[kThreads];
};

// The slot of a token that is in a segment, by one warp; -1: in none of them.
__device__ __noinline__ inline int slot_in_segments(const DeltaGemmCudaArgs& args, int token) {
  const TokenRoutes& routes = args.routes;
  const int lane = threadIdx.x % 32;
  const int64_t wanted = routes.first_token + token;
  for (int64_t first = 0; first < routes.indices; first += 32) {
    const int64_t mine = first + lane;
    const bool same = mine < routes.indices && routes.token_indices[mine] == wanted;
    for (uint32_t places = __ballot_sync(kWarp, same); places != 0; places &= places - 1) {
      const int64_t place = first + __ffs(places) - 1;
      for (int64_t segment = lane; segment - lane < routes.segments; segment += 32) {
        const bool there = segment < routes.segments;
        const int64_t start = there ? routes.token_starts[segment] : 0;
        const bool around =
            there && start >= 0 && start <= place && place < start + routes.token_counts[segment];
        const int slot = around ? routes.segment_slots[segment] : -1;
        const uint32_t found = __ballot_sync(kWarp, slot >= 0 && slot < args.capacity);
        if (found != 0) return __shfl_sync(kWarp, slot, __ffs(found) - 1);
      }
    }
  }
  return -1;
}

// The row of a token's slot in a layer's table, in steps: fetch, store, a barrier, find.
template <int kThreads = kEachThreads>
class RowOfToken {
  // So many rows of a table are read beside the slot: a thread a word, a way to memory less.
  static constexpr int kRowsBeside = kThreads / kTableColumns, kSlotWord = kThreads - 1;
  static_assert(kRowsBeside * kTableColumns <= kSlotWord);

 public:
  __device__ __forceinline__ void fetch(const DeltaGemmCudaArgs& args, int layer, int token) {
    const int i = threadIdx.x, capacity = static_cast<int>(args.capacity);
    const int64_t* rows = args.layers[layer].table;
    if (capacity <= kRowsBeside) {
      if (i < capacity * kTableColumns) word_ = rows[i];
    } else if (i < 32) {  // a way to memory more
      const int slot = slot_of(args, token);
      if (i < kTableColumns && slot >= 0 && slot < capacity) {
        word_ = rows[int64_t{slot} * kTableColumns + i];
      }
    }
    if (i / 32 == kSlotWord / 32) {
      const int slot = slot_of(args, token);
      if (i == kSlotWord) word_ = static_cast<uint32_t>(slot);
    }
  }

  __device__ __forceinline__ void store(SharedRows<kThreads>& shared) const {
    shared.words[threadIdx.x] = word_;
  }

  // Where the row begins; -1: there is no such slot.
  __device__ __forceinline__ static int find(const DeltaGemmCudaArgs& args,
                                             const SharedRows<kThreads>& shared) {
    const int slot = static_cast<int>(shared.words[kSlotWord]);
    const int capacity = static_cast<int>(args.capacity);
    if (slot < 0 || slot >= capacity) return -1;
    return capacity <= kRowsBeside ? slot * kTableColumns : 0;
  }

 private:
  __device__ __forceinline__ static int slot_of(const DeltaGemmCudaArgs& args, int token) {
    return args.routes.slots != nullptr ? args.routes.slots[token] : slot_in_segments(args, token);
  }

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

// The components of a slot by width of one factor's lanes, width 8 - i in lanes i, i + 8 ..; every
// warp has all of it. Sums over the widths share words two by two, 16 bits each.
class Widths {
 public:
  // row: of the table. units_of(count): of a width.
  template <typename Units>
  __device__ __forceinline__ Widths(const int64_t* row, FactorColumns factor, int64_t max_rank,
                                    Units units_of) {
    const int i = threadIdx.x % kMaxBits;
    const int other = kTableFirstVCount + kTableFirstUCount - factor.first_count;
    count_ = static_cast<uint32_t>(row[factor.first_count + i]);
    const uint32_t others = __reduce_add_sync(kWarp, static_cast<uint32_t>(row[other + i]));
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
             static_cast<uint32_t>(low(all_words_)) * (32 / kMaxBits) != others ||
             __ballot_sync(kWarp, count_ > most) != 0;
  }

  __device__ __forceinline__ bool empty() const { return empty_; }  // or wrong
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

  // The largest code of the width that a group has, 0 behind the last one; all lanes ask together.
  __device__ __forceinline__ int top_code_of(int group) const {
    int bits = kMaxBits;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      bits -= __shfl_sync(kWarp, high(units_until_), i) <= group;
    }
    return static_cast<int>(max_code(bits));
  }

 private:
  __device__ static int low(uint32_t pair) { return static_cast<int>(pair & 0xffffu); }
  __device__ static int high(uint32_t pair) { return static_cast<int>(pair >> 16); }

  uint32_t count_;
  bool empty_;
  uint32_t units_until_, units_before_, all_units_;  // units, groups
  uint32_t words_until_, words_before_, all_words_;  // components, words
};

static_assert(kEachRank * kMaxBits < 1 << 16);  // words, and what eight counts are together

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
