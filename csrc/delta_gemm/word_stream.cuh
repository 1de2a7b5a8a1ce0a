#pragma once

#include <cuda_runtime.h>

#include "common/cuda_instructions.cuh"
#include "delta_gemm/routes.cuh"

// Packed words on their way to one warp. A stage is a run of lanes of one width with some blocks of
// one panel of each; its lanes follow each other in memory, and padded in shared memory:
//
//   memory   | lane 0: 8 blocks of b words | lane 1 | ..      16-byte copies, read once
//   stage    | lane 0             |pad| lane 1             |pad| ..
//
// A warp has a ring of kDepth stages of its own and waits for its own copies alone: no barrier.
// Above 4 bits a stage has half the lanes or half the blocks, so that all are about as large.
namespace adamix {

constexpr int kNarrowBits = 4;

template <typename Body>
__device__ __forceinline__ void for_width(int bits, Body&& body) {
  switch (bits) {
    case 1: body(std::integral_constant<int, 1>{}); break;
    case 2: body(std::integral_constant<int, 2>{}); break;
    case 3: body(std::integral_constant<int, 3>{}); break;
    case 4: body(std::integral_constant<int, 4>{}); break;
    case 5: body(std::integral_constant<int, 5>{}); break;
    case 6: body(std::integral_constant<int, 6>{}); break;
    case 7: body(std::integral_constant<int, 7>{}); break;
    default: body(std::integral_constant<int, 8>{});
  }
}

// Consecutive lanes of one width: kNarrow of up to 4 bits, kWide of more, or what is left of the
// width.
template <int kNarrow, int kWide = kNarrow>
struct LaneRun {
  int index;      // of the runs of the entry
  int bits;       // 0 behind the last run
  int first;      // lane, within its width
  int count;      // lanes of the width
  int component;  // of the first lane
  int position;   // of the first lane where every width is padded to whole runs
  int before;     // words before it for one block of codes

  __device__ static constexpr int lanes_of(int bits) {
    return bits > kNarrowBits ? kWide : kNarrow;
  }
  __device__ static int runs_of(const Counts& counts, int i) {
    const int lanes = lanes_of(kMaxBits - i);
    return (counts.at[i] + lanes - 1) / lanes;
  }

  __device__ void seek(const Counts& counts, int run) {
    index = run;
    bits = first = count = component = position = before = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const int runs = runs_of(counts, i), lanes = lanes_of(kMaxBits - i);
      if (bits != 0) continue;
      if (run < runs) {
        bits = kMaxBits - i;
        first = run * lanes;
        count = counts.at[i];
        component += first;
        position += first;
        before += first * bits;
      } else {
        run -= runs;
        component += counts.at[i];
        position += runs * lanes;
        before += counts.at[i] * (kMaxBits - i);
      }
    }
  }

  __device__ bool last_of_width() const { return first + lanes_of(bits) >= count; }

  __device__ void next(const Counts& counts) {
    if (last_of_width()) return seek(counts, index + 1);
    const int lanes = lanes_of(bits);
    ++index;
    first += lanes;
    component += lanes;
    position += lanes;
    before += lanes * bits;
  }

  __device__ int lanes() const { return min(lanes_of(bits), count - first); }
};

// Items of each width, and what one costs, widest first.
struct Items {
  int count[kMaxBits];
  int cost[kMaxBits];

  __device__ int total() const {
    int items = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) items += count[i];
    return items;
  }

  __device__ int total_cost() const {
    int total = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) total += count[i] * cost[i];
    return total;
  }

  // How many begin before a cost.
  __device__ int before(int total) const {
    int items = 0, each = 1;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const int here = count[i] * cost[i];
      if (found) continue;
      found = total <= here;
      if (found) {
        each = cost[i];
      } else {
        items += count[i];
        total -= here;
      }
    }
    return found ? items + (total + each - 1) / each : items;
  }
};

// The runs of an entry, and their words for one block of codes.
template <typename Run>
__device__ Items runs_of_entry(const Counts& counts) {
  Items items;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) {
    items.count[i] = Run::runs_of(counts, i);
    items.cost[i] = Run::lanes_of(kMaxBits - i) * (kMaxBits - i);
  }
  return items;
}

// Of those, the runs [first, last).
__device__ inline Items part_of(const Items& items, int first, int last) {
  Items part = items;
  int begin = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) {
    const int end = begin + items.count[i];
    part.count[i] = max(0, min(end, last) - max(begin, first));
    begin = end;
  }
  return part;
}

// One factor of one delta.
struct Factor {
  const uint32_t* words;
  int64_t panel_words;  // of a full panel
  int panels;
  int last_blocks;  // of a lane in the last panel
  bool aligned;     // whether full panels may be copied 16 bytes at a time

  __device__ int blocks(int panel) const { return panel + 1 < panels ? kPanelBlocks : last_blocks; }
  __device__ const uint32_t* at(int panel, int64_t words_before) const {
    return words + panel * panel_words + words_before * blocks(panel);
  }
};

__device__ inline Factor make_factor(const uint32_t* words, const Counts& counts, int64_t codes) {
  int64_t column = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) column += int64_t{counts.at[i]} * (kMaxBits - i);
  const int panels = static_cast<int>(panel_count(codes));
  return {words, column * kPanelBlocks, panels, panel_blocks(codes, panels - 1),
          reinterpret_cast<uintptr_t>(words) % 16 == 0};
}

// Which stage comes next, and where it is.
template <typename Shape>
struct StageSource {
  typename Shape::Run run;
  int panel;
  int first_block;         // of the panel
  const uint32_t* source;  // first_block of the first lane

  __device__ void place(const Factor& factor) {
    source = factor.at(panel, run.before) + first_block * run.bits;
  }
};

// Starts the copy of a stage into the ring.
template <typename Shape>
__device__ __forceinline__ void copy_stage(const Factor& factor, const StageSource<Shape>& stage,
                                           uint32_t* ring) {
  const int lane = threadIdx.x % 32, bits = stage.run.bits;
  const uint32_t target = shared_address(ring);
  const int panel_blocks = factor.blocks(stage.panel);
  if (factor.aligned && panel_blocks == kPanelBlocks &&
      stage.run.lanes() == Shape::Run::lanes_of(bits)) {
    for_width(bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kRowPieces = Shape::blocks_of(kBits) * kBits / 4;
      constexpr int kPieces = Shape::Run::lanes_of(kBits) * kRowPieces;
#pragma unroll
      for (int first = 0; first < kPieces; first += 32) {
        const int piece = first + lane, row = piece / kRowPieces;
        const int source = piece * 4 + row * (kPanelBlocks * kBits - kRowPieces * 4);
        const int there = piece * 4 + row * (Shape::stride_of(kBits) - kRowPieces * 4);
        if (kPieces - first >= 32 || piece < kPieces) {
          copy_async_16(target + there * 4, stage.source + source);
        }
      }
    });
    return;
  }
  const int blocks = min(Shape::blocks_of(bits), panel_blocks - stage.first_block);
  const int row_words = blocks * bits, stride = Shape::stride_of(bits);
  for (int i = lane; i < stage.run.lanes() * row_words; i += 32) {
    const int row = i / row_words, word = i % row_words;
    copy_async_4(target + (row * stride + word) * 4,
                 stage.source + row * panel_blocks * bits + word);
  }
}

// The stages of one warp, in the order of `walk`, which has done() and next().
template <typename Shape, typename Walk>
class StageStream {
 public:
  __device__ StageStream(const Walk& walk, uint32_t* ring, const Counts& counts,
                         const Factor& factor)
      : ahead_(walk), ring_(ring) {
#pragma unroll 1
    for (int i = 0; i < Shape::kDepth - 1; ++i) fill(i, counts, factor);
  }

  // The next stage, which stays until the call after.
  __device__ const uint32_t* next(const Counts& counts, const Factor& factor) {
    wait_copies<Shape::kDepth - 2>();
    __syncwarp();  // all have what they copied, and are done with the stage before
    const uint32_t* stage = ring_ + slot_ * Shape::kStageWords;
    fill(slot_ == 0 ? Shape::kDepth - 1 : slot_ - 1, counts, factor);
    slot_ = slot_ + 1 == Shape::kDepth ? 0 : slot_ + 1;
    return stage;
  }

 private:
  __device__ void fill(int slot, const Counts& counts, const Factor& factor) {
    if (!ahead_.done()) {
      copy_stage(factor, ahead_.stage, ring_ + slot * Shape::kStageWords);
      ahead_.next(counts, factor);
    }
    commit_copies();
  }

  Walk ahead_;
  uint32_t* ring_;
  int slot_ = 0;
};

// kBits words from shared memory, in the widest loads that their alignment allows.
template <int kWords>
__device__ __forceinline__ void load_words(const uint32_t* source, uint32_t (&words)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(source + i);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(source + i);
      words[i] = two.x, words[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = source[i];
  }
}

}  // namespace adamix
