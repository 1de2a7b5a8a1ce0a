#pragma once

#include <cuda_runtime.h>

#include "delta_gemm/delta_gemm_cuda.h"
#include "layout/packed_layout.h"

// Who works on what, found by every thread block for itself from the slots: with so few tokens that
// costs less than a kernel of its own. Tokens of one slot go two by two into groups; an entry is a
// (layer, group). Up to 32 entries are divided into parts, one a thread block, by a single warp;
// more of them are one row of equal costs, a thread block's share of which may be parts of several.
namespace adamix {

constexpr int kFewTokens = 128;  // of one launch
constexpr int kGroupTokens = 2;  // what one pass over a delta serves

// A factor's lanes per width, widest first, as in a row of the table.
struct Counts {
  int at[kMaxBits];
};

struct EntryFactor {
  int64_t offset;
  Counts counts;
};

struct Entry {
  EntryFactor down, up;  // V and U; for delta_embedding U and V
  int64_t scale_offset;
  int rank;  // 0: the slot is empty
};

constexpr int kKeptEntries = 32;

// What of an entry is a thread block's: tiles begin .. end - 1.
struct Part {
  int entry, layer, group;
  int begin, end;
};

struct SharedRoutes {
  int slots[kFewTokens];
  bool leads[kFewTokens];  // whether a token is the first of a group
  short next[kFewTokens];  // the next token of its slot; -1: none
  int group_slot[kFewTokens];
  short group_token[kFewTokens][kGroupTokens];  // -1: none
  int groups;
  // The first ones, a way to memory less where there are few; behind them the one in hand.
  Entry entries[kKeptEntries + 1];
  Part part;  // of this thread block, where it has one part; else parts of several, by cost:
  int64_t end[kMaxLayers * kFewTokens];  // cost of the entries up to and including this one
  int64_t share[2];                      // of this thread block: begin, end
};

// Lanes of the factor.
__device__ __forceinline__ int64_t load_factor(const int64_t* row, FactorColumns columns,
                                               EntryFactor& factor) {
  factor.offset = row[columns.offset];
  int64_t lanes = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) {
    factor.counts.at[i] = static_cast<int>(row[columns.first_count + i]);
    lanes += factor.counts.at[i];
  }
  return lanes;
}

__device__ inline Entry load_entry(const DeltaGemmCudaArgs& args, int layer, int slot) {
  const int64_t* row = args.layers[layer].table + int64_t{slot} * kTableColumns;
  Entry entry;
  entry.scale_offset = row[kTableScaleOffset];
  const int64_t rank = load_factor(row, args.up_by_v ? u_columns() : v_columns(), entry.down);
  const int64_t lanes = load_factor(row, args.up_by_v ? v_columns() : u_columns(), entry.up);
  entry.rank = rank <= args.max_rank && rank == lanes ? static_cast<int>(rank) : 0;
  return entry;
}

__device__ inline void load_slots(const DeltaGemmCudaArgs& args, SharedRoutes& routes) {
  const int tokens = static_cast<int>(args.tokens);
  const auto checked = [&](int slot) { return slot >= 0 && slot < args.capacity ? slot : -1; };
  if (args.routes.slots != nullptr) {
    for (int t = threadIdx.x; t < kFewTokens; t += blockDim.x) {
      routes.slots[t] = t < tokens ? checked(args.routes.slots[t]) : -1;
    }
    return;
  }
  for (int t = threadIdx.x; t < kFewTokens; t += blockDim.x) routes.slots[t] = -1;
  __syncthreads();
  // A warp a segment: its lanes read the indices side by side.
  for (int64_t s = threadIdx.x / 32; s < args.routes.segments; s += blockDim.x / 32) {
    const int slot = checked(args.routes.segment_slots[s]);
    const int64_t first = args.routes.token_starts[s];
    const int64_t count = slot >= 0 && first >= 0 ? args.routes.token_counts[s] : 0;
    const int64_t end = min(first + count, args.routes.indices);
    for (int64_t i = first + threadIdx.x % 32; i < end; i += 32) {
      const int64_t token = args.routes.token_indices[i] - args.routes.first_token;
      if (token >= 0 && token < tokens) routes.slots[token] = slot;
    }
  }
}

// Ends with a barrier.
__device__ inline void make_groups(const DeltaGemmCudaArgs& args, SharedRoutes& routes) {
  load_slots(args, routes);
  __syncthreads();
  const int tokens = static_cast<int>(args.tokens);
  for (int token = threadIdx.x; token < tokens; token += blockDim.x) {
    const int slot = routes.slots[token];
    int before = 0, next = -1;  // of the same slot: tokens before this one; the one behind it
    for (int other = 0; other < tokens; ++other) {
      const bool same = slot >= 0 && routes.slots[other] == slot;
      before += same && other < token;
      if (same && other > token && next < 0) next = other;
    }
    routes.leads[token] = slot >= 0 && before % kGroupTokens == 0;
    routes.next[token] = static_cast<short>(next);
  }
  __syncthreads();
  for (int token = threadIdx.x; token < tokens; token += blockDim.x) {
    int group = 0;
    for (int other = 0; other < token; ++other) group += routes.leads[other];
    if (routes.leads[token]) {
      routes.group_slot[group] = routes.slots[token];
      routes.group_token[group][0] = static_cast<short>(token);
      routes.group_token[group][1] = routes.next[token];
    }
    if (token == tokens - 1) routes.groups = group + routes.leads[token];
  }
  __syncthreads();
}

// How a kernel cuts entries into tiles, for the functions below:
//
//   int tiles(layer, entry)
//   int64_t cost(layer, entry)              of all of them
//   int tile_at(layer, entry, part, parts)  the first of a part, where all cost about the same
//   int tile_from(layer, entry, cost)       the first with so much before it

template <typename T>
__device__ __forceinline__ T sum_until_lane(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// So many parts of each entry, lane e's, that the largest is small and there are no more than
// `blocks`, where these are at least twice the entries. By one warp.
__device__ __forceinline__ int parts_of(int cost, int blocks) {
  float low = static_cast<float>(__reduce_add_sync(0xffffffffu, cost)) / static_cast<float>(blocks);
  float high = 2.0f * low;
#pragma unroll 1
  for (int i = 0; i < 5; ++i) {
    const float middle = 0.5f * (low + high);
    const int parts = __reduce_add_sync(0xffffffffu, __float2int_ru(__fdividef(cost, middle)));
    (parts <= blocks ? high : low) = middle;
  }
  return __float2int_ru(__fdividef(cost, high));
}

// What the first warp finds alone, without a barrier, where there are at most 32 entries: first the
// slots, then groups and entries, then parts; other work in between hides that memory is far.
class WarpRoute {
 public:
  __host__ __device__ static bool fits(const DeltaGemmCudaArgs& args, int blocks) {
    const int64_t entries = args.tokens * args.layer_count;
    return args.routes.slots != nullptr && entries <= kKeptEntries && 2 * entries <= blocks;
  }

  __device__ void read_slots(const DeltaGemmCudaArgs& args) {
    const int lane = threadIdx.x % 32;
    slot_ = lane < args.tokens ? args.routes.slots[lane] : -1;
  }

  __device__ void read_entries(const DeltaGemmCudaArgs& args, SharedRoutes& routes) {
    const int lane = threadIdx.x % 32;
    const unsigned below = (1u << lane) - 1u;
    const bool here = slot_ >= 0 && slot_ < args.capacity;
    const unsigned same = __match_any_sync(0xffffffffu, slot_);
    const bool leads = here && __popc(same & below) % kGroupTokens == 0;
    const unsigned all_leads = __ballot_sync(0xffffffffu, leads);
    if (leads) {
      const int group = __popc(all_leads & below);
      routes.group_slot[group] = slot_;
      routes.group_token[group][0] = static_cast<short>(lane);
      routes.group_token[group][1] = static_cast<short>(__ffs(same & ~below & ~(1u << lane)) - 1);
    }
    groups_ = __popc(all_leads);
    routes.groups = groups_;
    __syncwarp();
    entries_ = groups_ * args.layer_count;
    layer_ = lane < entries_ ? lane / groups_ : 0;
    if (lane < entries_) {
      routes.entries[lane] = load_entry(args, layer_, routes.group_slot[lane - layer_ * groups_]);
    }
  }

  // Parts are a tile each, or of each entry as many as its cost asks for, some thread blocks
  // perhaps idle: a part of a second entry would cost more, since x or z is prepared again and the
  // pipeline runs empty.
  template <typename Tiles>
  __device__ void take_part(SharedRoutes& routes, const Tiles& cut) const {
    const int lane = threadIdx.x % 32, block = static_cast<int>(blockIdx.x);
    const int blocks = static_cast<int>(gridDim.x);
    int parts = 0, last = 0;  // of the lane's entry; those up to and including it
    bool by_tile = false;
    if (entries_ == 1) {  // of one token or one model: soon done
      const Entry& entry = routes.entries[0];
      const int tiles = entry.rank > 0 ? cut.tiles(0, entry) : 0;
      by_tile = tiles <= blocks;
      parts = last = min(tiles, blocks);
    } else if (entries_ > 1) {
      const Entry& entry = routes.entries[lane];
      const bool works = lane < entries_ && entry.rank > 0;
      const int tiles = works ? cut.tiles(layer_, entry) : 0;
      by_tile = __reduce_add_sync(0xffffffffu, tiles) <= blocks;
      // The sum of 32 stays below 2^31.
      const int64_t cost = works ? min(cut.cost(layer_, entry), int64_t{1} << 25) : 0;
      parts = by_tile ? tiles : parts_of(static_cast<int>(cost), blocks);
      last = sum_until_lane(parts);
    }
    const unsigned behind = __ballot_sync(0xffffffffu, last > block);
    const int e = max(__ffs(behind) - 1, 0);
    const int of = __shfl_sync(0xffffffffu, parts, e);
    const int number = block - (__shfl_sync(0xffffffffu, last, e) - of);
    const int layer = __shfl_sync(0xffffffffu, layer_, e);
    int at = number + lane;
    if (behind != 0 && !by_tile) at = cut.tile_at(layer, routes.entries[e], at, of);
    if (lane == 0) routes.part.entry = e, routes.part.layer = layer;
    if (lane == 1) routes.part.group = e - layer * groups_;
    if (lane == 0) routes.part.begin = behind != 0 ? at : 0;
    if (lane == 1) routes.part.end = behind != 0 ? at : 0;
  }

 private:
  int slot_ = -1;
  int groups_ = 0, entries_ = 0;
  int layer_ = 0;  // of the lane's entry
};

// The same for any number of entries, by all threads: equal costs.
template <typename Tiles>
__device__ void share_out(const DeltaGemmCudaArgs& args, SharedRoutes& routes, const Tiles& cut) {
  const int entries = args.layer_count * routes.groups;
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const int layer = e / routes.groups, slot = routes.group_slot[e % routes.groups];
    const Entry entry = load_entry(args, layer, slot);
    if (e < kKeptEntries) routes.entries[e] = entry;
    routes.end[e] = entry.rank > 0 ? cut.cost(layer, entry) : 0;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  int64_t total = 0;
  for (int first = 0; first < entries; first += 32) {
    const int64_t cost = first + lane < entries ? routes.end[first + lane] : 0;
    const int64_t sum = total + sum_until_lane(cost);
    if (first + lane < entries) routes.end[first + lane] = sum;
    total = __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane < 2) routes.share[lane] = total * (blockIdx.x + lane) / gridDim.x;
}

// Groups, entries and parts. A barrier must follow.
template <bool kEachPart, typename Tiles>
__device__ __forceinline__ void find_route(const DeltaGemmCudaArgs& args, SharedRoutes& routes,
                                           const Tiles& cut) {
  if constexpr (!kEachPart) {
    make_groups(args, routes);
    share_out(args, routes, cut);
  } else if (threadIdx.x < 32) {
    WarpRoute route;
    route.read_slots(args);
    route.read_entries(args, routes);
    __syncwarp();
    route.take_part(routes, cut);
  }
}

// In shared memory; all threads ask together, and are done with the one before.
__device__ inline const Entry& entry_at(const DeltaGemmCudaArgs& args, SharedRoutes& routes,
                                        int e) {
  if (e < kKeptEntries) return routes.entries[e];
  __syncthreads();
  if (threadIdx.x == 0) {
    const int layer = e / routes.groups, slot = routes.group_slot[e % routes.groups];
    routes.entries[kKeptEntries] = load_entry(args, layer, slot);
  }
  __syncthreads();
  return routes.entries[kKeptEntries];
}

// The first entry that ends behind the begin of the share; all threads ask together.
__device__ __noinline__ inline int first_entry(const SharedRoutes& routes, int entries) {
  const int lane = threadIdx.x % 32;
  int e = 0;
  for (unsigned before = ~0u; before == ~0u && e < entries;) {
    before =
        __ballot_sync(0xffffffffu, e + lane < entries && routes.end[e + lane] <= routes.share[0]);
    e += __popc(before);
  }
  return e;
}

template <typename Tiles>
__device__ __noinline__ Part part_of_share(const SharedRoutes& routes, const Tiles& cut, int e,
                                           const Entry& entry) {
  const int64_t begin = e > 0 ? routes.end[e - 1] : 0;
  if (routes.end[e] == begin) return {};
  const int64_t end = min(routes.share[1], routes.end[e]);
  const int layer = e / routes.groups;
  return {e, layer, e - layer * routes.groups,
          cut.tile_from(layer, entry, max(routes.share[0] - begin, int64_t{0})),
          cut.tile_from(layer, entry, end - begin)};
}

// body(part, entry) for all of this thread block's, one after the other. It is called in one place:
// kernels are large, and twice as many instructions would be twice as many to fetch.
template <bool kEachPart, typename Tiles, typename Body>
__device__ __forceinline__ void for_parts(const DeltaGemmCudaArgs& args, SharedRoutes& routes,
                                          const Tiles& cut, Body body) {
  if constexpr (kEachPart) {
    const Part part = routes.part;
    if (part.begin < part.end) body(part, routes.entries[part.entry]);
  } else {
    const int entries = args.layer_count * routes.groups;
#pragma unroll 1
    for (int e = first_entry(routes, entries); e < entries; ++e) {
      const Part part = part_of_share(routes, cut, e, entry_at(args, routes, e));
      if (part.begin < part.end) body(part, routes.entries[min(e, kKeptEntries)]);
      if (routes.end[e] >= routes.share[1]) break;
    }
  }
}

}  // namespace adamix
