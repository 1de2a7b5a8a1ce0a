#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_instructions.cuh"
#include "delta_gemm/elements.cuh"
#include "layout/packed_layout.h"

// A vector as whole numbers of one power of two: v = number * unit with |number| < 2^23, that is,
// exact to 2^-23 of its largest element, as good as a sum in fp32 would be. A number is three
// signed digits to the base 256, each a column of its own in the byte product: so all products and
// sums are exact, whatever their order, and a token's result does not depend on its company.
namespace adamix {

constexpr int kDigits = 3;

// Magnitudes order as their bits do; a NaN is above all, and stays.
__device__ __forceinline__ uint32_t magnitude_bits(float value) {
  return __float_as_uint(value) & 0x7fffffffu;
}

struct Unit {
  float unit;     // what a number is multiplied with
  float inverse;  // what a value is multiplied with; both are powers of two
};

// The largest number must fit three signed digits: at most 0x7f7f7f.
__device__ inline Unit unit_for(uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {__uint_as_float(0x7fffffffu), 0.0f};  // NaN
  int exponent = static_cast<int>(largest_bits >> 23) - 126;  // largest < 2^exponent
  if (largest_bits < 0x00800000u) exponent = -125;            // subnormal
  int shift = 23 - exponent;
  if ((largest_bits & 0x007fffffu) > 0x7efefeu) --shift;  // the number would be above 0x7f7f7f
  shift = min(shift, 126);  // units are normal numbers: what is lost lies below 2^-126
  return {__int_as_float((127 - shift) << 23), __int_as_float((127 + shift) << 23)};
}

__device__ __forceinline__ int to_number(float value, const Unit& unit) {
  return __float2int_rn(value * unit.inverse);
}

// Its digits as signed bytes, the lowest in byte 0: adding 0x80 to every digit carries what is
// above 127 into the next.
constexpr uint32_t kDigitBias = 0x808080u;

__device__ __forceinline__ uint32_t digits_of(int number) {
  return (static_cast<uint32_t>(number) + kDigitBias) ^ kDigitBias;
}

// The digits of four adjacent numbers, highest first, a word for each, in the byte order of a
// field.
__device__ __forceinline__ void digits_of_field(const float* values, const Unit& unit,
                                                uint32_t (&digit)[kDigits]) {
  uint32_t biased[kFieldCodes];
#pragma unroll
  for (int i = 0; i < kFieldCodes; ++i) {
    biased[i] = static_cast<uint32_t>(to_number(values[i], unit)) + kDigitBias;
  }
  const uint32_t low = __byte_perm(biased[0], biased[2], 0x5140);
  const uint32_t high = __byte_perm(biased[1], biased[3], 0x5140);
  const uint32_t low_top = __byte_perm(biased[0], biased[2], 0x0062);
  const uint32_t high_top = __byte_perm(biased[1], biased[3], 0x0062);
  digit[0] = __byte_perm(low_top, high_top, 0x5410) ^ 0x80808080u;
  digit[1] = __byte_perm(low, high, 0x7632) ^ 0x80808080u;
  digit[2] = __byte_perm(low, high, 0x5410) ^ 0x80808080u;
}

// Signed bytes, added up.
__device__ __forceinline__ int sum_bytes(uint32_t bytes, int sum) {
  return __dp4a(static_cast<int>(bytes), 0x01010101, sum);
}

// One number from the sums over its digits.
__device__ __forceinline__ int64_t join_digits(int high, int middle, int low) {
  return (int64_t{high} << 16) + (int64_t{middle} << 8) + low;
}

// The digits of eight adjacent elements to three planes, in the byte order of fields, each plane
// aligned to 8 bytes there. Returns the sum of the numbers.
template <typename T>
__device__ __forceinline__ int64_t store_digits(const Eight<T>& eight, const Unit& unit,
                                                uint32_t* planes, int plane_words) {
  uint32_t digit[2][kDigits];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float values[kFieldCodes];
#pragma unroll
    for (int k = 0; k < kFieldCodes; ++k) values[k] = eight.value(j * kFieldCodes + k);
    digits_of_field(values, unit, digit[j]);
  }
  int sums[kDigits];
#pragma unroll
  for (int d = 0; d < kDigits; ++d) {
    sums[d] = sum_bytes(digit[0][d], sum_bytes(digit[1][d], 0));
    *reinterpret_cast<uint2*>(planes + d * plane_words) = make_uint2(digit[0][d], digit[1][d]);
  }
  return join_digits(sums[0], sums[1], sums[2]);
}

// --- over the thread block; each of these in two steps, a warp's part and what all parts give, so
// that a barrier which is there anyway is enough between them

__device__ __forceinline__ void put_warp_max(uint32_t value, uint32_t* warps) {
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
}

__device__ __forceinline__ uint32_t max_of_warps(const uint32_t* warps,
                                                 uint32_t count = blockDim.x / 32) {
  const uint32_t lane = threadIdx.x % 32;
  return __reduce_max_sync(0xffffffffu, lane < count ? warps[lane] : 0u);
}

// |value| < 2^42, so that the sum of 32 upper parts fits 32 bits.
__device__ __forceinline__ int64_t sum_of_warp(int64_t value) {
  const int upper = __reduce_add_sync(0xffffffffu, static_cast<int>(value >> 16));
  const int lower = __reduce_add_sync(0xffffffffu, static_cast<int>(value & 0xffff));
  return (int64_t{upper} << 16) + lower;
}

// On top of what is there, or not.
__device__ __forceinline__ void put_warp_sum(int64_t value, int64_t* warps, bool on_top) {
  value = sum_of_warp(value);
  if (threadIdx.x % 32 != 0) return;
  warps += threadIdx.x / 32;
  *warps = on_top ? *warps + value : value;
}

// All threads of a warp ask together.
__device__ __forceinline__ int64_t sum_of_warps(const int64_t* warps) {
  const uint32_t lane = threadIdx.x % 32;
  return sum_of_warp(lane < blockDim.x / 32 ? warps[lane] : 0);
}

}  // namespace adamix
