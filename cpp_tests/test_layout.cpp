#include <gtest/gtest.h>

#include <vector>

#include "common/for_bits.h"
#include "layout/block_bytes.h"
#include "layout/packed_layout.h"

namespace adamix {
namespace {

std::vector<uint32_t> block_of(int bits, const std::vector<uint32_t>& codes) {
  std::vector<uint32_t> block(static_cast<size_t>(bits), 0);
  for (size_t i = 0; i < codes.size(); ++i) {
    write_code(block.data(), static_cast<int>(i), bits, codes[i]);
  }
  return block;
}

TEST(Layout, EightBitCodesAreBytesTheMiddleTwoSwapped) {
  const auto block = block_of(8, {0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88});
  EXPECT_EQ(block, (std::vector<uint32_t>{0x44223311u, 0x88667755u, 0, 0, 0, 0, 0, 0}));
}

TEST(Layout, FourBitCodesAreHexDigitsTwoFieldsAWord) {
  // Codes 0..3 are the lower digits of bytes 0, 2, 1, 3, codes 4..7 the upper ones; 8.. follow in
  // word 1.
  const auto block = block_of(4, {0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x8, 0x9, 0xa});
  EXPECT_EQ(block, (std::vector<uint32_t>{0x84'62'73'51u, 0x00'0a'00'09u, 0, 0}));
}

TEST(Layout, OneBitCodesAreBitFOfAByte) {
  std::vector<uint32_t> codes(32, 0);
  codes[0] = codes[5] = codes[10] = codes[31] = 1;  // fields 0, 1, 2, 7; bytes 0, 2, 1, 3
  EXPECT_EQ(block_of(1, codes), (std::vector<uint32_t>{0b10000000'00000010'00000100'00000001u}));
}

// The header's drawing: two whole fields a byte, and the bits left over, read from word 0 on, are
// fields 6 and 7.
TEST(Layout, ThreeBitFieldsAreReadOffTheDrawing) {
  std::vector<uint32_t> codes(32, 0);
  const uint32_t first_of_field[] = {1, 2, 3, 4, 5, 6, 0b110, 0b101};
  for (size_t field = 0; field < 8; ++field) codes[4 * field] = first_of_field[field];
  EXPECT_EQ(block_of(3, codes),
            (std::vector<uint32_t>{0b10'010'001u, 0b11'100'011u, 0b10'110'101u}));
}

TEST(Layout, FiveSixAndSevenBitFieldsOfLeftoverBits) {
  // Three bits are left over a byte of b = 5, two of b = 6, one of b = 7; code 4f of each field.
  const auto in_byte_0 = [](int bits, std::vector<uint32_t> firsts) {
    std::vector<uint32_t> codes(32, 0);
    for (size_t field = 0; field < 8; ++field) codes[4 * field] = firsts[field];
    return block_of(bits, codes);
  };
  // Fields 5, 6, 7 of b = 5 are 00001, 00110, 11000: the leftover stream, lowest bit first, is
  // 10000 01100 00011, in threes 100 000 110 000 011.
  EXPECT_EQ(in_byte_0(5, {0, 0, 0, 0, 31, 1, 6, 24}),
            (std::vector<uint32_t>{0b001'00000u, 0b000'00000u, 0b011'00000u, 0b000'00000u,
                                   0b110'11111u}));
  // Fields 6, 7 of b = 6 are 000011, 100100: 110000 001001, in twos 11 00 00 00 10 01.
  EXPECT_EQ(in_byte_0(6, {63, 0, 0, 0, 0, 0, 3, 36}),
            (std::vector<uint32_t>{0b11'111111u, 0, 0, 0, 0b01'000000u, 0b10'000000u}));
  // Field 7 of b = 7 is 1000110: bit 7 of words 1, 2 and 6.
  EXPECT_EQ(in_byte_0(7, {0, 0, 0, 127, 0, 0, 0, 70}),
            (std::vector<uint32_t>{0, 0x80u, 0x80u, 0x7fu, 0, 0, 0x80u}));
}

template <typename Body>
void for_all_bits(Body body) {
  for (int bits = 1; bits <= kMaxBits; ++bits) for_bits(bits, body);
}

// Codes that differ from one place to the next at every width.
uint32_t code_at(int i, int bits) {
  return static_cast<uint32_t>(i * 37 + i / 3 + 11) & max_code(bits);
}

TEST(Layout, FieldsAreFourCodesInTheOrderOfTheBytes) {
  for_all_bits([](auto width) {
    constexpr int kBits = width;
    uint32_t one_by_one[kBits] = {}, by_field[kBits] = {};
    for (int i = 0; i < kBlockCodes; ++i) write_code(one_by_one, i, kBits, code_at(i, kBits));
    for (int field = 0; field < kBlockFields; ++field) {
      const auto code = [&](int i) { return code_at(kFieldCodes * field + i, kBits); };
      const uint32_t in_order = code(0) | code(1) << 8 | code(2) << 16 | code(3) << 24;
      const uint32_t expected = code(0) | code(2) << 8 | code(1) << 16 | code(3) << 24;
      EXPECT_EQ(swap_middle_bytes(in_order), expected);
      EXPECT_EQ(read_field<kBits>(one_by_one, field), expected) << kBits << ", field " << field;
      or_field<kBits>(by_field, field, expected);
    }
    for (int word = 0; word < kBits; ++word) EXPECT_EQ(by_field[word], one_by_one[word]) << kBits;
  });
}

TEST(Layout, BlocksOfBytesAreTheCodesInTheirOrder) {
  for_all_bits([](auto width) {
    constexpr int kBits = width;
    uint32_t expected[kBits] = {}, words[kBits], bytes[kBlockFields] = {}, back[kBlockFields];
    for (int i = 0; i < kBlockCodes; ++i) {
      write_code(expected, i, kBits, code_at(i, kBits));
      bytes[i / 4] |= code_at(i, kBits) << (8 * (i % 4));
    }
    pack_block<kBits>(bytes, words);
    unpack_block<kBits>(words, back);
    for (int i = 0; i < kBits; ++i) EXPECT_EQ(words[i], expected[i]) << kBits << " bits";
    for (int i = 0; i < kBlockFields; ++i) EXPECT_EQ(back[i], bytes[i]) << kBits << " bits";
    for (auto& word : bytes) word |= ~(kEveryByte * max_code(kBits));  // too wide, every one
    pack_block<kBits>(bytes, words);
    for (int i = 0; i < kBits; ++i) EXPECT_EQ(words[i], expected[i]) << kBits << " bits, too wide";
  });
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

// Two components of 8 bits, none of 7..4, three of 3 bits, one of 1 bit.
constexpr int64_t kCounts[kMaxBits] = {2, 0, 0, 0, 0, 3, 0, 1};

TEST(Layout, PanelsAreEightBlocksAndTheLastOneWhatIsLeft) {
  EXPECT_EQ(kPanelCodes, 256);
  EXPECT_EQ(kPanelBlocks, 8);
  EXPECT_EQ(panel_count(0), 0);
  EXPECT_EQ(panel_count(1), 1);
  EXPECT_EQ(panel_count(256), 1);
  EXPECT_EQ(panel_count(257), 2);
  EXPECT_EQ(panel_blocks(1, 0), 1);
  EXPECT_EQ(panel_blocks(225, 0), 8);
  EXPECT_EQ(panel_blocks(256, 0), 8);
  EXPECT_EQ(panel_blocks(257, 1), 1);
  EXPECT_EQ(panel_blocks(700, 1), 8);
  EXPECT_EQ(panel_blocks(700, 2), 6);  // 188 codes
}

TEST(Layout, LanesFollowEachOtherByWidthDescending) {
  EXPECT_EQ(component_count(kCounts), 6);
  EXPECT_EQ(block_column_words(kCounts), 8 + 8 + 3 + 3 + 3 + 1);
  EXPECT_EQ(factor_words(33, kCounts), 2 * 26);
  const int bits[] = {8, 8, 3, 3, 3, 1};
  const int64_t words_before[] = {0, 8, 16, 19, 22, 25};
  for (int component = 0; component < 6; ++component) {
    const Lane lane = locate_lane(kCounts, component);
    EXPECT_EQ(lane.bits, bits[component]);
    EXPECT_EQ(lane.words_before, words_before[component]);
  }
}

TEST(Layout, EveryWordOfAFactorBelongsToOneLaneOfOnePanel) {
  for (const int64_t codes : {1, 32, 33, 255, 256, 257, 700}) {
    int64_t next = 0;  // the panels' lanes in the drawing's order
    for (int64_t panel = 0; panel < panel_count(codes); ++panel) {
      for (int component = 0; component < 6; ++component) {
        const Lane lane = locate_lane(kCounts, component);
        EXPECT_EQ(panel * kPanelBlocks * block_column_words(kCounts) +
                      panel_blocks(codes, panel) * lane.words_before,
                  next)
            << codes << " codes, panel " << panel << ", component " << component;
        next += panel_blocks(codes, panel) * lane.bits;
      }
    }
    EXPECT_EQ(next, factor_words(codes, kCounts)) << codes << " codes";
  }
}

TEST(Layout, TheTableHasAColumnAWidthBehindTheOffsets) {
  EXPECT_EQ(kTableFirstVCount, 3);
  EXPECT_EQ(kTableFirstUCount, 11);
  EXPECT_EQ(kTableColumns, 19);
}

}  // namespace
}  // namespace adamix
