#pragma once

#include "common/cuda_instructions.cuh"
#include "delta_gemm/word_stream.cuh"

// A stage of U times z as a byte product. U's lanes are columns: a word holds outputs of one
// component, while the product wants components side by side. So four lanes' words change places
// with their four bytes first, a few instructions a word and not a code.
namespace adamix {

// k of the byte product: all 32, or of wide codes 16 and nothing.
using UpRuns = Runs<up_lanes_of(1), up_lanes_of(kMaxBits), 4>;
constexpr int kUpStageWords = 32 * kPanelBlocks * kNarrowBits;

// Byte `byte` of four words, and so of four lanes, becomes one word.
__device__ __forceinline__ void transpose(const uint32_t (&word)[4], uint32_t (&byte)[4]) {
  const uint32_t low01 = __byte_perm(word[0], word[1], 0x5140);
  const uint32_t low23 = __byte_perm(word[2], word[3], 0x5140);
  const uint32_t high01 = __byte_perm(word[0], word[1], 0x7362);
  const uint32_t high23 = __byte_perm(word[2], word[3], 0x7362);
  byte[0] = __byte_perm(low01, low23, 0x5410);
  byte[1] = __byte_perm(low01, low23, 0x7632);
  byte[2] = __byte_perm(high01, high23, 0x5410);
  byte[3] = __byte_perm(high01, high23, 0x7632);
}

// One field of both halves' lanes: bytes r and r + 2 are two adjacent outputs.
__device__ __forceinline__ void multiply_field(const uint32_t (&byte)[2][4], int shift,
                                               uint32_t mask, uint32_t z0, uint32_t z1,
                                               int32_t (&sum)[2][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    mma_u8s8(sum[r], byte[0][r] >> shift & mask, byte[0][r + 2] >> shift & mask,
             byte[1][r] >> shift & mask, byte[1][r + 2] >> shift & mask, z0, z1);
  }
}

// The bits of a field that word j of the block holds, in their place.
template <int kBits>
__device__ __forceinline__ uint32_t bits_in_word(int field, int j, uint32_t word) {
  uint32_t codes = 0;
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const BitPlace place = place_of_bit(field, bit, kBits);
    if (place.word != j) continue;
    codes |= (place.bit >= bit ? word >> (place.bit - bit) : word << (bit - place.bit)) &
             (kEveryByte << bit);
  }
  return codes;
}

// 256 outputs times 32 or 16 components. Thread 4g + t reads block g of lanes t + 4i and
// 16 + t + 4i, i = 0..3: the order of z's bytes. Outputs 32g + 4 field + {0, 1, 2, 3} are in
// bytes 0, 2, 1, 3 of a word: sum[field][r] is of outputs 32g + 4 field + 2r and the next.
template <int kBits>
__device__ __forceinline__ void multiply_up(const uint32_t* stage, uint32_t z0, uint32_t z1,
                                            int32_t (&sum)[kBlockFields][2][4]) {
  constexpr int kWhole = 8 / kBits;                                   // fields that a word holds
  constexpr int kRest = kBlockFields - kWhole * kBits;                // fields of leftover bits
  constexpr int kLoad = kBits % 4 == 0 ? 4 : kBits % 2 == 0 ? 2 : 1;  // words at a time
  constexpr int kHalves = UpRuns::lanes_of(kBits) / 16;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t rest[kRest > 0 ? kRest : 1][2][4] = {};
#pragma unroll
  for (int first = 0; first < kBits; first += kLoad) {
    uint32_t loaded[2][4][kLoad] = {};
#pragma unroll
    for (int lane = 0; lane < 4 * kHalves; ++lane) {
      const int row = lane / 4 * 16 + t + lane % 4 * 4;
      load_words(stage + (row * kPanelBlocks + g) * kBits + first, loaded[lane / 4][lane % 4]);
    }
#pragma unroll
    for (int j = 0; j < kLoad; ++j) {
      uint32_t byte[2][4] = {};
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t word[4] = {loaded[half][0][j], loaded[half][1][j], loaded[half][2][j],
                                  loaded[half][3][j]};
        transpose(word, byte[half]);
      }
#pragma unroll
      for (int i = 0; i < kWhole; ++i) {
        multiply_field(byte, i * kBits, max_code(kBits) * kEveryByte, z0, z1,
                       sum[(first + j) * kWhole + i]);
      }
#pragma unroll
      for (int field = 0; field < kRest; ++field) {
#pragma unroll
        for (int b = 0; b < 4 * kHalves; ++b) {
          rest[field][b / 4][b % 4] |=
              bits_in_word<kBits>(kWhole * kBits + field, first + j, byte[b / 4][b % 4]);
        }
      }
    }
  }
#pragma unroll
  for (int field = 0; field < kRest; ++field) {
    multiply_field(rest[field], 0, ~0u, z0, z1, sum[kWhole * kBits + field]);
  }
}

}  // namespace adamix
