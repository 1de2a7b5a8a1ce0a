#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "delta_gemm/delta_gemm_cuda.h"

// Elements of x and y, whatever their type.
namespace adamix {

__device__ __forceinline__ float load_element(const void* data, int64_t i, Element element) {
  switch (element) {
    case Element::kHalf: return __half2float(static_cast<const __half*>(data)[i]);
    case Element::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void store_element(void* data, int64_t i, Element element, float value) {
  switch (element) {
    case Element::kHalf: static_cast<__half*>(data)[i] = __float2half_rn(value); return;
    case Element::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
      return;
    default: static_cast<float*>(data)[i] = value;
  }
}

template <typename T>
__device__ __forceinline__ uint32_t bits_of(T value) {
  uint16_t bits;
  static_assert(sizeof(T) == sizeof(bits));
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
__device__ __forceinline__ T from_bits(uint32_t bits) {
  const auto low = static_cast<uint16_t>(bits);
  T value;
  memcpy(&value, &low, sizeof(low));
  return value;
}

__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    return bits_of(__float2half_rn(first)) | bits_of(__float2half_rn(second)) << 16;
  } else {
    return bits_of(__float2bfloat16_rn(first)) | bits_of(__float2bfloat16_rn(second)) << 16;
  }
}

// Four adjacent elements at a multiple of four, zeros from `count` on; vector: whether they may be
// read at once.
__device__ __forceinline__ void load_four(const void* data, int64_t i, int64_t count, bool vector,
                                          Element element, float (&values)[4]) {
  if (vector && count >= 4) {
    if (element == Element::kFloat) {
      const auto four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
      return;
    }
    const auto two = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + i);
    const uint32_t pair[2] = {two.x, two.y};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t bits = pair[j / 2] >> j % 2 * 16;
      values[j] = element == Element::kHalf ? widen(from_bits<__half>(bits))
                                            : widen(from_bits<__nv_bfloat16>(bits));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) values[j] = j < count ? load_element(data, i + j, element) : 0.0f;
}

// The bits of a whole number 1..255, exact in both types.
__host__ __device__ constexpr uint32_t bfloat16_bits(uint32_t number) {
  uint32_t exponent = 0;
  while (number >> (exponent + 1) != 0) ++exponent;
  return (127 + exponent) << 7 | (number << (7 - exponent) & 0x7fu);
}

__host__ __device__ constexpr uint32_t half_bits(uint32_t number) {
  uint32_t exponent = 0;
  while (number >> (exponent + 1) != 0) ++exponent;
  return (15 + exponent) << 10 | (number << (10 - exponent) & 0x3ffu);
}

}  // namespace adamix
