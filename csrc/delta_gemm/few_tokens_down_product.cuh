#pragma once

#include "common/cuda_instructions.cuh"
#include "delta_gemm/word_stream.cuh"

// A stage of V times x as a byte product: a word's four codes, one a byte, are four adjacent k of
// one component as they lie. One mask makes them an operand.
namespace adamix {

constexpr int kDownLanes = 16;  // rows of the byte product

// Of wide codes a stage has half the rows, so that all stages are about as large.
using DownRuns = Runs<kDownLanes, kDownLanes / 2, 64>;
constexpr int kDownStageWords = kDownLanes / 2 * kPanelBlocks * kMaxBits;

// The fields that product m of a block multiplies, and the bit of each byte where their codes are
// left: what is a code times 2^at there is put right once a tile, by a shift of the sum, instead of
// once a word. Sums of different `at` are kept apart, as many kinds as there are.
struct FieldPair {
  int first, second;
  int at;
  int sum;
};

constexpr int kFieldPairs = kBlockFields / 2;

__device__ constexpr FieldPair field_pair(int bits, int m) {
  if (bits == 1) return {2 * m, 2 * m + 1, 2 * m, m};
  if (bits == 2) return {m, m + 4, 2 * m, m};
  if (bits <= kNarrowBits) return {m % 2 * 4 + m / 2, m % 2 * 4 + m / 2 + 2, m / 2 * bits, m / 2};
  return {2 * m, 2 * m + 1, 0, m % 2};
}

__device__ constexpr int sum_shift(int bits, int sum) {
  return bits > kNarrowBits ? 0 : sum * max(bits, 2);
}

// The components of a stage times its 256 inputs: 4 blocks at a time, one a thread t.
template <int kBits>
__device__ __forceinline__ void multiply_down(const uint32_t* stage, const int8_t* x,
                                              int32_t (&sums)[kFieldPairs][4]) {
  constexpr bool kLower = DownRuns::lanes_of(kBits) == kDownLanes;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* block = stage + ((g * 2 + half) * 4 + t) * kBits;
    uint32_t upper[kBits], lower[kBits] = {};
    load_words(block, upper);
    if constexpr (kLower) load_words(block + 8 * kPanelBlocks * kBits, lower);
    uint32_t b[kBlockFields];
    load_words(reinterpret_cast<const uint32_t*>(x + (half * 4 + t) * kBlockCodes), b);
#pragma unroll
    for (int m = 0; m < kFieldPairs; ++m) {
      const FieldPair pair = field_pair(kBits, m);
      mma_u8s8(sums[pair.sum], read_field<kBits>(upper, pair.first, pair.at),
               read_field<kBits>(lower, pair.first, pair.at),
               read_field<kBits>(upper, pair.second, pair.at),
               read_field<kBits>(lower, pair.second, pair.at), b[pair.first], b[pair.second]);
    }
  }
}

// Sums of all kinds as one, at the end of a tile.
template <int kBits>
__device__ __forceinline__ void join_kinds(const int32_t (&sums)[kFieldPairs][4],
                                           int32_t (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[i] = 0;
#pragma unroll
    for (int kind = 0; kind < kFieldPairs; ++kind)
      sum[i] += sums[kind][i] >> sum_shift(kBits, kind);
  }
}

}  // namespace adamix
