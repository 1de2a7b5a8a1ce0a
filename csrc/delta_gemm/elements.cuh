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

// body(T{}) with the type that `element` names.
template <typename Body>
__device__ __forceinline__ void with_element(Element element, Body&& body) {
  switch (element) {
    case Element::kHalf: body(__half{}); break;
    case Element::kBFloat16: body(__nv_bfloat16{}); break;
    default: body(float{});
  }
}

// Eight adjacent elements as they are: 16 bytes, or 32 of fp32.
template <typename T>
struct Eight {
  static constexpr int kWords = 8 * sizeof(T) / 4;
  uint32_t words[kWords];

  // Elements i .. of `count`, zeros behind them; vector: whether they may be read 16 bytes at a
  // time.
  __device__ __forceinline__ void load(const T* data, int64_t i, int64_t count, bool vector) {
    if (vector && i + 8 <= count) {
#pragma unroll
      for (int j = 0; j < kWords; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(data + i + j * (8 / kWords));
        words[j] = four.x, words[j + 1] = four.y, words[j + 2] = four.z, words[j + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      words[j] = 0;
#pragma unroll
      for (int k = 0; k < 8 / kWords; ++k) {
        const int64_t at = i + j * (8 / kWords) + k;
        if (at < count) words[j] |= raw(data[at]) << 16 * k;
      }
    }
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else {
      return widen(from_bits<T>(words[i / 2] >> i % 2 * 16));
    }
  }

 private:
  __device__ __forceinline__ static uint32_t raw(T value) {
    if constexpr (std::is_same_v<T, float>) {
      return __float_as_uint(value);
    } else {
      return bits_of(value);
    }
  }
};

// Elements i and i + 1 of `count` of 16 bits, those that are there; aligned: to 4 bytes.
__device__ __forceinline__ uint32_t load_pair(const uint16_t* data, int i, int count,
                                              bool aligned) {
  if (aligned && i + 1 < count) return *reinterpret_cast<const uint32_t*>(data + i);
  uint32_t pair = 0;
  if (i < count) pair = data[i];
  if (i + 1 < count) pair |= uint32_t{data[i + 1]} << 16;
  return pair;
}

__device__ __forceinline__ void store_pair(uint16_t* data, int i, int count, bool aligned,
                                           uint32_t pair) {
  if (aligned && i + 1 < count) {
    *reinterpret_cast<uint32_t*>(data + i) = pair;
    return;
  }
  if (i < count) data[i] = static_cast<uint16_t>(pair);
  if (i + 1 < count) data[i + 1] = static_cast<uint16_t>(pair >> 16);
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
