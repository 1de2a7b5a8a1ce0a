#include <gtest/gtest.h>

#include <cmath>

#include "bank.h"
#include "common/float16.h"
#include "delta_gemm/delta_gemm.h"
#include "layout/packed_layout.h"
#include "testing.h"

namespace adamix {
namespace {

using testing::Bank;
using testing::const_view;
using testing::Gain;
using testing::gain_of;
using testing::in_fp32;
using testing::mixed_bank;
using testing::random_normal;
using testing::random_numbers;
using testing::rounding_of;
using testing::threads_for;

template <typename T>
void run(const Bank& bank, const std::vector<T>& x, const std::vector<int32_t>& slots,
         std::vector<T>& y, int64_t y_stride, const ParallelFor& parallel = serial_for) {
  const int64_t tokens = static_cast<int64_t>(slots.size());
  delta_gemm_cpu<T>({{y.data(), tokens, bank.out, y_stride},
                     const_view(x, tokens, bank.in),
                     bank.arena.data(),
                     const_view(bank.table, bank.capacity(), kTableColumns),
                     slots.data()},
                    parallel);
}

// Runs on random x and y and checks every element: fp32 sums of in + rank terms, one rounding to T.
template <typename T>
void check(const Bank& bank, const std::vector<int32_t>& slots) {
  const int64_t tokens = static_cast<int64_t>(slots.size()), stride = bank.out + 2;
  const auto x = random_numbers<T>(tokens * bank.in, 1.0f, 5);
  auto y = random_numbers<T>(tokens * stride, 1e-2f, 6);
  const auto x_exact = in_fp32(x), y_before = in_fp32(y);
  run(bank, x, slots, y, stride);
  const double sums = static_cast<double>(bank.in + bank.max_rank() + 8) * 0x1p-24;
  for (int64_t t = 0; t < tokens; ++t) {
    const Gain gain = gain_of(bank, slots[t], &x_exact[t * bank.in]);
    for (int64_t row = 0; row < stride; ++row) {
      const double before = y_before[t * stride + row];
      double exact = before, bound = 0;
      if (row < bank.out && !gain.exact.empty()) {
        exact += gain.exact[row];
        bound =
            sums * (gain.magnitude[row] + std::abs(before)) + rounding_of<T>() * std::abs(exact);
      }
      ASSERT_LE(std::abs(to_float(y[t * stride + row]) - exact), bound)
          << "token " << t << ", row " << row;
    }
  }
}

TEST(DeltaGemm, ByHand) {
  // V = [1, -1, 1] at one bit, U = [3, -1] at two, scale 0.5: z = 0.5 * (1 - 2 + 4) = 1.5. Codes 0,
  // 1, 2 are in bytes 0, 2, 1.
  const std::vector<uint32_t> arena = {0x00'00'01'01u, 0x00'01'00'03u, 0u, float_bits(0.5f)};
  const std::vector<int64_t> table = {0, 1, 3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0};
  const std::vector<float> x = {1, 2, 4};
  const std::vector<int32_t> slots = {0};
  std::vector<float> y = {10, 20};
  delta_gemm_cpu<float>({{y.data(), 1, 2, 2},
                         const_view(x, 1, 3),
                         arena.data(),
                         const_view(table, 1, kTableColumns),
                         slots.data()},
                        serial_for);
  EXPECT_EQ(y, (std::vector<float>{14.5f, 18.5f}));
}

class DeltaGemmSizes : public ::testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(DeltaGemmSizes, MixedSlotsMatchPlainLoops) {
  const Bank bank = mixed_bank(GetParam().first, GetParam().second);
  const std::vector<int32_t> slots = {3, 0, -1, 2, 0, 1, 4, 3, 0, 0, 0, -2147483647, 2147483647};
  check<float>(bank, slots);
  check<Half>(bank, slots);
  check<BFloat16>(bank, slots);
}

INSTANTIATE_TEST_SUITE_P(Edges, DeltaGemmSizes,
                         ::testing::Values(std::pair<int64_t, int64_t>{1, 1}, std::pair{31, 33},
                                           std::pair{32, 32}, std::pair{33, 31},
                                           std::pair{129, 511}, std::pair{64, 512},
                                           std::pair{40, 513}, std::pair{300, 1100},
                                           std::pair{255, 257}, std::pair{256, 256},
                                           std::pair{257, 255}, std::pair{800, 700}));

TEST(DeltaGemm, MoreTokensThanAGroupHolds) {
  std::vector<int32_t> slots(200, 3);
  slots[70] = 0;
  slots[71] = -1;
  check<float>(mixed_bank(45, 70), slots);
}

TEST(DeltaGemm, ATokenDoesNotFeelItsNeighbours) {
  const Bank bank = mixed_bank(100, 70);
  const auto x = random_normal(9 * 100, 7);
  std::vector<float> together(9 * 70), alone(70);
  run(bank, x, std::vector<int32_t>(9, 0), together, 70);
  for (size_t t = 0; t < 9; ++t) {
    std::fill(alone.begin(), alone.end(), 0.0f);
    run(bank, std::vector<float>(&x[t * 100], &x[t * 100] + 100), {0}, alone, 70);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), &together[t * 70])) << "token " << t;
  }
}

TEST(DeltaGemm, ThreadsChangeNothing) {
  const Bank bank = mixed_bank(129, 1100);
  const auto x = random_normal(7 * 129, 8);
  const std::vector<int32_t> slots = {3, 0, 2, -1, 0, 3, 0};
  std::vector<float> alone(7 * 1100), together(alone.size());
  run(bank, x, slots, alone, 1100);
  run(bank, x, slots, together, 1100, threads_for(3));
  EXPECT_EQ(alone, together);
}

TEST(DeltaGemm, NothingToDo) {
  std::vector<float> none;
  run(mixed_bank(5, 6), none, {}, none, 6);
  run(mixed_bank(0, 0), none, {0, 1}, none, 0);
}

}  // namespace
}  // namespace adamix
