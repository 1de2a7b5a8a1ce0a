#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "gptq/gptq.h"
#include "layout/packed_layout.h"
#include "testing.h"

namespace adamix {
namespace {

using testing::const_view;
using testing::random_normal;
using testing::threads_for;
using testing::view;

struct Problem {
  int64_t rows, n;
  bool by_row;
  std::vector<float> weight, hinv, scales;
  std::vector<int32_t> bits;

  int64_t lane(int64_t row, int64_t column) const { return by_row ? row : column; }

  std::vector<uint8_t> solve(const ParallelFor& parallel = serial_for) const {
    std::vector<uint8_t> codes(static_cast<size_t>(rows * n + 4), 0xaa);
    gptq_cpu({{codes.data(), rows, n, n},
              const_view(weight, rows, n),
              const_view(hinv, n, n),
              bits.data(),
              scales.data(),
              by_row},
             parallel);
    for (int64_t i = rows * n; i < rows * n + 4; ++i) EXPECT_EQ(codes[i], 0xaa) << "stray write";
    codes.resize(static_cast<size_t>(rows * n));
    return codes;
  }
};

// Any upper triangle with a positive diagonal is a Cholesky factor. Off the diagonal it is strong
// nearby and of order 1/n far away, so that every block feels every earlier one, and rounding
// errors do not grow from column to column.
Problem random_problem(int64_t rows, int64_t n, bool by_row, uint32_t seed) {
  Problem p{rows, n, by_row, random_normal(rows * n, seed), random_normal(n * n, seed + 1), {}, {}};
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t k = 0; k < n; ++k) {
      float& h = p.hinv[j * n + k];
      const float reach = 0.06f * std::pow(0.9f, static_cast<float>(k - j)) + 0.3f / n;
      h = k < j ? std::numeric_limits<float>::quiet_NaN() : k == j ? 1.0f + std::abs(h) : reach * h;
    }
  }
  const int64_t lanes = by_row ? rows : n;
  for (int64_t i = 0; i < lanes; ++i) {
    p.bits.push_back(static_cast<int32_t>(1 + i % kMaxBits));
    p.scales.push_back(2.5f / static_cast<float>(1 << p.bits.back()));
  }
  return p;
}

// How many codes another choice than float64's could not excuse. The textbook loop in float64
// follows the codes it is given, with a bound of what fp32 may have lost so far; a code is wrong if
// float64's value lies outside the code's interval by more than that. `ambiguous` counts the values
// nearer than the bound to a boundary.
int64_t wrong_codes(const Problem& p, const std::vector<uint8_t>& codes, int64_t* ambiguous) {
  const double u = std::ldexp(1.0, -24);
  int64_t wrong = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    std::vector<double> w(&p.weight[row * p.n], &p.weight[row * p.n] + p.n), lost(w.size(), 0.0);
    for (int64_t j = 0; j < p.n; ++j) {
      const double scale = p.scales[p.lane(row, j)], q = codes[row * p.n + j];
      const int bits = p.bits[p.lane(row, j)];
      const double top = max_code(bits), half = 1 << (bits - 1),
                   slack = lost[j] + 2 * u * std::abs(w[j]);
      const double low = q == 0 ? -HUGE_VAL : (q - half) * 2 * scale;
      const double high = q == top ? HUGE_VAL : (q - half + 1) * 2 * scale;
      wrong += q > top || w[j] < low - slack || w[j] >= high + slack;
      *ambiguous += std::abs(w[j] - low) <= slack || std::abs(w[j] - high) <= slack;
      const double value = scale * (2 * q - top), diagonal = p.hinv[j * p.n + j];
      const double err = (w[j] - value) / diagonal;
      const double err_lost = (lost[j] + u * std::abs(value)) / diagonal + 3 * u * std::abs(err);
      for (int64_t k = j + 1; k < p.n; ++k) {
        const double h = p.hinv[j * p.n + k];
        lost[k] += err_lost * std::abs(h) + (p.n + 2) * u * std::abs(err * h) + u * std::abs(w[k]);
        w[k] -= err * h;
      }
    }
  }
  return wrong;
}

TEST(Gptq, ByHand) {
  // Levels -1.5, -0.5, 0.5, 1.5. The first weight becomes 1.5; its error -0.5 lifts the second from
  // -0.1, which alone would be code 1, to 0.15: code 2.
  Problem p{1, 2, true, {1.0f, -0.1f}, {1.0f, 0.5f, 0.0f, 1.0f}, {0.5f}, {2}};
  EXPECT_EQ(p.solve(), (std::vector<uint8_t>{3, 2}));
}

TEST(Gptq, AnErrorReachesEveryColumnBehindIt) {
  // The first weight's error of -0.5, as above, lifts all others from code 1 to 2: in its own block
  // of columns, in the next ones, and in what is left over there.
  for (const int64_t n : {2, 127, 128, 129, 130, 131, 132, 133, 259}) {
    Problem p{1, n, true, std::vector<float>(n, -0.1f), std::vector<float>(n * n), {0.5f}, {2}};
    p.weight[0] = 1.0f;
    for (int64_t j = 0; j < n; ++j) p.hinv[j] = 0.5f;
    for (int64_t j = 0; j < n; ++j) p.hinv[j * n + j] = 1.0f;
    std::vector<uint8_t> expected(static_cast<size_t>(n), 2);
    expected[0] = 3;
    EXPECT_EQ(p.solve(), expected) << n << " columns";
  }
}

TEST(Gptq, WithoutCorrelationItRoundsDownToTheGridAndClamps) {
  Problem p{1,      6,  true, {-9.0f, -1.0f, -0.01f, 0.0f, 0.99f, 9.0f}, std::vector<float>(36),
            {0.5f}, {2}};
  for (int64_t i = 0; i < 6; ++i) p.hinv[i * 6 + i] = 1.0f;
  EXPECT_EQ(p.solve(), (std::vector<uint8_t>{0, 1, 1, 2, 2, 3}));
}

TEST(Gptq, NanAndInfinityStayInRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = HUGE_VALF;
  Problem p{3, 1, true, {nan, inf, -inf}, {1.0f}, {1.0f, 1.0f, 0.0f}, {3, 3, 3}};
  EXPECT_EQ(p.solve(), (std::vector<uint8_t>{0, 7, 0}));
}

class GptqSizes : public ::testing::TestWithParam<std::tuple<int64_t, int64_t, bool>> {};

TEST_P(GptqSizes, EveryCodeIsTheOneOfTheTextbookLoop) {
  const auto [rows, n, by_row] = GetParam();
  const Problem p = random_problem(rows, n, by_row, 11);
  int64_t ambiguous = 0;
  EXPECT_EQ(wrong_codes(p, p.solve(), &ambiguous), 0);
  EXPECT_LE(ambiguous, 1 + rows * n / 100) << "the bound is too wide to show anything";
}

INSTANTIATE_TEST_SUITE_P(Edges, GptqSizes,
                         ::testing::Combine(::testing::Values(1, 31, 32, 33, 70),
                                            ::testing::Values(1, 127, 128, 129, 300),
                                            ::testing::Bool()));

TEST(Gptq, TwoPercentOfScaleOrFactorWouldBeSeen) {
  const Problem p = random_problem(64, 300, true, 12);
  Problem other_scale = p, other_factor = p;
  for (auto& scale : other_scale.scales) scale *= 1.02f;
  for (int64_t j = 0; j < p.n; ++j) other_factor.hinv[j * p.n + j] *= 1.02f;
  int64_t ambiguous = 0;
  EXPECT_GT(wrong_codes(p, other_scale.solve(), &ambiguous), 0);
  EXPECT_GT(wrong_codes(p, other_factor.solve(), &ambiguous), 0);
}

TEST(Gptq, ThreadsChangeNothing) {
  const Problem p = random_problem(100, 200, false, 13);
  EXPECT_EQ(p.solve(), p.solve(threads_for(3)));
}

TEST(Gptq, NoRowsAndNoColumns) {
  EXPECT_TRUE(random_problem(0, 5, true, 14).solve().empty());
  EXPECT_TRUE(random_problem(5, 0, true, 15).solve().empty());
}

}  // namespace
}  // namespace adamix
