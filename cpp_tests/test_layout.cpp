#include <gtest/gtest.h>

#include <vector>

#include "layout/packed_layout.h"

namespace adamix {
namespace {

TEST(Layout, ThreeBitWordsAreReadOffInOctal) {
  // Octal digits are 3-bit codes, the lowest digit first. 21 of them fill all but one bit of two
  // words.
  uint32_t block[3] = {};
  for (int i = 0; i < kBlockCodes; ++i) write_code(block, i, 3, static_cast<uint32_t>(i % 8));
  const uint64_t codes_0_to_20 = 04'3210'7654'3210'7654'3210;
  const uint64_t codes_21_to_31 = 0765'4321'0765;
  EXPECT_EQ(block[0], static_cast<uint32_t>(codes_0_to_20));
  EXPECT_EQ(block[1], static_cast<uint32_t>(codes_0_to_20 >> 32 | codes_21_to_31 << 31));
  EXPECT_EQ(block[2], static_cast<uint32_t>(codes_21_to_31 >> 1));
}

TEST(Layout, EightBitCodesAreBytes) {
  uint32_t block[8] = {};
  for (int i = 0; i < 4; ++i) write_code(block, i, 8, 0x11u * static_cast<uint32_t>(i + 1));
  EXPECT_EQ(block[0], 0x44332211u);
}

TEST(Layout, ABlockTakesAsManyWordsAsItsCodesHaveBits) {
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    EXPECT_EQ(lane_words(0, bits), 0);
    EXPECT_EQ(lane_words(1, bits), bits);
    EXPECT_EQ(lane_words(31, bits), bits);
    EXPECT_EQ(lane_words(32, bits), bits);
    EXPECT_EQ(lane_words(33, bits), 2 * bits);
  }
  EXPECT_EQ(lane_words(int64_t{1} << 40, 8), int64_t{1} << 38);
}

TEST(Layout, LevelsAreTheOddIntegersRoundZero) {
  const std::vector<int> three = {-7, -5, -3, -1, 1, 3, 5, 7};
  for (int code = 0; code < 8; ++code) {
    EXPECT_EQ(level(static_cast<uint32_t>(code), 3), three[static_cast<size_t>(code)]);
  }
  EXPECT_EQ(level(0, 1), -1);
  EXPECT_EQ(level(1, 1), 1);
  EXPECT_EQ(level(255, 8), 255);
}

TEST(Layout, WriteCodeChangesNoOtherCode) {
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    for (const uint32_t background : {0u, max_code(bits)}) {
      for (int i = 0; i < kBlockCodes; ++i) {
        std::vector<uint32_t> block(static_cast<size_t>(bits) + 1, background ? ~0u : 0u);
        const uint32_t code = 0xa5u & max_code(bits);
        write_code(block.data(), i, bits, code);
        for (int k = 0; k < kBlockCodes; ++k) {
          EXPECT_EQ(read_code(block.data(), k, bits), k == i ? code : background)
              << bits << " bits, wrote " << i << ", read " << k;
        }
        EXPECT_EQ(block.back(), background ? ~0u : 0u) << "wrote behind the block";
      }
    }
  }
}

// 33 codes: two blocks a lane. Two components of 8 bits, none of 7..4, three of 3 bits, one of 1
// bit.
constexpr int64_t kCounts[kMaxBits] = {2, 0, 0, 0, 0, 3, 0, 1};

TEST(Layout, SegmentsFollowEachOtherByWidthDescending) {
  EXPECT_EQ(component_count(kCounts), 6);
  EXPECT_EQ(factor_words(33, kCounts), 2 * 16 + 3 * 6 + 2);
  const int bits[] = {8, 8, 3, 3, 3, 1};
  const int64_t offsets[] = {0, 16, 32, 38, 44, 50};
  for (int component = 0; component < 6; ++component) {
    const Lane lane = locate_lane(33, kCounts, component);
    EXPECT_EQ(lane.bits, bits[component]);
    EXPECT_EQ(lane.offset, offsets[component]);
  }
}

TEST(Layout, TheTableHasAColumnAWidthBehindTheOffsets) {
  EXPECT_EQ(kTableFirstCount, 3);
  EXPECT_EQ(kTableColumns, 11);
}

}  // namespace
}  // namespace adamix
