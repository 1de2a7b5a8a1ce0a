#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// Elements of x and y, whatever their type.
namespace adamix {

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

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <typename T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    return bits_of(__float2half_rn(first)) | bits_of(__float2half_rn(second)) << 16;
  } else {
    return bits_of(__float2bfloat16_rn(first)) | bits_of(__float2bfloat16_rn(second)) << 16;
  }
}

// Elements i .. i + 7 of `count`, zeros behind them, one by one; rare, so kept out of the loops.
template <typename T>
__device__ __noinline__ void load_eight_singly(const T* data, int64_t i, int64_t count, T* eight) {
#pragma unroll 1
  for (int j = 0; j < 8; ++j) eight[j] = i + j < count ? data[i + j] : narrow<T>(0.0f);
}

// Eight adjacent elements as they are: 16 bytes, or 32 of fp32.
template <typename T>
struct alignas(16) Eight {
  static constexpr int kWords = 8 * sizeof(T) / 4;
  uint32_t words[kWords];

  // vector: whether they may be read 16 bytes at a time.
  __device__ __forceinline__ void load(const T* data, int64_t i, int64_t count, bool vector) {
    if (vector && i + 8 <= count) return load_vector(data + i);
    Eight<T> singly;
    load_eight_singly(data, i, count, reinterpret_cast<T*>(&singly));
#pragma unroll
    for (int j = 0; j < kWords; j += 4) set(j, reinterpret_cast<const uint4*>(&singly)[j / 4]);
  }

  __device__ __forceinline__ void load_vector(const T* data) {
#pragma unroll
    for (int j = 0; j < kWords; j += 4) set(j, *reinterpret_cast<const uint4*>(data + j));
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else {
      return widen(from_bits<T>(words[i / 2] >> i % 2 * 16));
    }
  }

  // The largest magnitude of these and those before, 0 at first: magnitudes order as their bits
  // do, a NaN above all. Two at a time where two are in a word.
  __device__ __forceinline__ uint32_t largest(uint32_t before) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if constexpr (std::is_same_v<T, float>) {
        before = max(before, words[j] & 0x7fffffffu);
      } else {
        before = __vmaxu2(before, words[j] & 0x7fff7fffu);
      }
    }
    return before;
  }

  // As the bits of an fp32.
  __device__ __forceinline__ static uint32_t bits_of_largest(uint32_t largest) {
    if constexpr (std::is_same_v<T, float>) {
      return largest;
    } else {
      return __float_as_uint(widen(from_bits<T>(max(largest & 0xffffu, largest >> 16))));
    }
  }

 private:
  __device__ __forceinline__ void set(int j, const uint4& four) {
    words[j] = four.x, words[j + 1] = four.y, words[j + 2] = four.z, words[j + 3] = four.w;
  }
};

// Two adjacent elements of y, read, added to and written at once where they are aligned.
template <typename T>
class Two {
 public:
  __device__ __forceinline__ Two(T* data, int count, bool aligned)
      : data_(data), second_(count > 1), together_(aligned && count > 1) {
    if (together_) {
      const Both both = *reinterpret_cast<const Both*>(data);
      memcpy(values_, &both, sizeof(both));
    } else {
      values_[0] = data[0];
      if (second_) values_[1] = data[1];
    }
  }

  __device__ __forceinline__ void add(float first, float second) {
    values_[0] = narrow<T>(widen(values_[0]) + first);
    values_[1] = narrow<T>(widen(values_[1]) + second);
  }

  __device__ __forceinline__ void store() const {
    if (together_) {
      Both both;
      memcpy(&both, values_, sizeof(both));
      *reinterpret_cast<Both*>(data_) = both;
    } else {
      data_[0] = values_[0];
      if (second_) data_[1] = values_[1];
    }
  }

 private:
  using Both = std::conditional_t<sizeof(T) == 4, uint2, uint32_t>;

  T* data_;
  bool second_, together_;
  T values_[2] = {};
};

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
