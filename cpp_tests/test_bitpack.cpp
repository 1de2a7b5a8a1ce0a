#include <gtest/gtest.h>

#include "bitpack/bitpack.h"
#include "layout/packed_layout.h"
#include "testing.h"

namespace adamix {
namespace {

using testing::const_view;
using testing::random_codes;
using testing::threads_for;
using testing::view;

const int64_t kSizes[] = {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300};
constexpr int64_t kLanes = 3;
constexpr uint32_t kSentinel = 0xdeadbeefu;

class Bitpack : public ::testing::TestWithParam<int> {};

TEST(BitpackByHand, FourBitCodesAreHexDigits) {
  const std::vector<uint8_t> codes = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  std::vector<uint32_t> words(4, kSentinel);
  pack_cpu({view(words, 1, 4), const_view(codes, 1, 9), 4}, serial_for);
  EXPECT_EQ(words, (std::vector<uint32_t>{0x84627351u, 0x9u, 0, 0}));
}

TEST(BitpackByHand, OneBitCodesAreBits) {
  std::vector<uint8_t> codes(33, 0);
  codes[0] = codes[31] = codes[32] = 1;
  std::vector<uint32_t> words(2, kSentinel);
  pack_cpu({view(words, 1, 2), const_view(codes, 1, 33), 1}, serial_for);
  EXPECT_EQ(words, (std::vector<uint32_t>{0x80000001u, 1u}));
}

// Every code where the layout's one-by-one meaning has it, every other bit 0.
TEST_P(Bitpack, WordsHoldTheCodesAndZerosBehind) {
  const int bits = GetParam();
  for (const int64_t n : kSizes) {
    const int64_t words_a_lane = lane_words(n, bits);
    const auto codes = random_codes(kLanes * n, bits, 1);
    std::vector<uint32_t> words(static_cast<size_t>(kLanes * words_a_lane), kSentinel);
    pack_cpu({view(words, kLanes, words_a_lane), const_view(codes, kLanes, n), bits}, serial_for);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = 0; i < block_count(n) * kBlockCodes; ++i) {
        const uint32_t* block = &words[lane * words_a_lane + i / kBlockCodes * bits];
        const uint32_t expected = i < n ? codes[lane * n + i] : 0u;
        ASSERT_EQ(read_code(block, static_cast<int>(i % kBlockCodes), bits), expected)
            << n << " codes, lane " << lane << ", code " << i;
      }
    }
  }
}

TEST_P(Bitpack, UnpackInvertsPackInViewsOfLargerMatrices) {
  const int bits = GetParam();
  for (const int64_t n : kSizes) {
    const int64_t words_a_lane = lane_words(n, bits), word_stride = words_a_lane + 2;
    const auto codes = random_codes(kLanes * n, bits, 2);
    std::vector<uint32_t> words(static_cast<size_t>(kLanes * word_stride), kSentinel);
    std::vector<uint8_t> back(static_cast<size_t>(kLanes * (n + 3)), 0xaa);
    pack_cpu(
        {{words.data(), kLanes, words_a_lane, word_stride}, const_view(codes, kLanes, n), bits},
        serial_for);
    unpack_cpu(
        {{back.data(), kLanes, n, n + 3}, {words.data(), kLanes, words_a_lane, word_stride}, bits},
        serial_for);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(back[lane * (n + 3) + i], codes[lane * n + i]);
      for (int64_t i = n; i < n + 3; ++i) ASSERT_EQ(back[lane * (n + 3) + i], 0xaa);
      ASSERT_EQ(words[lane * word_stride + words_a_lane], kSentinel);
      ASSERT_EQ(words[lane * word_stride + words_a_lane + 1], kSentinel);
    }
  }
}

TEST_P(Bitpack, ThreadsChangeNothing) {
  const int bits = GetParam();
  const int64_t lanes = 17, n = 129, words_a_lane = lane_words(n, bits);
  const auto codes = random_codes(lanes * n, bits, 3);
  std::vector<uint32_t> alone(static_cast<size_t>(lanes * words_a_lane)), together(alone.size());
  pack_cpu({view(alone, lanes, words_a_lane), const_view(codes, lanes, n), bits}, serial_for);
  pack_cpu({view(together, lanes, words_a_lane), const_view(codes, lanes, n), bits},
           threads_for(3));
  EXPECT_EQ(alone, together);
  std::vector<uint8_t> back(codes.size());
  unpack_cpu({view(back, lanes, n), const_view(together, lanes, words_a_lane), bits},
             threads_for(3));
  EXPECT_EQ(back, codes);
}

INSTANTIATE_TEST_SUITE_P(Bits, Bitpack, ::testing::Range(1, kMaxBits + 1));

}  // namespace
}  // namespace adamix
