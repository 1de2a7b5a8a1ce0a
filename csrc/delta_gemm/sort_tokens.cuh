#pragma once

#include <cuda_runtime.h>

#include "delta_gemm/delta_gemm_cuda.h"
#include "delta_gemm/many_tokens.cuh"

// Tokens sorted by slot and cut into tiles of one slot, by one thread block on the device: nothing
// of it is known where the kernels are launched.
namespace adamix {

constexpr int kTileTokens = 128;
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

// Sums over all threads before this one, and over all. Ends with a barrier.
__device__ inline int2 sum_before_thread(int2 value, int2* warp_sums, int2& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int2 sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int x = __shfl_up_sync(0xffffffffu, sum.x, distance);
    const int y = __shfl_up_sync(0xffffffffu, sum.y, distance);
    if (lane >= distance) sum.x += x, sum.y += y;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int2 before = {sum.x - value.x, sum.y - value.y};
  total = {0, 0};
  for (int other = 0; other < static_cast<int>(blockDim.x) / 32; ++other) {
    const int2 part = warp_sums[other];
    if (other < warp) before.x += part.x, before.y += part.y;
    total.x += part.x, total.y += part.y;
  }
  __syncthreads();
  return before;
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

// counters[slot of the token] += 1 for 32 tokens at a time; body(token, counter before it). Once
// a slot and warp: tokens of one slot, the usual case, would queue for its counter.
template <typename Body>
__device__ void count_tokens(const DeltaGemmCudaArgs& args, int* counters, Body body) {
  const int tokens = static_cast<int>(args.tokens), lane = threadIdx.x % 32;
  for (int first = 0; first < tokens; first += blockDim.x) {
    const int token = first + threadIdx.x;
    int slot = token < tokens ? args.routes.slots[token] : -1;
    if (slot >= args.capacity) slot = -1;
    slot = max(slot, -1);
    const unsigned same = __match_any_sync(0xffffffffu, slot);
    const int leader = __ffs(same) - 1;
    int before = 0;
    if (lane == leader && slot >= 0) before = atomicAdd(&counters[slot], __popc(same));
    before = __shfl_sync(0xffffffffu, before, leader) + __popc(same & ((1u << lane) - 1u));
    if (slot >= 0) body(token, before);
  }
}

// A counting sort. Tokens of a slot may come in any order: a token's result does not depend on it.
__device__ inline void sort_by_slots(const DeltaGemmCudaArgs& args, const SortTarget& target,
                                     int* counters, int2* warp_sums) {
  const int capacity = static_cast<int>(args.capacity);
  for (int slot = threadIdx.x; slot < capacity; slot += blockDim.x) counters[slot] = 0;
  __syncthreads();
  count_tokens(args, counters, [](int, int) {});
  __syncthreads();
  const int each = (capacity + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
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
    counters[slot] = at.x;  // from now on: where the slot's next token goes
    at.x += count, at.y += tiles_of(count);
  }
  if (threadIdx.x == 0) *target.tile_count = min(total.y, target.max_tiles);
  __syncthreads();
  count_tokens(args, counters, [&](int token, int at_order) { target.order[at_order] = token; });
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
