#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "add_rows/add_rows.h"
#include "common/float16.h"
#include "testing.h"

// What the tests of add_rows share: calls of any sizes and places, and what is to come out, bit by
// bit: one fp32 sum and one rounding leave no choice.
namespace adamix::testing {

struct AddRowsCall {
  std::vector<int64_t> widths;  // of the ys
  std::vector<int32_t> slots;   // a token each
  int64_t capacity = 3;
  int64_t y_gap = 0, y_lead = 0;  // elements behind each row, and before the first
  int64_t values_gap = 0, values_lead = 0;

  int64_t tokens() const { return static_cast<int64_t>(slots.size()); }
  int64_t columns() const {
    int64_t sum = 0;
    for (const int64_t width : widths) sum += width;
    return sum;
  }
  int64_t values_stride() const { return columns() + values_gap; }
  int64_t y_stride(size_t i) const { return widths[i] + y_gap; }

  std::vector<float> values() const {
    auto all = random_normal(values_lead + capacity * values_stride(), 3);
    for (size_t i = 0; i < all.size(); i += 7) all[i] = 0.0f;
    return all;
  }

  MatrixView<const float> view(const float* values) const {
    return {values + values_lead, capacity, columns(), values_stride()};
  }

  // With zeros below 0: a sum with 0 would change them. What lies round the rows is random too.
  template <typename T>
  std::vector<std::vector<T>> ys() const {
    std::vector<std::vector<T>> ys;
    for (size_t i = 0; i < widths.size(); ++i) {
      ys.emplace_back();
      for (const float value : random_normal(y_lead + tokens() * y_stride(i) + 1, 4)) {
        ys.back().push_back(from_float<T>(ys.back().size() % 5 == 0 ? -0.0f : value));
      }
    }
    return ys;
  }

  template <typename T>
  std::vector<std::vector<T>> expected() const {
    auto all = ys<T>();
    const auto rows = values();
    for (int64_t t = 0; t < tokens(); ++t) {
      if (slots[t] < 0 || slots[t] >= capacity) continue;
      const float* value = view(rows.data()).row(slots[t]);
      for (size_t i = 0; i < widths.size(); ++i) {
        T* y = all[i].data() + y_lead + t * y_stride(i);
        for (int64_t n = 0; n < widths[i]; ++n) y[n] = from_float<T>(to_float(y[n]) + *value++);
      }
    }
    return all;
  }
};

// Each slot of three, the base, and slots that there are not.
inline std::vector<int32_t> mixed_slots(int64_t count) {
  const int32_t some[] = {2, -1, 0, 1, 3, 0, -2147483647, 2147483647, 2};
  std::vector<int32_t> slots;
  for (int64_t t = 0; t < count; ++t) slots.push_back(some[t * t % 11 * 5 % 9]);
  return slots;
}

// Every number of columns about a chunk, all ys of a group, and none in some.
inline std::vector<AddRowsCall> add_rows_calls() {
  const std::vector<int64_t> groups[] = {
      {1},    {7, 9},      {8, 16, 8},
      {64},   {33, 0, 40}, {1100, 136, 136},
      {0, 0}, {0, 5},      {2, 3, 8, 1, 24, 8, 17, 9},
  };
  const std::pair<int64_t, int64_t> placings[] = {{0, 0}, {8, 8}, {4, 4}, {0, 1}, {3, 2}};
  std::vector<AddRowsCall> calls;
  for (const auto& widths : groups) {
    for (const auto& [gap, lead] : placings) {
      calls.push_back({widths, mixed_slots(13), 3, gap, lead, 0, 0});
      calls.push_back({widths, mixed_slots(5), 3, 0, 0, gap, lead});
      calls.push_back({widths, mixed_slots(1), 3, gap, lead, gap, lead});
    }
  }
  calls.push_back({{16, 8}, {}});
  calls.push_back({{16, 8}, mixed_slots(9), 0});
  return calls;
}

inline std::string text_of(const AddRowsCall& call) {
  std::string text = std::to_string(call.tokens()) + " tokens, widths";
  for (const int64_t width : call.widths) text += " " + std::to_string(width);
  return text + ", gap " + std::to_string(call.y_gap) + ", values' " +
         std::to_string(call.values_gap);
}

template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace adamix::testing
