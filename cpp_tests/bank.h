#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bitpack/bitpack.h"
#include "common/float16.h"
#include "layout/packed_layout.h"
#include "testing.h"

// Deltas as plain numbers, the same packed into a bank, and what a product with one of them, or a
// row of one, is in double: for the tests of delta_gemm and delta_embedding on either device.
namespace adamix::testing {

using Counts = std::vector<int64_t>;  // a factor's lanes at 8, 7 .. 1 bits

inline std::vector<int> widths_of(const Counts& counts) {
  std::vector<int> widths;
  for (int bits = kMaxBits; bits >= 1; --bits)
    widths.insert(widths.end(), counts[kMaxBits - bits], bits);
  return widths;
}

// So many lanes again, with other ends of the widths: some a bit wider, others a bit narrower.
inline Counts other_counts(const Counts& counts) {
  const std::vector<int> widths = widths_of(counts);
  Counts others(kMaxBits, 0);
  for (size_t i = 0; i < widths.size(); ++i) {
    const int bits = widths[i] + (i < widths.size() / 3) - (i >= widths.size() - widths.size() / 3);
    ++others[kMaxBits - std::clamp(bits, 1, kMaxBits)];
  }
  return others;
}

// A delta before it is packed: levels as plain numbers.
struct Delta {
  std::vector<std::vector<double>> v, u;  // [rank][in], [rank][out]
  std::vector<float> scales;

  int64_t rank() const { return static_cast<int64_t>(v.size()); }
};

struct Bank {
  int64_t in, out;
  int64_t alignment = 1;  // words that a factor begins at a multiple of
  std::vector<uint32_t> arena = std::vector<uint32_t>(3, 0xdeadbeefu);  // nothing starts at word 0
  std::vector<int64_t> table = {};
  std::vector<Delta> deltas = {};

  int64_t capacity() const { return static_cast<int64_t>(deltas.size()); }
  int64_t max_rank() const {
    int64_t most = 0;
    for (const Delta& delta : deltas) most = std::max(most, delta.rank());
    return most;
  }

  // Where the next factor or the scales begin.
  int64_t offset() {
    while (static_cast<int64_t>(arena.size()) % alignment != 0) arena.push_back(0xdeadbeefu);
    return static_cast<int64_t>(arena.size());
  }

  // A factor's codes [lane][code], panel by panel: in each, what every lane has there.
  void append_factor(const std::vector<std::vector<uint8_t>>& codes, const std::vector<int>& bits,
                     int64_t n) {
    for (int64_t first = 0; first < n; first += kPanelCodes) {
      const int64_t width = std::min<int64_t>(kPanelCodes, n - first);
      for (size_t lane = 0; lane < codes.size(); ++lane) {
        const int64_t words = lane_words(width, bits[lane]);
        arena.resize(arena.size() + words);
        pack_cpu({{&*arena.end() - words, 1, words, words},
                  {codes[lane].data() + first, 1, width, width},
                  bits[lane]},
                 serial_for);
      }
    }
  }

  void add(const Counts& v_counts, uint32_t seed) { add(v_counts, other_counts(v_counts), seed); }

  // Random codes. Scales are such that every component weighs the same, whatever its widths.
  void add(const Counts& v_counts, const Counts& u_counts, uint32_t seed) {
    Delta delta;
    const std::vector<int> v_widths = widths_of(v_counts), u_widths = widths_of(u_counts);
    std::vector<int64_t> row;
    for (auto* lanes : {&delta.v, &delta.u}) {
      const int64_t n = lanes == &delta.v ? in : out;
      const std::vector<int>& widths = lanes == &delta.v ? v_widths : u_widths;
      std::vector<std::vector<uint8_t>> codes;
      for (const int bits : widths) {
        codes.push_back(random_codes(n, bits, seed++));
        lanes->emplace_back();
        for (const uint8_t code : codes.back()) lanes->back().push_back(level(code, bits));
      }
      row.push_back(offset());
      append_factor(codes, widths, n);
    }
    row.push_back(offset());
    delta.scales = random_normal(delta.rank(), seed);
    for (size_t i = 0; i < v_widths.size(); ++i) {
      const auto tops = static_cast<float>(max_code(v_widths[i]) * max_code(u_widths[i]));
      arena.push_back(float_bits(delta.scales[i] *= 0.03f / tops));
    }
    row.insert(row.end(), v_counts.begin(), v_counts.end());
    row.insert(row.end(), u_counts.begin(), u_counts.end());
    table.insert(table.end(), row.begin(), row.end());
    deltas.push_back(delta);
  }
};

inline Bank mixed_bank(int64_t in, int64_t out, int64_t alignment = 1) {
  Bank bank{in, out, alignment};
  bank.add({1, 2, 0, 1, 3, 5, 4, 2}, {0, 1, 4, 0, 1, 3, 7, 2}, 100);
  bank.add({0, 0, 0, 0, 0, 0, 0, 0}, 200);  // empty
  bank.add({0, 0, 0, 0, 0, 1, 0, 0}, {0, 0, 0, 1, 0, 0, 0, 0}, 300);
  bank.add({3, 0, 0, 0, 0, 0, 0, 30}, {1, 1, 0, 9, 0, 22, 0, 0}, 400);
  return bank;
}

// As mixed_bank, slot 3 having one lane of U less than of V: a slot that kernels take for empty.
inline Bank bank_with_wrong_counts(int64_t in, int64_t out) {
  Bank bank = mixed_bank(in, out);
  --bank.table[3 * kTableColumns + kTableFirstUCount];
  bank.deltas[3] = {};
  return bank;
}

// What a token's row of y gains, element by element.
struct Gain {
  std::vector<double> exact;
  std::vector<double> magnitude;    // the same product of absolute values
  std::vector<double> z_magnitude;  // sum of |U| |z|, z being what it is
  std::vector<double> spread;       // what it would be, were all of |x| and of |z| as the largest
};

// Plain loops in double; empty vectors for the base.
inline Gain gain_of(const Bank& bank, int32_t slot, const float* x) {
  Gain gain;
  if (slot < 0 || slot >= bank.capacity() || bank.deltas[slot].rank() == 0) return gain;
  const Delta& delta = bank.deltas[slot];
  const auto out = static_cast<size_t>(bank.out);
  for (auto* sums : {&gain.exact, &gain.magnitude, &gain.z_magnitude, &gain.spread}) {
    sums->assign(out, 0.0);
  }
  double largest_x = 0, largest_z = 0;
  for (int64_t k = 0; k < bank.in; ++k) largest_x = std::max<double>(largest_x, std::abs(x[k]));
  for (size_t i = 0; i < delta.v.size(); ++i) {
    double z = 0, magnitude = 0, levels = 0;
    for (int64_t k = 0; k < bank.in; ++k) {
      z += delta.v[i][k] * x[k];
      magnitude += std::abs(delta.v[i][k] * x[k]);
      levels += std::abs(delta.v[i][k]);
    }
    const double scale = delta.scales[i];
    largest_z = std::max(largest_z, std::abs(scale * z));
    for (size_t o = 0; o < out; ++o) {
      const double u = delta.u[i][o];
      gain.exact[o] += u * scale * z;
      gain.magnitude[o] += std::abs(u * scale) * magnitude;
      gain.z_magnitude[o] += std::abs(u * scale * z);
      gain.spread[o] += std::abs(u * scale) * levels * largest_x;
    }
  }
  for (size_t i = 0; i < delta.v.size(); ++i) {
    for (size_t o = 0; o < out; ++o) gain.spread[o] += std::abs(delta.u[i][o]) * largest_z;
  }
  return gain;
}

// What a token's row of y gains from a delta to an embedding, U's lanes being of the vocabulary.
struct RowGain {
  std::vector<double> exact;
  std::vector<double> magnitude;  // the same product of absolute values
  std::vector<double> spread;     // what it would be, were all of |U scale| as the largest
};

// Plain loops in double; empty vectors where nothing is added.
inline RowGain row_gain_of(const Bank& bank, int32_t slot, int64_t token) {
  RowGain gain;
  if (slot < 0 || slot >= bank.capacity() || bank.deltas[slot].rank() == 0) return gain;
  if (token < 0 || token >= bank.out) return gain;
  const Delta& delta = bank.deltas[slot];
  const auto hidden = static_cast<size_t>(bank.in);
  for (auto* sums : {&gain.exact, &gain.magnitude, &gain.spread}) sums->assign(hidden, 0.0);
  double largest = 0;
  for (size_t i = 0; i < delta.v.size(); ++i) {
    largest = std::max(largest, std::abs(delta.u[i][token] * delta.scales[i]));
  }
  for (size_t i = 0; i < delta.v.size(); ++i) {
    const double w = delta.u[i][token] * delta.scales[i];
    for (size_t h = 0; h < hidden; ++h) {
      gain.exact[h] += w * delta.v[i][h];
      gain.magnitude[h] += std::abs(w * delta.v[i][h]);
      gain.spread[h] += largest * std::abs(delta.v[i][h]);
    }
  }
  return gain;
}

// Half the distance of neighbours, relative.
template <typename T>
constexpr double rounding_of() {
  if constexpr (std::is_same_v<T, float>) return 0x1p-24;
  return std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
}

// What rounding to T may change; below the smallest normal half, halves lie as far apart as there.
template <typename T>
double rounding_at(double exact) {
  const double least = std::is_same_v<T, Half> ? 0x1p-14 : 0x1p-126;
  return rounding_of<T>() * std::max(std::abs(exact), least);
}

template <typename T>
std::vector<T> random_numbers(int64_t count, float size, uint32_t seed) {
  std::vector<T> numbers;
  for (const float value : random_normal(count, seed))
    numbers.push_back(from_float<T>(size * value));
  return numbers;
}

template <typename T>
std::vector<float> in_fp32(const std::vector<T>& numbers) {
  std::vector<float> values;
  for (const T number : numbers) values.push_back(to_float(number));
  return values;
}

}  // namespace adamix::testing
