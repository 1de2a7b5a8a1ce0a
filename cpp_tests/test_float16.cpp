#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "common/float16.h"

namespace adamix {
namespace {

template <typename T>
uint16_t rounded_bits(float value) {
  return from_float<T>(value).bits;
}

TEST(Float16, KnownValues) {
  EXPECT_EQ(to_float(Half{0x3c00}), 1.0f);
  EXPECT_EQ(to_float(Half{0xc000}), -2.0f);
  EXPECT_EQ(to_float(Half{0x7bff}), 65504.0f);
  EXPECT_EQ(to_float(Half{0x0001}), 0x1p-24f);
  EXPECT_EQ(to_float(BFloat16{0x3f80}), 1.0f);
  EXPECT_EQ(to_float(BFloat16{0xc040}), -3.0f);
}

template <typename T>
class Float16Types : public ::testing::Test {
 protected:
  static constexpr uint16_t kInfinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
};
using Types = ::testing::Types<Half, BFloat16>;
TYPED_TEST_SUITE(Float16Types, Types);

TYPED_TEST(Float16Types, EveryValueSurvivesTheWayToFp32AndBack) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const TypeParam value{static_cast<uint16_t>(bits)};
    const bool is_nan = (bits & 0x7fff) > this->kInfinity;
    EXPECT_EQ(std::isnan(to_float(value)), is_nan);
    const uint16_t back = rounded_bits<TypeParam>(to_float(value));
    if (is_nan) {
      EXPECT_GT(back & 0x7fff, this->kInfinity);
    } else {
      EXPECT_EQ(back, bits);
    }
  }
}

TYPED_TEST(Float16Types, TiesBetweenNeighboursGoToTheEvenOne) {
  // fp32 has every midpoint exactly; up to the largest finite value's upper neighbour, infinity.
  for (uint32_t bits = 0; bits + 1 < this->kInfinity; ++bits) {
    const float low = to_float(TypeParam{static_cast<uint16_t>(bits)});
    const float high = to_float(TypeParam{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    EXPECT_EQ(rounded_bits<TypeParam>(middle), bits + (bits & 1));
    EXPECT_EQ(rounded_bits<TypeParam>(std::nextafter(middle, 0.0f)), bits);
    EXPECT_EQ(rounded_bits<TypeParam>(std::nextafter(middle, high)), bits + 1);
    EXPECT_EQ(rounded_bits<TypeParam>(-middle), 0x8000 | (bits + (bits & 1)));
  }
}

TYPED_TEST(Float16Types, WhatIsTooLargeBecomesInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(rounded_bits<TypeParam>(infinity), this->kInfinity);
  EXPECT_EQ(rounded_bits<TypeParam>(-infinity), 0x8000 | this->kInfinity);
  EXPECT_EQ(rounded_bits<TypeParam>(std::numeric_limits<float>::max()), this->kInfinity);
}

TEST(Float16, HalfRoundsToInfinityFrom65520On) {
  EXPECT_EQ(rounded_bits<Half>(65520.0f), 0x7c00);
  EXPECT_EQ(rounded_bits<Half>(std::nextafter(65520.0f, 0.0f)), 0x7bff);
}

}  // namespace
}  // namespace adamix
