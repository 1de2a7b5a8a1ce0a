#pragma once

#include <cuda_runtime.h>

#include "delta_gemm/delta_gemm_cuda.h"
#include "delta_gemm/many_tokens.cuh"

// Tokens sorted by slot and cut into tiles of one slot, by one thread block on the device: nothing
// of it is known where the kernels are launched.
namespace adamix {

// What a thread block of down and up takes at once; the host knows only the least of them.
constexpr int kLeastTileTokens = 128;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kTileTokens = 256;
#else
constexpr int kTileTokens = kLeastTileTokens;
#endif
constexpr int kSortThreads = 1024;

// Tokens order[first] .. order[first + count - 1] of one slot.
struct TokenTile {
  int slot;
  int first;
  int count;
};

struct SortedTokens {
  const int* order;        // [tokens]
  const TokenTile* tiles;  // [*tile_count]
  const int* tile_count;
};

// Where the sort writes.
struct SortTarget {
  int* order;
  TokenTile* tiles;
  int* tile_count;
  int max_tiles;
};

__device__ inline int2 sum_before_lane(int2 value) {
  const int lane = threadIdx.x % 32;
  int2 sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int x = __shfl_up_sync(0xffffffffu, sum.x, distance);
    const int y = __shfl_up_sync(0xffffffffu, sum.y, distance);
    if (lane >= distance) sum.x += x, sum.y += y;
  }
  return {sum.x - value.x, sum.y - value.y};
}

// Sums over all threads before this one, and over all. Ends with a barrier.
__device__ inline int2 sum_before_thread(int2 value, int2* warp_sums, int2& total) {
  static_assert(kSortThreads == 32 * 32, "a lane for each warp");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int2 before = sum_before_lane(value);
  if (lane == 31) warp_sums[warp] = {before.x + value.x, before.y + value.y};
  __syncthreads();
  const int2 of_warp = warp_sums[lane];
  const int2 warps = sum_before_lane(of_warp);
  total = {__shfl_sync(0xffffffffu, warps.x + of_warp.x, 31),
           __shfl_sync(0xffffffffu, warps.y + of_warp.y, 31)};
  const int2 sum = {before.x + __shfl_sync(0xffffffffu, warps.x, warp),
                    before.y + __shfl_sync(0xffffffffu, warps.y, warp)};
  __syncthreads();
  return sum;
}

__device__ inline void write_tiles(const SortTarget& target, int tile, int slot, int first,
                                   int count) {
  for (int done = 0; done < count; done += kTileTokens, ++tile) {
    if (tile < target.max_tiles) {
      target.tiles[tile] = {slot, first + done, min(kTileTokens, count - done)};
    }
  }
}

__device__ inline int tiles_of(int tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens;
}

// Tokens of a thread, 1024 apart: all their slots are on their way at once, and where there are no
// more they are read and counted once.
template <int kMost>
struct SomeTokens {
  static constexpr int kEach = kMost, kAll = kEach * kSortThreads;

  int slots[kEach];   // -1: none
  int before[kEach];  // the counter before the token

  __device__ void load(const DeltaGemmCudaArgs& args, int first) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = token_of(first, i);
      slots[i] = token < args.tokens ? args.routes.slots[token] : -1;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (slots[i] < 0 || slots[i] >= args.capacity) slots[i] = -1;
    }
  }

  // counters[slot] += 1 for every token. Once a slot and warp: tokens of one slot, the usual case,
  // would queue for its counter.
  __device__ void count(const DeltaGemmCudaArgs& args, int first, int* counters) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i * kSortThreads >= args.tokens) continue;  // all threads alike
      const unsigned same = __match_any_sync(0xffffffffu, slots[i]);
      const int leader = __ffs(same) - 1;
      int at = 0;
      if (lane == leader && slots[i] >= 0) at = atomicAdd(&counters[slots[i]], __popc(same));
      before[i] = __shfl_sync(0xffffffffu, at, leader) + __popc(same & ((1u << lane) - 1u));
    }
  }

  __device__ static int token_of(int first, int i) {
    return first + i * kSortThreads + static_cast<int>(threadIdx.x);
  }
};

// From counts of the slots to where their tokens begin; their tiles.
__device__ inline void place_slots(const SortTarget& target, int capacity, int* counters,
                                   int2* warp_sums) {
  const int each = (capacity + kSortThreads - 1) / kSortThreads;
  const int begin = min(capacity, static_cast<int>(threadIdx.x) * each);
  const int end = min(capacity, begin + each);
  int2 here = {0, 0}, total;  // tokens, tiles
  for (int slot = begin; slot < end; ++slot) {
    here.x += counters[slot], here.y += tiles_of(counters[slot]);
  }
  int2 at = sum_before_thread(here, warp_sums, total);
  for (int slot = begin; slot < end; ++slot) {
    const int count = counters[slot];
    write_tiles(target, at.y, slot, at.x, count);
    counters[slot] = at.x;
    at.x += count, at.y += tiles_of(count);
  }
  if (threadIdx.x == 0) *target.tile_count = min(total.y, target.max_tiles);
}

// A counting sort. Tokens of a slot may come in any order: a token's result does not depend on it.
// kFew: of a token a thread at most, in less code: it runs once, so that fetching it costs most.
template <bool kFew>
__device__ void sort_by_slots(const DeltaGemmCudaArgs& args, const SortTarget& target,
                              int* counters, int2* warp_sums) {
  using Some = SomeTokens<kFew ? 1 : 8>;
  const int capacity = static_cast<int>(args.capacity), tokens = static_cast<int>(args.tokens);
  const bool once = kFew || tokens <= Some::kAll;
  Some some;
  some.load(args, 0);
  for (int slot = threadIdx.x; slot < capacity; slot += kSortThreads) counters[slot] = 0;
  __syncthreads();
  for (int first = 0; first < tokens; first += Some::kAll) {
    if (!once) some.load(args, first);
    some.count(args, first, counters);
  }
  __syncthreads();
  place_slots(target, capacity, counters, warp_sums);
  __syncthreads();
  for (int first = 0; first < tokens; first += Some::kAll) {
    if (!once) {
      some.load(args, first);
      some.count(args, first, counters);
    }
#pragma unroll
    for (int i = 0; i < Some::kEach; ++i) {
      if (some.slots[i] < 0) continue;
      const int at = (once ? counters[some.slots[i]] : 0) + some.before[i];
      target.order[at] = Some::token_of(first, i);
    }
  }
}

// Segments are sorted already; order is token_indices itself.
__device__ inline void cut_segments(const DeltaGemmCudaArgs& args, const SortTarget& target,
                                    int2* warp_sums) {
  const TokenRoutes& routes = args.routes;
  int tiles = 0;
  for (int64_t first = 0; first < routes.segments; first += blockDim.x) {
    const int64_t segment = first + threadIdx.x;
    int slot = -1, start = 0, count = 0;
    if (segment < routes.segments) {
      slot = routes.segment_slots[segment];
      start = routes.token_starts[segment];
      count = routes.token_counts[segment];
      if (slot < 0 || slot >= args.capacity || start < 0 || start >= routes.indices) count = 0;
      count = max(0, min(count, static_cast<int>(routes.indices) - start));
    }
    int2 total;
    const int2 before = sum_before_thread({0, tiles_of(count)}, warp_sums, total);
    write_tiles(target, tiles + before.y, slot, start, count);
    tiles += total.y;
  }
  if (threadIdx.x == 0) *target.tile_count = min(tiles, target.max_tiles);
}

}  // namespace adamix
