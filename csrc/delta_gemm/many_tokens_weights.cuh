#pragma once

#include "delta_gemm/elements.cuh"
#include "delta_gemm/tile_product.cuh"
#include "delta_gemm/word_stream.cuh"

// Packed words -> a tile of 16-bit levels, the second operand of a tile product.
namespace adamix {

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

// Components in z's order: widths descending, each padded to an even number, so that two
// neighbours share a width.
using Pair = LaneRun<2>;

__device__ inline int pair_count(const Counts& counts) {
  int pairs = 0;
#pragma unroll
  for (int i = 0; i < kMaxBits; ++i) pairs += (counts.at[i] + 1) / 2;
  return pairs;
}

// Two codes, in the low bytes of the halves of a word -> two levels 2q - (2^b - 1), exact.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t levels(uint32_t codes) {
  if constexpr (std::is_same_v<T, __half>) {
    // 1024 + q by putting q behind 1024's exponent.
    const uint32_t q = fma_pair<T>(codes | 0x64006400u, 0x3c003c00u, 0xe400e400u);
    constexpr uint32_t kTop = half_bits(max_code(kBits)) | 0x8000u;
    return fma_pair<T>(q, 0x40004000u, kTop << 16 | kTop);
  } else if constexpr (kBits == 8) {
    // A bf16 has room for 128 + 7 bits: 4 (q / 2) - 255, then 2 more where q is odd.
    const uint32_t half = codes >> 1 & 0x007f007fu;
    const uint32_t q = fma_pair<T>(half | 0x43004300u, 0x3f803f80u, 0xc300c300u);
    const uint32_t even = fma_pair<T>(q, 0x40804080u, 0xc37fc37fu);
    return fma_pair<T>((codes & 0x00010001u) << 14, 0x3f803f80u, even);
  } else {
    const uint32_t q = fma_pair<T>(codes | 0x43004300u, 0x3f803f80u, 0xc300c300u);
    constexpr uint32_t kTop = bfloat16_bits(max_code(kBits)) | 0x8000u;
    return fma_pair<T>(q, 0x40004000u, kTop << 16 | kTop);
  }
}

// What one product is of. `tokens` are rows of x or z.
struct Product {
  Factor factor;
  Counts counts;
  int pairs;       // of components
  int first_row;   // of the tile: component position or output
  int first_step;  // of 64 k
  int last_step;
  int first_token;  // sorted
  int tokens;
};

constexpr int kStepPairs = kStepCodes / 2;
constexpr int kStepBlocks = kStepCodes / kBlockCodes;
constexpr int kWords = kStepBlocks * kMaxBits;  // the most that a producer thread decodes at a time

// Loads `count` packed words; a fixed array, so that it stays in registers.
__device__ __forceinline__ void load_packed(const uint32_t* source, int count,
                                            uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = i < count ? __ldg(source + i) : 0u;
}

// V as the second operand: row = component, k = input. A thread makes 64 k of one row.
struct DownWeights {
  int bits = 1;
  int before = 0;
  uint32_t words[kWords];

  __device__ void begin(const Product& product, int thread) {
    const int position = product.first_row + thread;
    Pair pair;
    pair.seek(product.counts, min(position / 2, product.pairs - 1));
    bits = pair.bits;
    before = pair.before + min(position % 2, pair.lanes() - 1) * bits;
  }

  // Behind the last input stand any codes: x is zero there.
  __device__ void load(const Product& product, int step) {
    const int block = step * kStepBlocks, panel = block / kPanelBlocks;
    const int blocks = product.factor.blocks(panel);
    const uint32_t* lane = product.factor.at(panel, before) + block % kPanelBlocks * bits;
    load_packed(lane, min(kStepBlocks, blocks - block % kPanelBlocks) * bits, words);
  }

  template <typename T>
  __device__ void store(uint4* tile, int thread) const {
    for_width(bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
#pragma unroll
      for (int block = 0; block < kStepBlocks; ++block) {
        uint32_t pairs[kBlockCodes / 2];
#pragma unroll
        for (int field = 0; field < kBlockFields; ++field) {
          const uint32_t codes = read_field<kBits>(words + block * kBits, field);
          pairs[2 * field] = levels<T, kBits>(codes & 0x00ff00ffu);
          pairs[2 * field + 1] = levels<T, kBits>(codes >> 8 & 0x00ff00ffu);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          tile[chunk_of(thread, block * 4 + i)] =
              make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
        }
      }
    });
  }
};

// U as the second operand: row = output, k = component. A thread makes 32 rows of two components;
// the lanes of a warp have the same rows, so what they store lies side by side.
struct UpWeights {
  int bits = 1;
  int block = 0;           // of the tile's outputs
  uint32_t words[kWords];  // of the first component, then of the second

  __device__ void begin(const Product&, int thread) { block = thread / 32; }

  // Behind the last component stand any codes: z is zero there.
  __device__ void load(const Product& product, int step) {
    Pair pair;
    pair.seek(product.counts,
              min(step * kStepPairs + static_cast<int>(threadIdx.x % 32), product.pairs - 1));
    bits = pair.bits;
    const int64_t first_block = product.first_row / kBlockCodes + block;
    const int panel = static_cast<int>(first_block / kPanelBlocks);
    const int blocks = product.factor.blocks(panel);
    const int at = static_cast<int>(first_block % kPanelBlocks);
    const uint32_t* lane = product.factor.at(panel, pair.before) + at * bits;
    const int second = pair.lanes() == 2 ? bits * blocks : 0;
    const bool inside = at < blocks;
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      const bool read = inside && i < bits;
      words[i] = read ? __ldg(lane + i) : 0u;
      words[kMaxBits + i] = read ? __ldg(lane + second + i) : 0u;
    }
  }

  template <typename T>
  __device__ void store(uint4* tile, int thread) const {
    auto* pairs = reinterpret_cast<uint32_t*>(tile);
    const int k = thread % 32;  // of the pair
    const auto put = [&](int code, uint32_t pair) {
      pairs[chunk_of(block * kBlockCodes + code, k / 4) * 4 + k % 4] = pair;
    };
    for_width(bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      uint32_t even[kBits], odd[kBits];  // bytes 0 and 1, 2 and 3 of both components
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        even[i] = __byte_perm(words[i], words[kMaxBits + i], 0x5410);
        odd[i] = __byte_perm(words[i], words[kMaxBits + i], 0x7632);
      }
#pragma unroll
      for (int field = 0; field < kBlockFields; ++field) {
        const uint32_t codes[2] = {read_field<kBits>(even, field), read_field<kBits>(odd, field)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          put(field * kFieldCodes + i, levels<T, kBits>(codes[i] & 0x00ff00ffu));
          put(field * kFieldCodes + 2 + i, levels<T, kBits>(codes[i] >> 8 & 0x00ff00ffu));
        }
      }
    });
  }
};

}  // namespace adamix
