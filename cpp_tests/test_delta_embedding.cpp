#include <gtest/gtest.h>

#include <cmath>

#include "bank.h"
#include "common/float16.h"
#include "delta_embedding/delta_embedding.h"
#include "layout/packed_layout.h"
#include "testing.h"

namespace adamix {
namespace {

using testing::Bank;
using testing::const_view;
using testing::in_fp32;
using testing::mixed_bank;
using testing::random_numbers;
using testing::row_gain_of;
using testing::RowGain;
using testing::threads_for;

constexpr int32_t kLeast = -2147483647, kMost = 2147483647;

// Banks have V of bank.in codes, the hidden size, and U of bank.out, the vocabulary.
template <typename T, typename Id>
void run(const Bank& bank, const std::vector<Id>& tokens, const std::vector<int32_t>& slots,
         std::vector<T>& y, int64_t y_stride, const ParallelFor& parallel = serial_for) {
  delta_embedding_cpu<T>({{y.data(), static_cast<int64_t>(tokens.size()), bank.in, y_stride},
                          {tokens.data(), sizeof(Id) == 8},
                          bank.out,
                          bank.arena.data(),
                          const_view(bank.table, bank.capacity(), kTableColumns),
                          slots.data()},
                         parallel);
}

// Every element: fp32 sums of as many terms as there are components, one rounding to T.
template <typename T, typename Id>
void check(const Bank& bank, const std::vector<Id>& tokens, const std::vector<int32_t>& slots) {
  const auto count = static_cast<int64_t>(tokens.size()), stride = bank.in + 2;
  auto y = random_numbers<T>(count * stride, 1e-2f, 6);
  const auto y_before = in_fp32(y);
  run(bank, tokens, slots, y, stride);
  // w, its product, the sum over components, y.
  const double sums = static_cast<double>(bank.max_rank() + 3) * 0x1p-24;
  for (int64_t t = 0; t < count; ++t) {
    const RowGain gain = row_gain_of(bank, slots[t], tokens[t]);
    for (int64_t h = 0; h < stride; ++h) {
      const double before = y_before[t * stride + h];
      double exact = before, bound = 0;
      if (h < bank.in && !gain.exact.empty()) {
        exact += gain.exact[h];
        bound = sums * (gain.magnitude[h] + std::abs(before)) + testing::rounding_at<T>(exact);
      }
      ASSERT_LE(std::abs(to_float(y[t * stride + h]) - exact), bound)
          << "token " << t << ", column " << h;
    }
  }
}

TEST(DeltaEmbedding, ByHand) {
  // Two bits, scale 0.5: V = [3, -3], U = [-1, 1]; one bit, scale 2: V = [-1, 1], U = [1, 1]. Codes
  // 0 and 1 are in bytes 0 and 2.
  const std::vector<uint32_t> arena = {
      0x00'00'00'03u,  0u, 0x00'01'00'00u, 0x00'02'00'01u, 0u, 0x00'01'00'01u, float_bits(0.5f),
      float_bits(2.0f)};
  const std::vector<int64_t> table = {0, 3, 6, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1};
  const std::vector<int64_t> tokens = {0, 1, 2, -1, 0};
  const std::vector<int32_t> slots = {0, 0, 0, 0, 1};
  std::vector<float> y = {10, 20, 30, 40, 50, 60, 70, 80, 90, 100};
  delta_embedding_cpu<float>({{y.data(), 5, 2, 2},
                              {tokens.data(), true},
                              2,
                              arena.data(),
                              const_view(table, 1, kTableColumns),
                              slots.data()},
                             serial_for);
  EXPECT_EQ(y, (std::vector<float>{6.5f, 23.5f, 29.5f, 40.5f, 50, 60, 70, 80, 90, 100}));
}

class DeltaEmbeddingSizes : public ::testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(DeltaEmbeddingSizes, MixedSlotsMatchPlainLoops) {
  const auto [vocab, hidden] = GetParam();
  const Bank bank = mixed_bank(hidden, vocab);
  const std::vector<int32_t> slots = {3, 0, -1, 2, 0, 1, 4, 3, 0, 0, 0, kLeast, kMost};
  const auto last = static_cast<int32_t>(vocab) - 1;
  const std::vector<int32_t> tokens = {0,        last,  0,        last / 2, last + 1, 0,   last,
                                       last / 3, kMost, last / 2, kLeast,   0,        last};
  check<float>(bank, tokens, slots);
  check<Half>(bank, std::vector<int64_t>(tokens.begin(), tokens.end()), slots);
  check<BFloat16>(bank, tokens, slots);
}

INSTANTIATE_TEST_SUITE_P(Edges, DeltaEmbeddingSizes,
                         ::testing::Values(std::pair<int64_t, int64_t>{1, 1}, std::pair{33, 31},
                                           std::pair{32, 32}, std::pair{100, 257},
                                           std::pair{257, 100}, std::pair{1100, 513},
                                           std::pair{256, 256}, std::pair{700, 800}));

TEST(DeltaEmbedding, EveryTokenOfAVocabulary) {
  const Bank bank = mixed_bank(45, 300);
  std::vector<int64_t> tokens;
  for (int64_t token = -2; token < 303; ++token) tokens.push_back(token);
  check<float>(bank, tokens, std::vector<int32_t>(tokens.size(), 0));
}

TEST(DeltaEmbedding, ThreadsAndCompanyChangeNothing) {
  const Bank bank = mixed_bank(1100, 90);
  const std::vector<int32_t> slots = {3, 0, 2, -1, 0, 3, 0}, tokens = {89, 0, 3, 4, 0, 32, 31};
  std::vector<float> alone(7 * 1100), together(alone.size()), one(1100);
  run(bank, tokens, slots, alone, 1100);
  run(bank, tokens, slots, together, 1100, threads_for(3));
  EXPECT_EQ(alone, together);
  for (size_t t = 0; t < 7; ++t) {
    std::fill(one.begin(), one.end(), 0.0f);
    run(bank, std::vector<int32_t>{tokens[t]}, {slots[t]}, one, 1100);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), &together[t * 1100])) << "token " << t;
  }
}

TEST(DeltaEmbedding, NothingToDo) {
  std::vector<float> none;
  run(mixed_bank(6, 5), std::vector<int32_t>{}, {}, none, 6);
  run(mixed_bank(0, 0), std::vector<int32_t>{0, 1}, {0, 1}, none, 0);
}

}  // namespace
}  // namespace adamix
