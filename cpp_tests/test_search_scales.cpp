#include <gtest/gtest.h>

#include <algorithm>

#include "search_scales_call.h"

namespace adamix {
namespace {

using testing::LaneKind;
using testing::search_scales_calls;
using testing::SearchScalesCall;
using testing::text_of;
using testing::threads_for;

// A lane and its search in float64, by the description in search_scales.h.
struct Textbook {
  const float* lane;
  const float* weights;
  int64_t n;
  double top;

  double weight(int64_t i) const { return weights == nullptr ? 1.0 : weights[i]; }

  double level(int64_t i, double scale) const {
    const double q = std::floor(std::abs(lane[i]) / (2 * scale));
    return 2 * std::min(q, (top - 1) / 2) + 1;
  }

  double error(double scale) const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
      sum += weight(i) * std::pow(std::abs(lane[i]) - scale * level(i, scale), 2);
    return sum;
  }

  double energy() const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += weight(i) * std::pow(double{lane[i]}, 2);
    return sum;
  }

  double fitted(double scale) const {
    double cross = 0, power = 0;
    for (int64_t i = 0; i < n; ++i) {
      cross += weight(i) * std::abs(lane[i]) * level(i, scale);
      power += weight(i) * std::pow(level(i, scale), 2);
    }
    return cross / power;
  }

  double search() const {
    double largest = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      largest = std::max(largest, std::abs(double{lane[i]}));
      sum += std::abs(lane[i]);
    }
    const double widest = largest / top, narrowest = sum / n / top;
    double best = widest;
    for (int i = 0; i < 32; ++i) {
      const double scale = narrowest * std::pow(widest / narrowest, i / 31.0);
      if (error(scale) < error(best)) best = scale;
    }
    for (int i = 0; i < 5; ++i) {
      if (error(fitted(best)) < error(best)) best = fitted(best);
    }
    return best;
  }
};

void expect_the_textbooks_error(const SearchScalesCall& call) {
  const auto scales = call.on_cpu(), values = call.lanes(), costs = call.weights();
  const auto widths = call.bits();
  const auto args = call.args(nullptr, values.data(), widths.data(), costs.data());
  for (int64_t i = 0; i < call.rows; ++i) {
    const Textbook lane = {args.lanes.row(i), args.weights, call.n,
                           static_cast<double>((1 << widths[i]) - 1)};
    const double exact = lane.error(lane.search());
    // A scale is rounded to fp32, and so is what an entry is in scales.
    const double slack = 1e-4 * exact + std::ldexp(lane.energy(), -46);
    EXPECT_NEAR(lane.error(scales[i]), exact, slack) << widths[i] << " bits, lane " << i;
  }
}

TEST(SearchScales, ByHand) {
  const std::vector<float> lanes = {1.5f,  -0.5f,  0.5f, -1.5f,  // the levels at 2 bits, and 0.5
                                    0.25f, -0.25f, 0.5f, -1.0f,  // 1 bit: the mean is the best
                                    0.0f,  0.0f,   0.0f, 0.0f};
  const std::vector<int32_t> bits = {2, 1, 8};
  std::vector<float> scales(3);
  search_scales_cpu({scales.data(), {lanes.data(), 3, 4, 4}, bits.data(), nullptr}, serial_for);
  EXPECT_EQ(scales, (std::vector<float>{0.5f, 0.5f, kLeastMagnitude / 255.0f}));
  const std::vector<float> weights = {0.0f, 0.0f, 3.0f, 1.0f};  // mean 0.625
  search_scales_cpu({scales.data(), {lanes.data() + 4, 1, 4, 4}, bits.data() + 1, weights.data()},
                    serial_for);
  EXPECT_EQ(scales[0], 0.625f);
}

TEST(SearchScales, TheErrorIsTheTextbooks) {
  for (const SearchScalesCall& call : search_scales_calls()) {
    if (call.n == 0 || call.kind == LaneKind::kZero) continue;
    SCOPED_TRACE(text_of(call));
    expect_the_textbooks_error(call);
  }
  expect_the_textbooks_error({8, 20000});
}

TEST(SearchScales, NothingIsWrittenBehindTheScales) {
  for (const SearchScalesCall& call : search_scales_calls()) {
    const auto scales = call.on_cpu();
    EXPECT_EQ(scales.back(), call.kSentinel) << text_of(call);
    for (int64_t i = 0; i < call.rows; ++i) EXPECT_GT(scales[i], 0.0f) << text_of(call);
  }
}

TEST(SearchScales, WidthsThatThereAreNotCountAsTheNearest) {
  const auto lanes = SearchScalesCall{1, 300}.lanes();
  const std::vector<int32_t> bits = {-5, 0, 1, 8, 9, 2147483647};
  std::vector<float> scales(6);
  search_scales_cpu({scales.data(), {lanes.data(), 6, 300, 0}, bits.data(), nullptr}, serial_for);
  EXPECT_EQ(scales[0], scales[2]);
  EXPECT_EQ(scales[1], scales[2]);
  EXPECT_EQ(scales[4], scales[3]);
  EXPECT_EQ(scales[5], scales[3]);
}

TEST(SearchScales, NanAndInfinityGetAPositiveScale) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = HUGE_VALF;
  const std::vector<float> lanes = {nan, 1.0f, inf, 1.0f, -inf, nan, nan, nan, 3.4e38f, -3.4e38f};
  for (const int32_t width : {1, 8}) {
    const std::vector<int32_t> bits(5, width);
    std::vector<float> scales(5);
    search_scales_cpu({scales.data(), {lanes.data(), 5, 2, 2}, bits.data(), nullptr}, serial_for);
    for (const float scale : scales) EXPECT_TRUE(scale > 0.0f && scale < inf) << scale;
  }
}

TEST(SearchScales, ThreadsChangeNothing) {
  const SearchScalesCall call = {50, 700, LaneKind::kHeavy, true};
  EXPECT_EQ(call.on_cpu(), call.on_cpu(threads_for(3)));
}

}  // namespace
}  // namespace adamix
