#pragma once

#include <cuda_runtime.h>

#include "common/cuda_instructions.cuh"
#include "delta_gemm/routes.cuh"

// Packed words on their way to one warp. A run is a few lanes of one width, a stage is one panel of
// a run: words that follow each other in memory as in shared memory, so a copy needs two addresses
// and a length.
//
//   memory, stage   | lane 0: 8 blocks of b words | lane 1: 8 blocks of b words | ..
//
// A warp has a ring of stages of its own and waits for its own copies alone: no barrier.
namespace adamix {

constexpr int kNarrowBits = 4;
constexpr unsigned kWarp = 0xffffffffu;

// a / b and the rest, for 0 <= a < 2^31 and a quotient below 2^20: a fifth of the instructions of
// the compiler's division.
__device__ __forceinline__ int divide(int a, int b, int& rest) {
  int quotient = static_cast<int>(__fdividef(static_cast<float>(a), static_cast<float>(b)));
  rest = a - quotient * b;
  if (rest < 0) --quotient, rest += b;
  if (rest >= b) ++quotient, rest -= b;
  return quotient;
}

__device__ __forceinline__ int divide_up(int a, int b) {
  int rest;
  const int quotient = divide(a, b, rest);
  return quotient + (rest > 0);
}

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

// Components in the order of z in memory: every width padded to whole runs of up.
__host__ __device__ constexpr int up_lanes_of(int bits) {
  return bits > kNarrowBits ? 16 : 32;
}

__host__ __device__ constexpr int padded_count(int count, int bits) {
  return (count + up_lanes_of(bits) - 1) / up_lanes_of(bits) * up_lanes_of(bits);
}

constexpr int kMaxPadding = 192;  // of z: less than a run for every width

// Where a component is in z, and where what is its own to write ends: behind the last one of a
// width of up comes the padding, zeros.
struct ZPlace {
  int position, end;
};

// counts: of up's lanes. padded(count, bits): positions of a width.
template <typename Count, typename Padded>
__device__ __forceinline__ ZPlace find_in_z(const Count* counts, int component, Padded padded) {
  ZPlace place = {0, 0};
  int begin = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) {
    const int count = static_cast<int>(counts[i]), room = padded(count, kMaxBits - i);
    if (component >= 0 && component < count) {
      place = {begin + component, begin + (component == count - 1 ? room : component + 1)};
    }
    component -= count;
    begin += room;
  }
  return place;
}

// Consecutive lanes of one width, 16 bytes in shared memory.
struct Run {
  uint32_t shape;  // bits, lanes, runs of its width from this one on: 8, 8 and 16 bits
  int before;      // words before it for one block of codes
  int component;   // of the first lane
  int position;    // of the first lane in z

  __device__ void set_shape(int bits, int lanes, int same) {
    shape = static_cast<uint32_t>(bits | lanes << 8 | same << 16);
  }
  __device__ int bits() const { return static_cast<int>(shape & 0xffu); }
  __device__ int lanes() const { return static_cast<int>(shape >> 8 & 0xffu); }
  __device__ int same() const { return static_cast<int>(shape >> 16); }
  // Words for one block of codes.
  __device__ int block_words() const { return lanes() * bits(); }
};

// How the lanes of an entry are cut into runs: kNarrow lanes of up to 4 bits, kWide of more, or
// what is left of the width. Everything here is found by a loop over the widths. A stage costs its
// words and, since instructions take time as well, kStageWords more; both for one block of codes.
template <int kNarrow, int kWide, int kStageWords>
struct Runs {
  static constexpr int kStageCost = kStageWords;

  __host__ __device__ static constexpr int lanes_of(int bits) {
    return bits > kNarrowBits ? kWide : kNarrow;
  }

  __device__ static int count(const Counts& counts) {
    int runs = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) runs += of_width(counts, i);
    return runs;
  }

  __device__ static Run at(const Counts& counts, int run) {
    Run found = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const int bits = kMaxBits - i, lanes = lanes_of(bits), runs = of_width(counts, i);
      if (found.shape != 0) continue;
      if (run < runs) {
        const int first = run * lanes;
        found.set_shape(bits, min(lanes, counts.at[i] - first), runs - run);
        found.before += first * bits;
        found.component += first;
        found.position += first;
      } else {
        run -= runs;
        found.before += counts.at[i] * bits;
        found.component += counts.at[i];
        found.position += padded_count(counts.at[i], bits);
      }
    }
    return found;
  }

  // Of all stages of a panel.
  __device__ static int cost(const Counts& counts) {
    int cost = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) cost += of_width(counts, i) * cost_of(kMaxBits - i);
    return cost;
  }

  // How many runs have stages of less than a cost before them.
  __device__ static int begin_before(const Counts& counts, int cost) {
    int runs = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const int each = cost_of(kMaxBits - i), here = of_width(counts, i);
      runs += min(here, (max(cost, 0) + each - 1) / each);
      cost -= here * each;
    }
    return runs;
  }

  // How many end at or before a position of z.
  __device__ static int end_until(const Counts& counts, int position) {
    int runs = 0;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const int bits = kMaxBits - i;
      runs += min(of_width(counts, i), max(position, 0) / lanes_of(bits));
      position -= padded_count(counts.at[i], bits);
    }
    return runs;
  }

 private:
  __device__ static constexpr int cost_of(int bits) { return lanes_of(bits) * bits + kStageWords; }

  __device__ static int of_width(const Counts& counts, int i) {
    const int lanes = lanes_of(kMaxBits - i);
    return (counts.at[i] + lanes - 1) / lanes;
  }
};

// One factor of one delta.
struct Factor {
  const uint32_t* words;
  int panel_words;  // of a full panel
  int panels;
  int last_blocks;  // of a lane in the last panel
  int even_panels;  // so many of the first may be copied 16 bytes at a time, whole

  __device__ int blocks(int panel) const { return panel + 1 < panels ? kPanelBlocks : last_blocks; }
  __device__ const uint32_t* at(int panel, int64_t words_before) const {
    return words + int64_t{panel} * panel_words + words_before * blocks(panel);
  }
};

__device__ inline Factor make_factor(const uint32_t* words, const Counts& counts, int64_t codes) {
  const int panels = static_cast<int>(panel_count(codes));
  const int last_blocks = panel_blocks(codes, panels - 1);
  const bool aligned = reinterpret_cast<uintptr_t>(words) % 16 == 0;
  return {words, static_cast<int>(block_column_words(counts.at) * kPanelBlocks), panels,
          last_blocks, !aligned ? 0 : panels - (last_blocks < kPanelBlocks)};
}

// A panel that is narrower or not aligned, word by word; every lane where it is in a whole stage.
// Rare, so it is kept out of the loops.
__device__ __noinline__ inline void copy_uneven_stage(uint32_t shape, const uint32_t* source,
                                                      int panel_blocks, uint32_t target) {
  const Run run = {shape, 0, 0, 0};
  const int row_words = panel_blocks * run.bits(), stride = kPanelBlocks * run.bits();
  for (int i = threadIdx.x % 32; i < run.lanes() * row_words; i += 32) {
    copy_async_4(target + (i / row_words * stride + i % row_words) * 4, source + i);
  }
}

// Where a warp is in a factor: the next stage to copy. What comes after it is up to the kernel.
class Cursor {
 public:
  __device__ Cursor(const Factor& factor, int stages) : factor_(factor), left_(stages) {}

  __device__ bool done() const { return left_ == 0; }

  __device__ void place(const Run& run, int panel) {
    const int lane = threadIdx.x % 32;
    set_run(run);
    even_ = panel < factor_.even_panels;
    panel_blocks_ = factor_.blocks(panel);
    source_ = factor_.at(panel, run.before) + (even_ ? lane * 4 : 0);
  }

  __device__ void set_run(const Run& run) {
    shape_ = run.shape;
    block_words_ = run.block_words();
  }

  template <int kWords>
  __device__ __forceinline__ void copy(uint32_t target) const {
    if (!even_) return copy_uneven_stage(shape_, source_, panel_blocks_, target);
    const int lane = threadIdx.x % 32, pieces = block_words_ * (kPanelBlocks / 4) - lane;
    target += lane * 16;
#pragma unroll
    for (int i = 0; i < kWords / 128; ++i) {
      if (i * 32 < pieces) copy_async_16(target + i * 512, source_ + i * 128);
    }
  }

 protected:
  const Factor& factor_;
  int left_;  // stages
  const uint32_t* source_;
  int block_words_;
  int panel_blocks_;
  bool even_;  // whether the panel can be copied 16 bytes at a time

 private:
  uint32_t shape_;
};

// The stages of one warp, in the order in which `Walk`, a Cursor, goes from one to the next().
template <typename Walk, int kDepth, int kSlotWords>
class StageStream {
 public:
  __device__ StageStream(const Walk& walk, const uint32_t* ring) : ahead_(walk), ring_(ring) {
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) fill(i);
  }

  // The next stage, which stays until the call after.
  __device__ __forceinline__ const uint32_t* next() {
    wait_copies<kDepth - 2>();
    __syncwarp();  // all have what they copied, and are done with the stage before
    const uint32_t* stage = ring_ + slot_ * kSlotWords;
    fill(slot_ == 0 ? kDepth - 1 : slot_ - 1);
    slot_ = slot_ + 1 == kDepth ? 0 : slot_ + 1;
    return stage;
  }

 private:
  __device__ __forceinline__ void fill(int slot) {
    if (!ahead_.done()) {
      ahead_.template copy<kSlotWords>(shared_address(ring_) + slot * kSlotWords * 4);
      ahead_.next();
    }
    commit_copies();
  }

  Walk ahead_;
  const uint32_t* const ring_;
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
