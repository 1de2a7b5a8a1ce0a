#pragma once

#include <cstdint>
#include <cstring>

// The two 16-bit floating-point types, without torch or CUDA. Conversions to them round to nearest,
// ties to even; infinities stay, NaN stays NaN. No branch and no denormal fp32 arithmetic, so they
// vectorise and flush-to-zero modes do not reach them.
namespace adamix {

struct Half {
  uint16_t bits;  // 1 sign, 5 exponent (bias 15), 10 mantissa
};

struct BFloat16 {
  uint16_t bits;  // the upper half of an fp32
};

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) {
  return value;
}

inline float to_float(BFloat16 value) {
  return float_from_bits(uint32_t{value.bits} << 16);
}

inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t denormal =
      float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity, NaN
  const uint32_t finite = magnitude < 0x0400u ? denormal : normal;
  return float_from_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

template <>
inline Half from_float<Half>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5f has an ulp of 2^-24, the spacing of half's denormals: the addition rounds, the subtraction
  // reads it off.
  const uint32_t denormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t result = magnitude < 0x38800000u ? denormal : normal;  // 2^-14
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace adamix
