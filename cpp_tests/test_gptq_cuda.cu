// GPTQ on the GPU against gptq_cpu, code by code. Skipped by name without a GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "device.h"
#include "gptq/gptq_cuda.h"
#include "layout/packed_layout.h"
#include "testing.h"

namespace adamix {
namespace {

using testing::cpu_rounds_once;
using testing::DeviceArray;
using testing::has_device;
using testing::kEmulated;
using testing::random_normal;

constexpr uint8_t kSentinel = 0xaa;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class GptqCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
    if (!cpu_rounds_once()) GTEST_SKIP() << "this CPU has no FMA";
  }
};

// Rows of weight, hinv and codes lie `gap` elements apart.
struct Problem {
  int64_t rows, n, gap;
  bool by_row;
  std::vector<float> weight, hinv, scales;
  std::vector<int32_t> bits;

  int64_t stride() const { return n + gap; }
  GptqArgs args(uint8_t* codes, const float* w, const float* h, const int32_t* b,
                const float* s) const {
    return {{codes, rows, n, stride()}, {w, rows, n, stride()}, {h, n, n, stride()}, b, s, by_row};
  }
  std::vector<uint8_t> no_codes() const {
    return std::vector<uint8_t>(static_cast<size_t>(rows * stride()), kSentinel);
  }

  std::vector<uint8_t> solve_on_cpu() const {
    auto codes = no_codes();
    gptq_cpu(args(codes.data(), weight.data(), hinv.data(), bits.data(), scales.data()),
             serial_for);
    return codes;
  }

  // Scratch begins as NaN and ends in one: nothing may depend on it, nothing be written behind it.
  std::vector<uint8_t> solve_on_gpu() const {
    const auto padded = static_cast<size_t>(gptq_padded_rows(rows));
    const std::vector<float> no_columns(n * padded + 1, kNan);
    const std::vector<float> no_errors(kGptqBlockColumns * padded + 1, kNan);
    const DeviceArray<uint8_t> codes(no_codes());
    const DeviceArray<float> w(weight), h(hinv), s(scales), columns(no_columns), errors(no_errors);
    const DeviceArray<int32_t> b(bits);
    EXPECT_EQ(launch_gptq(args(codes.data(), w.data(), h.data(), b.data(), s.data()),
                          {columns.data(), errors.data()}, nullptr),
              cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(std::isnan(columns.to_host().back())) << "stray write behind the columns";
    EXPECT_TRUE(std::isnan(errors.to_host().back())) << "stray write behind the errors";
    const auto after = w.to_host();
    EXPECT_EQ(std::memcmp(after.data(), weight.data(), after.size() * sizeof(float)), 0)
        << "the weight has changed";
    return codes.to_host();
  }
};

// As in test_gptq.cpp: any upper triangle with a positive diagonal, strong nearby and of order 1/n
// far away; all widths; values beyond the grid. NaN below the diagonal and between the rows.
Problem random_problem(int64_t rows, int64_t n, bool by_row, int64_t gap = 0) {
  const int64_t stride = n + gap, lanes = by_row ? rows : n;
  Problem p{rows, n, gap, by_row, random_normal(rows * stride, 21), random_normal(n * stride, 22),
            {},   {}};
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t k = 0; k < stride; ++k) {
      float& h = p.hinv[j * stride + k];
      const float reach = 0.06f * std::pow(0.9f, static_cast<float>(k - j)) + 0.3f / n;
      h = k < j || k >= n ? kNan : k == j ? 1.0f + std::abs(h) : reach * h;
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = n; k < stride; ++k) p.weight[row * stride + k] = kNan;
  }
  for (int64_t i = 0; i < lanes; ++i) {
    p.bits.push_back(static_cast<int32_t>(1 + i % kMaxBits));
    p.scales.push_back(2.5f / static_cast<float>(1 << p.bits.back()));
  }
  return p;
}

int64_t differing(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return count;
}

void expect_the_cpus_codes(const Problem& p) {
  const auto expected = p.solve_on_cpu(), got = p.solve_on_gpu();
  ASSERT_EQ(got.size(), expected.size());
  EXPECT_EQ(differing(got, expected), 0) << "codes of " << p.rows * p.n << " differ";
}

class GptqCudaSizes
    : public GptqCuda,
      public ::testing::WithParamInterface<std::tuple<std::pair<int64_t, int64_t>, int64_t, bool>> {
};

// A gap of 3 leaves hinv's rows at any address, one of 4 at multiples of 16 bytes.
TEST_P(GptqCudaSizes, TheCodesAreTheCpus) {
  const auto [size, gap, by_row] = GetParam();
  expect_the_cpus_codes(random_problem(size.first, size.second, by_row, gap));
}

using Size = std::pair<int64_t, int64_t>;
INSTANTIATE_TEST_SUITE_P(Edges, GptqCudaSizes,
                         ::testing::Combine(::testing::Values(Size{1, 1}, Size{5, 127},
                                                              Size{33, 128}, Size{70, 129},
                                                              Size{64, 144}, Size{129, 260},
                                                              Size{300, 300}, Size{1000, 513}),
                                            ::testing::Values(0, 3, 4), ::testing::Bool()));

TEST_F(GptqCuda, MoreRowsThanAGridIsHigh) {
  const int64_t rows = kEmulated ? 3001 : 70001;
  expect_the_cpus_codes(random_problem(rows, 130, true));
  expect_the_cpus_codes(random_problem(rows, 130, false));
}

TEST_F(GptqCuda, ARowOfNanOrInfinityIsItsOwn) {
  for (const bool by_row : {true, false}) {
    Problem p = random_problem(40, 300, by_row);
    for (int64_t k = 0; k < p.n; ++k) p.weight[7 * p.n + k] = kNan;
    p.weight[9 * p.n + 50] = HUGE_VALF;
    p.weight[11 * p.n + 200] = -HUGE_VALF;
    expect_the_cpus_codes(p);
    const auto codes = p.solve_on_gpu();
    for (int64_t k = 0; k < p.n; ++k) ASSERT_EQ(codes[7 * p.n + k], 0) << "column " << k;
  }
}

TEST_F(GptqCuda, TwoPercentWouldBeSeen) {
  const Problem p = random_problem(1000, 300, true);
  Problem other_scale = p, other_factor = p, not_far = p;
  for (auto& scale : other_scale.scales) scale *= 1.02f;
  for (int64_t j = 0; j < p.n; ++j) other_factor.hinv[j * p.n + j] *= 1.02f;
  for (int64_t j = 0; j < kGptqBlockColumns; ++j) {
    for (int64_t k = kGptqBlockColumns; k < p.n; ++k) not_far.hinv[j * p.n + k] *= 0.98f;
  }
  const auto expected = p.solve_on_cpu();
  EXPECT_GT(differing(other_scale.solve_on_gpu(), expected), 0);
  EXPECT_GT(differing(other_factor.solve_on_gpu(), expected), 0);
  EXPECT_GT(differing(not_far.solve_on_gpu(), expected), 0);
}

TEST_F(GptqCuda, WidthsOutsideTheRangeCountAsTheNearest) {
  for (const bool by_row : {true, false}) {
    Problem bad = random_problem(8, 40, by_row), good = bad;
    bad.bits[0] = std::numeric_limits<int32_t>::min();
    bad.bits[7] = std::numeric_limits<int32_t>::max();
    ASSERT_EQ(good.bits[0], 1);
    ASSERT_EQ(good.bits[7], kMaxBits);
    EXPECT_EQ(bad.solve_on_gpu(), good.solve_on_cpu());
  }
}

TEST_F(GptqCuda, NoRowsAndNoColumns) {
  EXPECT_TRUE(random_problem(0, 5, true).solve_on_gpu().empty());
  EXPECT_TRUE(random_problem(5, 0, true).solve_on_gpu().empty());
}

}  // namespace
}  // namespace adamix
