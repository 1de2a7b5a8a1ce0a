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

  __device__ int lanes() const { return min(lanes_of(bits), count - first); }
  __device__ int end_position() const { return position + lanes_of(bits); }
};

// --- what a warp knows of all widths; lane i % 8 holds width 8 - i, and all lanes ask together

constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ int lane_width() {
  return kMaxBits - threadIdx.x % kMaxBits;
}

// Over the widths before this lane's, and over all.
__device__ __forceinline__ int sum_before(int value) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kMaxBits; distance *= 2) {
    const int other = __shfl_up_sync(kWarp, sum, distance, kMaxBits);
    if (static_cast<int>(threadIdx.x % kMaxBits) >= distance) sum += other;
  }
  return sum - value;
}

__device__ __forceinline__ int sum_of_widths(int value) {
#pragma unroll
  for (int distance = 1; distance < kMaxBits; distance *= 2) {
    value += __shfl_xor_sync(kWarp, value, distance);
  }
  return value;
}

// The runs of an entry.
template <typename Run>
class RunTable {
 public:
  __device__ void load(const Counts& counts) {
    const int bits = lane_width(), lanes = Run::lanes_of(bits);
    count_ = counts.at[kMaxBits - bits];
    runs_ = (count_ + lanes - 1) / lanes;
    first_run_ = sum_before(runs_);
    first_component_ = sum_before(count_);
    first_word_ = sum_before(count_ * bits);
    first_position_ = sum_before(runs_ * lanes);
  }

  __device__ int runs() const { return sum_of_widths(runs_); }

  // Of this lane's width, those among runs [first, last).
  __device__ int runs_between(int first, int last) const {
    return max(0, min(first_run_ + runs_, last) - max(first_run_, first));
  }

  __device__ int first_run(int lane) const { return __shfl_sync(kWarp, first_run_, lane); }

  __device__ Run at(int run) const {
    const unsigned there = __ballot_sync(kWarp, run < first_run_ + runs_) & ((1u << kMaxBits) - 1u);
    const int i = there != 0 ? __ffs(there) - 1 : 0;
    const auto of_width = [&](int value) { return __shfl_sync(kWarp, value, i); };
    Run found;
    found.index = run;
    found.bits = there != 0 ? kMaxBits - i : 0;
    found.first = (run - of_width(first_run_)) * Run::lanes_of(found.bits);
    found.count = of_width(count_);
    found.component = of_width(first_component_) + found.first;
    found.position = of_width(first_position_) + found.first;
    found.before = of_width(first_word_) + found.first * found.bits;
    return found;
  }

  __device__ Run behind(const Run& run) const {
    if (run.last_of_width()) return at(run.index + 1);
    const int lanes = Run::lanes_of(run.bits);
    Run next = run;
    ++next.index;
    next.first += lanes;
    next.component += lanes;
    next.position += lanes;
    next.before += lanes * run.bits;
    return next;
  }

  // How many runs end at or before a position.
  __device__ int runs_until(int position) const {
    const int here = max(0, position - first_position_) / Run::lanes_of(lane_width());
    return sum_of_widths(min(runs_, here));
  }

 private:
  int count_, runs_;
  int first_run_, first_component_, first_word_, first_position_;
};

// Items of each width in the order of the widths, and what one costs.
class Items {
 public:
  __device__ Items(int count, int cost)
      : count_(count), cost_(cost), first_(sum_before(count)), begin_(sum_before(count * cost)) {}

  __device__ int total_cost() const { return sum_of_widths(count_ * cost_); }

  // How many begin before a cost.
  __device__ int before(int cost) const {
    return sum_of_widths(min(count_, (max(0, cost - begin_) + cost_ - 1) / cost_));
  }

  // The lane of an item's width, and the first item of it.
  __device__ int lane_of(int item) const {
    return __ffs(__ballot_sync(kWarp, item < first_ + count_)) - 1;
  }
  __device__ int first_of(int lane) const { return __shfl_sync(kWarp, first_, lane); }

 private:
  int count_, cost_;
  int first_, begin_;
};

// What one thread alone needs of an entry: its runs, and their words for one block of codes.
template <typename Run>
__device__ int runs_of_entry(const Counts& counts) {
  int runs = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) runs += Run::runs_of(counts, i);
  return runs;
}

template <typename Run>
__device__ int words_of_runs(const Counts& counts) {
  int words = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) {
    words += Run::runs_of(counts, i) * Run::lanes_of(kMaxBits - i) * (kMaxBits - i);
  }
  return words;
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
  const int panels = static_cast<int>(panel_count(codes));
  return {words, block_column_words(counts.at) * kPanelBlocks, panels,
          panel_blocks(codes, panels - 1), reinterpret_cast<uintptr_t>(words) % 16 == 0};
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
  using Table = RunTable<typename Shape::Run>;

  __device__ StageStream(const Walk& walk, uint32_t* ring, const Table& table, const Factor& factor)
      : ahead_(walk), ring_(ring) {
#pragma unroll 1
    for (int i = 0; i < Shape::kDepth - 1; ++i) fill(i, table, factor);
  }

  // The next stage, which stays until the call after.
  __device__ const uint32_t* next(const Table& table, const Factor& factor) {
    wait_copies<Shape::kDepth - 2>();
    __syncwarp();  // all have what they copied, and are done with the stage before
    const uint32_t* stage = ring_ + slot_ * Shape::kStageWords;
    fill(slot_ == 0 ? Shape::kDepth - 1 : slot_ - 1, table, factor);
    slot_ = slot_ + 1 == Shape::kDepth ? 0 : slot_ + 1;
    return stage;
  }

 private:
  __device__ void fill(int slot, const Table& table, const Factor& factor) {
    if (!ahead_.done()) {
      copy_stage(factor, ahead_.stage, ring_ + slot * Shape::kStageWords);
      ahead_.next(table, factor);
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
