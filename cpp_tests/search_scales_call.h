#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "search_scales/search_scales.h"
#include "testing.h"

// What the tests of search_scales share: lanes of any kind and place, all widths in turn.
namespace adamix::testing {

enum class LaneKind { kNormal, kHeavy, kConstant, kTiny, kZero };

struct SearchScalesCall {
  int64_t rows, n;
  LaneKind kind = LaneKind::kNormal;
  bool weighted = false;
  int64_t gap = 0, lead = 0;  // NaN behind each lane, and before the first

  int64_t stride() const { return n + gap; }

  float entry(float normal, float other) const {
    switch (kind) {
      case LaneKind::kHeavy: return normal / (0.01f + std::abs(other));
      case LaneKind::kConstant: return -0.37f;
      case LaneKind::kTiny: return normal * 1e-21f;
      case LaneKind::kZero: return 0.0f;
      default: return normal;
    }
  }

  std::vector<float> lanes() const {
    const auto normal = random_normal(rows * n, 31), other = random_normal(rows * n, 32);
    std::vector<float> all(static_cast<size_t>(lead + rows * stride()),
                           std::numeric_limits<float>::quiet_NaN());
    for (int64_t i = 0; i < rows * n; ++i)
      all[lead + i / n * stride() + i % n] = entry(normal[i], other[i]);
    return all;
  }

  std::vector<int32_t> bits() const {
    std::vector<int32_t> all;
    for (int64_t i = 0; i < rows; ++i) all.push_back(static_cast<int32_t>(1 + i % 8));
    return all;
  }

  std::vector<float> weights() const {
    auto all = random_normal(weighted ? n : 0, 33);
    for (auto& weight : all) weight = 0.01f + std::abs(weight);
    return all;
  }

  SearchScalesArgs args(float* scales, const float* lanes, const int32_t* bits,
                        const float* weights) const {
    return {scales, {lanes + lead, rows, n, stride()}, bits, weighted ? weights : nullptr};
  }

  // One scale a lane and a sentinel, which nobody overwrites.
  std::vector<float> no_scales() const {
    return std::vector<float>(static_cast<size_t>(rows + 1), kSentinel);
  }

  std::vector<float> on_cpu(const ParallelFor& parallel = serial_for) const {
    auto scales = no_scales();
    const auto values = lanes(), costs = weights();
    const auto widths = bits();
    search_scales_cpu(args(scales.data(), values.data(), widths.data(), costs.data()), parallel);
    return scales;
  }

  static constexpr float kSentinel = 77.0f;
};

inline std::string text_of(const SearchScalesCall& call) {
  return std::to_string(call.rows) + " lanes of " + std::to_string(call.n) + ", kind " +
         std::to_string(static_cast<int>(call.kind)) + (call.weighted ? ", weighted" : "");
}

// Every size about a warp, a run of strands and all of them.
inline std::vector<SearchScalesCall> search_scales_calls() {
  std::vector<SearchScalesCall> calls;
  for (const int64_t n : {1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 300, 1000}) {
    for (const bool weighted : {false, true}) {
      calls.push_back({9, n, LaneKind::kNormal, weighted});
      calls.push_back({9, n, LaneKind::kHeavy, weighted, 3, 1});
    }
    for (const LaneKind kind : {LaneKind::kConstant, LaneKind::kTiny, LaneKind::kZero})
      calls.push_back({8, n, kind, n % 2 == 0});
  }
  calls.push_back({0, 5});
  calls.push_back({9, 0});
  calls.push_back({9, 0, LaneKind::kNormal, true});
  return calls;
}

}  // namespace adamix::testing
