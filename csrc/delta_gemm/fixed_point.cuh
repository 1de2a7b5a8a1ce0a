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
__device__ __forceinline__ uint32_t digits_of(int number) {
  return (static_cast<uint32_t>(number) + 0x808080u) ^ 0x808080u;
}

// One number from the sums over its digits.
__device__ __forceinline__ int64_t join_digits(int high, int middle, int low) {
  return (int64_t{high} << 16) + (int64_t{middle} << 8) + low;
}

// The units of two vectors of which each thread has seen a part, whose largest magnitude is
// largest[i]. `shared` holds 2 * 32 values. Ends with a barrier.
__device__ inline void find_units(uint32_t (&largest)[2], uint32_t* shared, Unit (&units)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) {
      largest[i] = max(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], distance));
    }
    if (lane == 0) shared[i * 32 + warp] = largest[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int other = 0; other < warps; ++other)
      largest[i] = max(largest[i], shared[i * 32 + other]);
    units[i] = unit_for(largest[i]);
  }
  __syncthreads();
}

// A sum over the thread block in two steps, so that a barrier which is there anyway is enough: the
// warps' sums, and behind the barrier their sum.
__device__ inline void put_warp_sum(int64_t value, int64_t* warp_sums) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
}

__device__ inline int64_t sum_of_warps(const int64_t* warp_sums) {
  int64_t sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += warp_sums[warp];
  return sum;
}

}  // namespace adamix
