#pragma once

#include "delta_gemm/each_token.cuh"
#include "delta_gemm/few_tokens_up_product.cuh"

// U's codes as an operand of the byte product, in shared memory: a thread turns its four
// components' words, so that a word holds one output of all four, takes the codes out and puts them
// to
//
//   group of 16 components | block | 16 outputs | thread 4g + t of the product: 2 words
//
// the words of quad t for rows g and g + 8: outputs 2g and 2g + 1 of the 16.
namespace adamix {

constexpr int kTileRows = 16;                            // outputs of a byte product
constexpr int kBlockRows = kBlockCodes / kTileRows;      // of those in a block
constexpr int kRowWords = 64;                            // of 16 outputs and components
constexpr int kBlockWords = kBlockRows * kRowWords + 8;  // 8: blocks begin in different banks

// Four components' blocks of 32 outputs, one output a word, four components in its bytes.
template <int kBits>
__device__ __forceinline__ void unpack_quad(const uint32_t (&words)[kQuadLanes][kMaxBits],
                                            uint32_t* target) {
  uint32_t byte[kFieldCodes][kBits];  // of all outputs that are in it
#pragma unroll
  for (int j = 0; j < kBits; ++j) {
    const uint32_t four[4] = {words[0][j], words[1][j], words[2][j], words[3][j]};
    uint32_t turned[4];
    transpose(four, turned);
#pragma unroll
    for (int i = 0; i < 4; ++i) byte[i][j] = turned[i];
  }
#pragma unroll
  for (int pair = 0; pair < kBlockCodes / 2; ++pair) {
    const int field = pair / 2, first = pair % 2;  // code 2 * first is in byte first, the next
                                                   // in the byte after the next
    const int row = pair / (kTileRows / 2), g = pair % (kTileRows / 2);
    *reinterpret_cast<uint2*>(target + row * kRowWords + g * 8) = make_uint2(
        read_field<kBits>(byte[first], field), read_field<kBits>(byte[first + 2], field));
  }
}

// z's side of the product.

__device__ __forceinline__ uint32_t largest_of(const float4& four) {
  return max(max(magnitude_bits(four.x), magnitude_bits(four.y)),
             max(magnitude_bits(four.z), magnitude_bits(four.w)));
}

// A quad's digits to three planes, a word each, in their own order: a field's exchanges the middle
// ones. Returns the sum of its numbers.
__device__ __forceinline__ int store_quad(const float4& four, const Unit& unit, uint32_t* planes,
                                          int plane_words) {
  const float values[kQuadLanes] = {four.x, four.z, four.y, four.w};
  uint32_t digit[kDigits];
  digits_of_field(values, unit, digit);
  int sums[kDigits];
#pragma unroll
  for (int d = 0; d < kDigits; ++d) {
    planes[d * plane_words] = digit[d];
    sums[d] = sum_bytes(digit[d], 0);
  }
  return static_cast<int>(join_digits(sums[0], sums[1], sums[2]));
}

// All of a token's z as digits, by the threads of a thread block; `meanwhile` comes while z is on
// its way, and a barrier must follow. Returns the unit of the numbers. `tops` becomes the sum of
// the thread's numbers times the largest code of their width.
template <int kThreads, typename Meanwhile>
__device__ __forceinline__ float store_z(const float4* z, const Widths& widths,
                                         uint32_t* largest_of_warps, uint32_t* planes,
                                         int plane_words, int64_t& tops, Meanwhile meanwhile) {
  const int quads = widths.groups() * kGroupQuads, mine = threadIdx.x;
  float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (mine < quads) four = z[mine];
  meanwhile();
  int top = widths.top_code_of(mine / kGroupQuads);
  uint32_t largest = 0;
#pragma unroll 1
  for (int i = mine + kThreads; i < quads; i += kThreads) {
    largest = max(largest, largest_of(z[i]));
  }
  put_warp_max(max(largest, largest_of(four)), largest_of_warps);
  __syncthreads();
  const Unit unit = unit_for(max_of_warps(largest_of_warps, kThreads / 32));
  tops = 0;
#pragma unroll 1
  for (int i = mine; i - mine < quads;) {
    if (i < quads) tops += int64_t{top} * store_quad(four, unit, planes + i, plane_words);
    i += kThreads;
    if (i < quads) four = z[i];
    if (i - mine < quads) top = widths.top_code_of(i / kGroupQuads);
  }
  return unit.unit;
}

// Words of a plane of digits: planes begin in different banks.
inline int plane_words_of(int z_row) {
  return (z_row / kQuadLanes + 31) / 32 * 32 + 8;
}

}  // namespace adamix
