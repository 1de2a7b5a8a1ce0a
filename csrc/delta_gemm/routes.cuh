#pragma once

#include <cuda_runtime.h>

#include "delta_gemm/delta_gemm_cuda.h"
#include "layout/packed_layout.h"

// Who works on what, found by every thread block for itself from the slots: with so few tokens that
// costs less than a kernel of its own. Tokens of one slot go two by two into groups; an entry is a
// (layer, group); the blocks of the grid share the entries' cost, which is counted in words.
namespace adamix {

constexpr int kFewTokens = 128;  // of one launch
constexpr int kGroupTokens = 2;  // what one pass over a delta serves

// Components per width, widest first, as in a row of the table.
struct Counts {
  int at[kMaxBits];
};

struct Entry {
  int64_t v_offset, u_offset, scale_offset;
  Counts counts;
  int rank;  // 0: the slot is empty
};

constexpr int kKeptEntries = 16;

struct SharedRoutes {
  int slots[kFewTokens];
  int leads[kFewTokens];   // whether a token is the first of a group
  short next[kFewTokens];  // the next token of its slot; -1: none
  int group_slot[kFewTokens];
  short group_token[kFewTokens][kGroupTokens];  // -1: none
  int groups;
  // The first ones, a way to memory less where there are few; behind them the one in hand.
  Entry entries[kKeptEntries + 1];
  int64_t end[kMaxLayers * kFewTokens];  // of the entries up to and including this one
  int64_t share[2];                      // of this thread block: begin, end
  bool by_tile;                          // whether these are tiles, or costs
};

__device__ inline Entry load_entry(const int64_t* table, int slot, int64_t max_rank) {
  const int64_t* row = table + int64_t{slot} * kTableColumns;
  Entry entry;
  entry.v_offset = row[kTableVOffset];
  entry.u_offset = row[kTableUOffset];
  entry.scale_offset = row[kTableScaleOffset];
  int64_t rank = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) {
    entry.counts.at[i] = static_cast<int>(row[kTableFirstCount + i]);
    rank += entry.counts.at[i];
  }
  entry.rank = rank <= max_rank ? static_cast<int>(rank) : 0;
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

// What an entry is to be shared out by: its tiles, or what they cost in words.
struct Work {
  int64_t cost;
  int tiles;
};

constexpr int kTileShift = 40;  // sums of costs stay below, sums of tiles above

__device__ inline int64_t sum_until_lane(int64_t value, int lanes) {
  const int lane = threadIdx.x % 32;
  for (int distance = 1; distance < lanes; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// This thread block's share: equal costs, or where there are no more tiles than blocks a tile for
// each of the first, which are the first to run and, where another kernel waits for room, the last
// to leave. By one warp.
__device__ inline void take_share(SharedRoutes& routes, int64_t total) {
  const int64_t tiles = total >> kTileShift, cost = total & ((int64_t{1} << kTileShift) - 1);
  const int lane = threadIdx.x % 32;
  routes.by_tile = tiles <= gridDim.x;
  if (lane < 2) {
    const int64_t block = blockIdx.x + lane;
    routes.share[lane] = tiles <= gridDim.x ? min(block, tiles) : cost * block / gridDim.x;
  }
}

// What a second entry costs a thread block beside its words, in words: x or z is prepared again,
// and the pipeline runs empty and fills.
constexpr float kVisitCost = 16384.0f;

// The share where no block has parts of two entries, if that is better: for each entry as many
// blocks as its cost asks for, some blocks perhaps idle. Lane e has the cost of entry e and of all
// up to it. By one warp.
__device__ inline void take_whole_share(SharedRoutes& routes, int64_t cost, int64_t end,
                                        int64_t total) {
  const float each = static_cast<float>(total) / static_cast<float>(gridDim.x);
  const int blocks = cost == 0 ? 0 : max(1, static_cast<int>(static_cast<float>(cost) / each));
  const float part = cost == 0 ? 0.0f : static_cast<float>(cost) / static_cast<float>(blocks);
  const float largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(part)));
  const int last = static_cast<int>(sum_until_lane(blocks, 32));
  if (largest > each + kVisitCost ||
      __shfl_sync(0xffffffffu, last, 31) > static_cast<int>(gridDim.x)) {
    return;
  }
  const int block = static_cast<int>(blockIdx.x);
  const int e = __ffs(__ballot_sync(0xffffffffu, last > block)) - 1;
  const int64_t entry_cost = __shfl_sync(0xffffffffu, cost, max(e, 0));
  const int64_t entry_end = __shfl_sync(0xffffffffu, end, max(e, 0));
  const int of = __shfl_sync(0xffffffffu, blocks, max(e, 0));
  const int before = __shfl_sync(0xffffffffu, last, max(e, 0)) - of;
  const int lane = threadIdx.x % 32;
  if (lane < 2) {
    routes.share[lane] =
        e < 0 ? total : entry_end - entry_cost + entry_cost * (block - before + lane) / of;
  }
}

__device__ inline int64_t end_of(int64_t sum, bool by_tile) {
  return by_tile ? sum >> kTileShift : sum & ((int64_t{1} << kTileShift) - 1);
}

// What the first warp finds alone, without a barrier, where there are at most 32 entries: first the
// slots, then groups and entries, then shares; other work in between hides that memory is far.
class WarpRoute {
 public:
  __device__ static bool fits(const DeltaGemmCudaArgs& args) {
    return args.routes.slots != nullptr && args.tokens * args.layer_count <= 32;
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
    if (lane < entries_) {
      const int layer = lane / groups_;
      entry_ = load_entry(args.layers[layer].table, routes.group_slot[lane - layer * groups_],
                          args.max_rank);
    }
  }

  template <typename WorkOf>
  __device__ void share_out(SharedRoutes& routes, WorkOf work_of) const {
    const int lane = threadIdx.x % 32;
    int64_t sum = 0, cost = 0;
    if (lane < entries_) {
      if (lane < kKeptEntries) routes.entries[lane] = entry_;
      const Work work = work_of(lane / groups_, entry_);
      cost = work.cost;
      sum = int64_t{work.tiles} << kTileShift | cost;
    }
    sum = sum_until_lane(sum, entries_);
    const int64_t total = __shfl_sync(0xffffffffu, sum, max(entries_, 1) - 1);
    take_share(routes, total);
    __syncwarp();
    const bool by_tile = routes.by_tile;
    const int64_t end = end_of(sum, by_tile);
    if (lane < entries_) routes.end[lane] = end;
    if (!by_tile) take_whole_share(routes, cost, end, end_of(total, false));
  }

 private:
  int slot_ = -1;
  int groups_ = 0, entries_ = 0;
  Entry entry_;
};

// The same for any number of entries, by all threads.
template <typename WorkOf>
__device__ void share_out(const DeltaGemmCudaArgs& args, SharedRoutes& routes, WorkOf work_of) {
  const int entries = args.layer_count * routes.groups;
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const int layer = e / routes.groups, slot = routes.group_slot[e % routes.groups];
    const Entry entry = load_entry(args.layers[layer].table, slot, args.max_rank);
    if (e < kKeptEntries) routes.entries[e] = entry;
    const Work work = work_of(layer, entry);
    routes.end[e] = int64_t{work.tiles} << kTileShift | work.cost;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int64_t total = 0;
    for (int first = 0; first < entries; first += 32) {
      const int64_t sum =
          total + sum_until_lane(first + lane < entries ? routes.end[first + lane] : 0, 32);
      if (first + lane < entries) routes.end[first + lane] = sum;
      total = __shfl_sync(0xffffffffu, sum, 31);
    }
    take_share(routes, total);
    __syncwarp();
    for (int e = lane; e < entries; e += 32) routes.end[e] = end_of(routes.end[e], routes.by_tile);
  }
}

template <typename WorkOf>
__device__ __noinline__ void find_long_route(const DeltaGemmCudaArgs& args, SharedRoutes& routes,
                                             WorkOf work_of) {
  make_groups(args, routes);
  share_out(args, routes, work_of);
}

// Groups, entries and shares; ends with a barrier.
template <typename WorkOf>
__device__ __forceinline__ void find_route(const DeltaGemmCudaArgs& args, SharedRoutes& routes,
                                           WorkOf work_of) {
  if (!WarpRoute::fits(args)) {
    find_long_route(args, routes, work_of);
  } else if (threadIdx.x < 32) {
    WarpRoute route;
    route.read_slots(args);
    route.read_entries(args, routes);
    route.share_out(routes, work_of);
  }
  __syncthreads();
}

// In shared memory; all threads ask together, and are done with the one before.
__device__ inline const Entry& entry_at(const DeltaGemmCudaArgs& args, SharedRoutes& routes,
                                        int e) {
  if (e < kKeptEntries) return routes.entries[e];
  __syncthreads();
  if (threadIdx.x == 0) {
    const int layer = e / routes.groups, slot = routes.group_slot[e % routes.groups];
    routes.entries[kKeptEntries] = load_entry(args.layers[layer].table, slot, args.max_rank);
  }
  __syncthreads();
  return routes.entries[kKeptEntries];
}

// body(e, begin, end) for the entries of this thread block's share, and what of the entry is its:
// in tiles or in cost, as share_out has chosen.
template <typename Body>
__device__ void for_share(const DeltaGemmCudaArgs& args, const SharedRoutes& routes, Body body) {
  const int entries = args.layer_count * routes.groups, lane = threadIdx.x % 32;
  const int64_t first = routes.share[0], last = routes.share[1];
  int e = 0;  // the first entry that ends behind the begin of the share
  for (unsigned before = ~0u; before == ~0u && e < entries;) {
    before = __ballot_sync(0xffffffffu, e + lane < entries && routes.end[e + lane] <= first);
    e += __popc(before);
  }
  int64_t begin = e > 0 ? routes.end[e - 1] : 0;
  for (; e < entries && begin < last; ++e) {
    const int64_t end = routes.end[e];
    if (end > begin) {
      body(e, static_cast<int>(max(first - begin, int64_t{0})),
           static_cast<int>(min(last, end) - begin));
    }
    begin = end;
  }
}

}  // namespace adamix
