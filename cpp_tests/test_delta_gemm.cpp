#include <gtest/gtest.h>

#include <cmath>

#include "bitpack/bitpack.h"
#include "common/float16.h"
#include "delta_gemm/delta_gemm.h"
#include "layout/packed_layout.h"
#include "testing.h"

namespace adamix {
namespace {

using testing::const_view;
using testing::random_codes;
using testing::random_normal;
using testing::threads_for;

using Counts = std::vector<int64_t>;  // components at 8, 7 .. 1 bits

// A delta before it is packed: levels as plain numbers.
struct Delta {
  std::vector<std::vector<double>> v, u;  // [rank][in], [rank][out]
  std::vector<float> scales;
};

struct Bank {
  int64_t in, out;
  std::vector<uint32_t> arena = std::vector<uint32_t>(3, 0xdeadbeefu);  // nothing starts at word 0
  std::vector<int64_t> table = {};
  std::vector<Delta> deltas = {};

  int64_t capacity() const { return static_cast<int64_t>(deltas.size()); }

  std::vector<double> append_lane(const std::vector<uint8_t>& codes, int bits) {
    const int64_t n = static_cast<int64_t>(codes.size()), words = lane_words(n, bits);
    arena.resize(arena.size() + words);
    pack_cpu({{&*arena.end() - words, 1, words, words}, const_view(codes, 1, n), bits}, serial_for);
    std::vector<double> levels;
    for (const uint8_t code : codes) levels.push_back(level(code, bits));
    return levels;
  }

  void add(const Counts& counts, uint32_t seed) {
    Delta delta;
    std::vector<int64_t> row = {static_cast<int64_t>(arena.size())};
    for (auto* lanes : {&delta.v, &delta.u}) {
      const int64_t n = lanes == &delta.v ? in : out;
      for (int bits = kMaxBits; bits >= 1; --bits) {
        for (int64_t i = 0; i < counts[kMaxBits - bits]; ++i) {
          lanes->push_back(append_lane(random_codes(n, bits, seed++), bits));
        }
      }
      row.push_back(static_cast<int64_t>(arena.size()));
    }
    delta.scales = random_normal(static_cast<int64_t>(delta.v.size()), seed);
    for (auto& scale : delta.scales) arena.push_back(float_bits(scale *= 1e-4f));
    row.insert(row.end(), counts.begin(), counts.end());
    table.insert(table.end(), row.begin(), row.end());
    deltas.push_back(delta);
  }
};

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

// Plain loops in double; `magnitude` is the same product of absolute values.
double expected(const Bank& bank, int32_t slot, const float* x, int64_t row, double* magnitude) {
  double sum = 0;
  *magnitude = 0;
  if (slot < 0 || slot >= bank.capacity()) return 0;
  const Delta& delta = bank.deltas[static_cast<size_t>(slot)];
  for (size_t i = 0; i < delta.v.size(); ++i) {
    double dot = 0, dot_magnitude = 0;
    for (int64_t k = 0; k < bank.in; ++k) {
      dot += delta.v[i][k] * x[k];
      dot_magnitude += std::abs(delta.v[i][k] * x[k]);
    }
    sum += delta.u[i][row] * delta.scales[i] * dot;
    *magnitude += std::abs(delta.u[i][row] * delta.scales[i]) * dot_magnitude;
  }
  return sum;
}

// Runs on random x and y and checks every element: fp32 sums of in + rank terms, one rounding to T.
template <typename T>
void check(const Bank& bank, const std::vector<int32_t>& slots, double eps) {
  const int64_t tokens = static_cast<int64_t>(slots.size()), stride = bank.out + 2;
  std::vector<T> x, y;
  std::vector<float> x_exact, y_exact;
  for (const float value : random_normal(tokens * bank.in, 5)) x.push_back(from_float<T>(value));
  for (const float value : random_normal(tokens * stride, 6)) {
    y.push_back(from_float<T>(1e-2f * value));
  }
  for (const T value : x) x_exact.push_back(to_float(value));
  for (const T value : y) y_exact.push_back(to_float(value));
  run(bank, x, slots, y, stride);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t row = 0; row < stride; ++row) {
      const double got = to_float(y[t * stride + row]), before = y_exact[t * stride + row];
      double magnitude = 0, exact = before;
      if (row < bank.out) exact += expected(bank, slots[t], &x_exact[t * bank.in], row, &magnitude);
      const double terms = static_cast<double>(bank.in + bank.deltas[0].v.size() + 300);
      const double bound =
          magnitude == 0 ? 0
                         : terms * 0x1p-24 * (magnitude + std::abs(before)) + eps * std::abs(exact);
      ASSERT_LE(std::abs(got - exact), bound) << "token " << t << ", row " << row;
    }
  }
}

Bank mixed_bank(int64_t in, int64_t out) {
  Bank bank{in, out};
  bank.add({1, 2, 0, 1, 3, 5, 4, 2}, 100);
  bank.add({0, 0, 0, 0, 0, 0, 0, 0}, 200);  // empty
  bank.add({0, 0, 0, 0, 0, 1, 0, 0}, 300);
  bank.add({3, 0, 0, 0, 0, 0, 0, 30}, 400);
  return bank;
}

TEST(DeltaGemm, ByHand) {
  // V = [1, -1, 1], U = [1, -1], scale 0.5: z = 0.5 * (1 - 2 + 4) = 1.5.
  const std::vector<uint32_t> arena = {0b101u, 0b01u, float_bits(0.5f)};
  const std::vector<int64_t> table = {0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 1};
  const std::vector<float> x = {1, 2, 4};
  const std::vector<int32_t> slots = {0};
  std::vector<float> y = {10, 20};
  delta_gemm_cpu<float>({{y.data(), 1, 2, 2},
                         const_view(x, 1, 3),
                         arena.data(),
                         const_view(table, 1, kTableColumns),
                         slots.data()},
                        serial_for);
  EXPECT_EQ(y, (std::vector<float>{11.5f, 18.5f}));
}

class DeltaGemmSizes : public ::testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(DeltaGemmSizes, MixedSlotsMatchPlainLoops) {
  const Bank bank = mixed_bank(GetParam().first, GetParam().second);
  const std::vector<int32_t> slots = {3, 0, -1, 2, 0, 1, 4, 3, 0, 0, 0, -2147483647, 2147483647};
  check<float>(bank, slots, 0x1p-24);
  check<Half>(bank, slots, 0x1p-11);
  check<BFloat16>(bank, slots, 0x1p-8);
}

INSTANTIATE_TEST_SUITE_P(Edges, DeltaGemmSizes,
                         ::testing::Values(std::pair<int64_t, int64_t>{1, 1}, std::pair{31, 33},
                                           std::pair{32, 32}, std::pair{33, 31},
                                           std::pair{129, 511}, std::pair{64, 512},
                                           std::pair{40, 513}, std::pair{300, 1100}));

TEST(DeltaGemm, MoreTokensThanAGroupHolds) {
  std::vector<int32_t> slots(200, 3);
  slots[70] = 0;
  slots[71] = -1;
  check<float>(mixed_bank(45, 70), slots, 0x1p-24);
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
