// Both back ends on the same inputs: what one writes, to the bit, the other does, and leaves alone
// what it leaves alone. Skipped by name without a GPU.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bitpack/bitpack.h"
#include "bitpack/bitpack_cuda.h"
#include "device.h"
#include "layout/packed_layout.h"

namespace adamix {
namespace {

using testing::DeviceArray;
using testing::has_device;

class BitpackCuda : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
  }
};

std::vector<uint8_t> random_bytes(int64_t count) {
  std::mt19937 random(7);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

// How codes and words lie: a matrix of its own, rows that begin anywhere, and bases that are
// aligned to an element and no more. Bytes and words that are no part of a row are never written.
struct Placing {
  const char* name;
  int64_t code_lead, code_gap;  // codes before the first row, and behind each
  int64_t word_lead, word_gap;
};

const Placing kPlacings[] = {{"contiguous", 0, 0, 0, 0},
                             {"codes begin at an odd byte", 1, 0, 0, 0},
                             {"words begin at an odd word", 0, 0, 1, 0},
                             {"codes with gaps", 0, 3, 0, 0},
                             {"words with gaps", 0, 0, 0, 1},
                             {"whole pieces of 16 bytes apart", 0, 32, 0, 8},
                             {"all of it", 5, 7, 3, 5}};
const int64_t kSizes[] = {1, 31, 32, 33, 255, 256, 257, 1000, 1024, 3584};
const int64_t kLaneCounts[] = {1, 5, 67};
constexpr uint32_t kSentinel = 0xdeadbeefu;

// A matrix in a buffer of its own, with whatever lies round it.
template <typename T>
struct Plane {
  int64_t rows, cols, lead, stride;

  size_t size() const { return static_cast<size_t>(lead + rows * stride + 1); }
  template <typename U>
  MatrixView<U> in(U* buffer) const {
    return {buffer + lead, rows, cols, stride};
  }
};

struct Planes {
  Plane<uint8_t> codes;
  Plane<uint32_t> words;
};

template <typename Body>
void for_every_case(int bits, Body body) {
  for (const auto& placing : kPlacings) {
    for (const int64_t lanes : kLaneCounts) {
      for (const int64_t n : kSizes) {
        const int64_t words = lane_words(n, bits);
        SCOPED_TRACE(std::to_string(lanes) + " lanes of " + std::to_string(n) + " codes, " +
                     placing.name);
        body(Planes{{lanes, n, placing.code_lead, n + placing.code_gap},
                    {lanes, words, placing.word_lead, words + placing.word_gap}});
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

// Codes of all eight bits: the upper ones must not reach the neighbours. The CPU's kernel drops
// them too.
TEST_P(BitpackCuda, PackWritesTheSameWordsAndNothingElse) {
  const int bits = GetParam();
  for_every_case(bits, [&](const Planes& planes) {
    const auto codes = random_bytes(static_cast<int64_t>(planes.codes.size()));
    std::vector<uint32_t> expected(planes.words.size(), kSentinel);
    const DeviceArray<uint8_t> device_codes(codes);
    const DeviceArray<uint32_t> device_words(expected);
    pack_cpu({planes.words.in(expected.data()), planes.codes.in(codes.data()), bits}, serial_for);
    const uint8_t* source = device_codes.data();
    ASSERT_EQ(
        launch_pack({planes.words.in(device_words.data()), planes.codes.in(source), bits}, nullptr),
        cudaSuccess);
    EXPECT_EQ(device_words.to_host(), expected);
  });
}

TEST_P(BitpackCuda, UnpackReadsTheSameCodesAndWritesNothingElse) {
  const int bits = GetParam();
  for_every_case(bits, [&](const Planes& planes) {
    const auto bytes = random_bytes(4 * static_cast<int64_t>(planes.words.size()));
    std::vector<uint32_t> words(planes.words.size());  // any words are codes
    std::memcpy(words.data(), bytes.data(), bytes.size());
    std::vector<uint8_t> expected(planes.codes.size(), 0xaa);
    const DeviceArray<uint32_t> device_words(words);
    const DeviceArray<uint8_t> device_codes(expected);
    const uint32_t* here = words.data();
    unpack_cpu({planes.codes.in(expected.data()), planes.words.in(here), bits}, serial_for);
    const uint32_t* source = device_words.data();
    ASSERT_EQ(launch_unpack({planes.codes.in(device_codes.data()), planes.words.in(source), bits},
                            nullptr),
              cudaSuccess);
    EXPECT_EQ(device_codes.to_host(), expected);
  });
}

TEST_P(BitpackCuda, NoLanesAndNoCodesLaunchNothing) {
  const PackArgs pack{{nullptr, 0, 0, 0}, {nullptr, 0, 5, 5}, GetParam()};
  EXPECT_EQ(launch_pack(pack, nullptr), cudaSuccess);
  const UnpackArgs unpack{{nullptr, 5, 0, 0}, {nullptr, 5, 0, 0}, GetParam()};
  EXPECT_EQ(launch_unpack(unpack, nullptr), cudaSuccess);
}

INSTANTIATE_TEST_SUITE_P(Bits, BitpackCuda, ::testing::Range(1, kMaxBits + 1));

}  // namespace
}  // namespace adamix
