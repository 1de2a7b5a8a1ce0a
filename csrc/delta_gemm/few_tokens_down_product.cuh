#pragma once

#include "common/cuda_instructions.cuh"
#include "delta_gemm/word_stream.cuh"

// A stage of V times x as a byte product: a word's four codes, one a byte, are four adjacent k of
// one component as they lie. One mask makes them an operand.
namespace adamix {

constexpr int kDownLanes = 16;  // rows of the byte product

struct DownShape {
  using Run = LaneRun<kDownLanes>;
  static constexpr int kDepth = 4;
  static constexpr int kStageWords = kDownLanes * 36;

  __device__ static constexpr int blocks_of(int bits) {
    return bits > kNarrowBits ? kPanelBlocks / 2 : kPanelBlocks;
  }
  // From lane to lane of a stage. With 4, 8, 4, 4, 0, 0, 0, 4 words of padding the loads of a warp,
  // 8 lanes and 4 blocks, are free of bank conflicts, but for two-way ones at 4 bits.
  __device__ static constexpr int stride_of(int bits) {
    return blocks_of(bits) * bits + static_cast<int>(0x10001121u >> 4 * (bits - 1) & 15u) * 4;
  }
};

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

// 16 components times the inputs of a stage: 4 blocks at a time, one a thread t.
template <int kBits>
__device__ __forceinline__ void multiply_down(const uint32_t* stage, const int8_t* x,
                                              int32_t (&sums)[kFieldPairs][4]) {
  constexpr int kStride = DownShape::stride_of(kBits);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < DownShape::blocks_of(kBits) / 4; ++half) {
    const int block = half * 4 + t;
    uint32_t upper_row[kBits], lower_row[kBits];
    load_words(stage + g * kStride + block * kBits, upper_row);
    load_words(stage + (g + 8) * kStride + block * kBits, lower_row);
    uint32_t b[kBlockFields];
    load_words(reinterpret_cast<const uint32_t*>(x + block * kBlockCodes), b);
#pragma unroll
    for (int m = 0; m < kFieldPairs; ++m) {
      const FieldPair pair = field_pair(kBits, m);
      mma_u8s8(sums[pair.sum], read_field<kBits>(upper_row, pair.first, pair.at),
               read_field<kBits>(lower_row, pair.first, pair.at),
               read_field<kBits>(upper_row, pair.second, pair.at),
               read_field<kBits>(lower_row, pair.second, pair.at), b[pair.first], b[pair.second]);
    }
  }
}

}  // namespace adamix
