#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "bank.h"
#include "delta_gemm/delta_gemm.h"
#include "delta_gemm/delta_gemm_cuda.h"
#include "device.h"

// Calls of delta_gemm on the device, and what each must give: against plain loops in double, with a
// bound for every element, and against delta_gemm_cpu.
namespace adamix::testing {

constexpr int64_t kFew = 128;  // tokens up to which sums are those of whole numbers
constexpr int64_t kGuardBytes = 512;

template <typename T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, float>) return Element::kFloat;
  return std::is_same_v<T, Half> ? Element::kHalf : Element::kBFloat16;
}

struct Segments {
  std::vector<int32_t> indices, counts, starts, slots;
};

// One call: matrices on one x, who goes where, and how rows lie.
struct Call {
  std::vector<Bank> banks;
  std::vector<int32_t> slots = {};                       // of the tokens
  std::optional<Segments> segments = {};                 // the same in other words
  int64_t x_gap = 0, y_gap = 2, x_lead = 0, y_lead = 0;  // elements
  int64_t max_rank = -1;

  int64_t tokens() const { return static_cast<int64_t>(slots.size()); }
  int64_t in() const { return banks[0].in; }
  int64_t x_stride() const { return in() + x_gap; }
  int64_t y_stride(size_t layer) const { return banks[layer].out + y_gap; }
  int64_t rank_bound() const {
    int64_t most = 0;
    for (const Bank& bank : banks) most = std::max(most, bank.max_rank());
    return max_rank >= 0 ? max_rank : most;
  }

  // A slot that does something in a layer, or -1.
  int32_t slot(size_t layer, int64_t token) const {
    const int32_t at = slots[token];
    if (at < 0 || at >= banks[layer].capacity()) return -1;
    const int64_t rank = banks[layer].deltas[at].rank();
    return rank > 0 && rank <= rank_bound() ? at : -1;
  }
};

template <typename T>
struct Tensors {
  std::vector<T> x;               // x_lead, then rows
  std::vector<std::vector<T>> y;  // y_lead, then rows
};

template <typename T>
Tensors<T> random_tensors(const Call& call) {
  Tensors<T> tensors;
  tensors.x = random_numbers<T>(call.x_lead + call.tokens() * call.x_stride(), 1.0f, 5);
  for (size_t layer = 0; layer < call.banks.size(); ++layer) {
    tensors.y.push_back(
        random_numbers<T>(call.y_lead + call.tokens() * call.y_stride(layer), 1e-2f, 6));
  }
  return tensors;
}

// All banks in one arena, and where their tables point there.
struct OneArena {
  std::vector<uint32_t> words;
  std::vector<std::vector<int64_t>> tables;

  explicit OneArena(const std::vector<Bank>& banks) {
    for (const Bank& bank : banks) {
      while (words.size() % 4 != 0) words.push_back(0xdeadbeefu);
      tables.push_back(bank.table);
      for (size_t i = 0; i < bank.table.size(); ++i) {
        if (i % kTableColumns <= kTableScaleOffset) {
          tables.back()[i] += static_cast<int64_t>(words.size());
        }
      }
      words.insert(words.end(), bank.arena.begin(), bank.arena.end());
    }
  }
};

// y afterwards, with all that lies round its rows.
template <typename T>
std::vector<std::vector<T>> run_cuda(const Call& call, const Tensors<T>& tensors) {
  const OneArena arena(call.banks);
  const DeviceArray<uint32_t> words(arena.words);
  const DeviceArray<T> x(tensors.x);
  const Segments segments = call.segments.value_or(Segments{});
  const DeviceArray<int32_t> slots(call.slots), indices(segments.indices), counts(segments.counts),
      starts(segments.starts), segment_slots(segments.slots);
  std::vector<std::unique_ptr<DeviceArray<int64_t>>> tables;
  std::vector<std::unique_ptr<DeviceArray<T>>> ys;
  DeltaGemmCudaArgs args = {};
  for (size_t layer = 0; layer < call.banks.size(); ++layer) {
    tables.push_back(std::make_unique<DeviceArray<int64_t>>(arena.tables[layer]));
    ys.push_back(std::make_unique<DeviceArray<T>>(tensors.y[layer]));
    args.layers[layer] = {ys.back()->data() + call.y_lead, call.y_stride(layer),
                          call.banks[layer].out, tables.back()->data()};
  }
  args.layer_count = static_cast<int>(call.banks.size());
  args.element = element_of<T>();
  args.x = x.data() + call.x_lead;
  args.x_row_stride = call.x_stride();
  args.tokens = call.tokens();
  args.in = call.in();
  args.arena = words.data();
  args.capacity = call.banks[0].capacity();
  args.max_rank = call.rank_bound();
  if (call.segments) {
    args.routes.token_indices = indices.data();
    args.routes.token_counts = counts.data();
    args.routes.token_starts = starts.data();
    args.routes.segment_slots = segment_slots.data();
    args.routes.segments = static_cast<int64_t>(segments.counts.size());
    args.routes.indices = static_cast<int64_t>(segments.indices.size());
  } else {
    args.routes.slots = slots.data();
  }
  // Scratch begins as NaN and ends in some: nothing may depend on it, nothing be written behind it.
  const size_t bytes = delta_gemm_scratch_bytes(args);
  const DeviceArray<uint8_t> scratch(std::vector<uint8_t>(bytes + kGuardBytes, 0xff));
  args.scratch = scratch.data();
  EXPECT_EQ(launch_delta_gemm(args, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto after = scratch.to_host();
  EXPECT_EQ(std::count(after.begin() + bytes, after.end(), 0xff), kGuardBytes)
      << "a stray write behind the scratch";
  std::vector<std::vector<T>> result;
  for (const auto& y : ys) result.push_back(y->to_host());
  return result;
}

template <typename T>
std::vector<std::vector<T>> run_cpu(const Call& call, Tensors<T> tensors) {
  const OneArena arena(call.banks);
  for (size_t layer = 0; layer < call.banks.size(); ++layer) {
    std::vector<int32_t> slots;
    for (int64_t t = 0; t < call.tokens(); ++t) slots.push_back(call.slot(layer, t));
    const Bank& bank = call.banks[layer];
    delta_gemm_cpu<T>(
        {{tensors.y[layer].data() + call.y_lead, call.tokens(), bank.out, call.y_stride(layer)},
         {tensors.x.data() + call.x_lead, call.tokens(), bank.in, call.x_stride()},
         arena.words.data(),
         const_view(arena.tables[layer], bank.capacity(), kTableColumns),
         slots.data()},
        serial_for);
  }
  return tensors.y;
}

// How far a result may be from the exact one.
struct Bound {
  double cuda, cpu;
};

template <typename T>
Bound bound_of(const Call& call, const Gain& gain, size_t row, double before) {
  const double after = std::abs(before + gain.exact[row]) * rounding_of<T>();
  const double sums = static_cast<double>(call.in() + call.rank_bound() + 8) *
                      (gain.magnitude[row] + std::abs(before));
  Bound bound = {0, sums * 0x1p-24 + after};
  if (call.tokens() > kFew && !std::is_same_v<T, float>) {
    // fp32 sums of tensor cores, which cut off where others round; z is rounded to bf16.
    bound.cuda = sums * 0x1p-23 + 0x1p-8 * gain.z_magnitude[row] + after;
  } else {
    // Whole numbers: x and z are exact to 2^-23 of the largest of them, sums are exact, and are
    // rounded to fp32, multiplied with the scale, rounded and added to y.
    bound.cuda = 0x1p-23 * gain.spread[row] + 0x1p-22 * gain.magnitude[row] +
                 0x1p-23 * std::abs(before) + after;
  }
  return bound;
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Every element: within the bounds in the rows of tokens with a delta, untouched elsewhere.
template <typename T>
void check(const Call& call) {
  const auto tensors = random_tensors<T>(call);
  const auto got = run_cuda(call, tensors), cpu = run_cpu(call, tensors);
  const auto x = in_fp32(tensors.x);
  for (size_t layer = 0; layer < call.banks.size(); ++layer) {
    const auto& before = tensors.y[layer];
    const int64_t out = call.banks[layer].out, stride = call.y_stride(layer);
    ASSERT_TRUE(
        std::equal(before.begin(), before.begin() + call.y_lead, got[layer].begin(), same_bits<T>));
    for (int64_t t = 0; t < call.tokens(); ++t) {
      const Gain gain = gain_of(call.banks[layer], call.slot(layer, t),
                                x.data() + call.x_lead + t * call.x_stride());
      for (int64_t row = 0; row < stride; ++row) {
        const auto at = static_cast<size_t>(call.y_lead + t * stride + row);
        const auto where = [&] {
          return "layer " + std::to_string(layer) + ", token " + std::to_string(t) + " of " +
                 std::to_string(call.tokens()) + ", row " + std::to_string(row) + " of " +
                 std::to_string(out);
        };
        if (row >= out || gain.exact.empty()) {
          ASSERT_TRUE(same_bits(got[layer][at], before[at])) << "a stray write at " << where();
          continue;
        }
        const double y = to_float(before[at]), result = to_float(got[layer][at]);
        const Bound bound = bound_of<T>(call, gain, static_cast<size_t>(row), y);
        ASSERT_LE(std::abs(result - (y + gain.exact[row])), bound.cuda) << where();
        ASSERT_LE(std::abs(result - to_float(cpu[layer][at])), bound.cuda + bound.cpu) << where();
      }
    }
  }
}

// Every `step`-th token has the same bits alone, and nothing else is written.
template <typename T>
void check_company(const Call& together, int64_t step) {
  const auto tensors = random_tensors<T>(together);
  const auto all = run_cuda(together, tensors);
  for (int64_t t = 0; t < together.tokens(); t += step) {
    Call alone = together;
    alone.slots = {together.slots[t]};
    const auto row_of = [t](const std::vector<T>& rows, int64_t lead, int64_t stride) {
      std::vector<T> row(rows.begin(), rows.begin() + lead);
      row.insert(row.end(), &rows[lead + t * stride], &rows[lead + t * stride] + stride);
      return row;
    };
    Tensors<T> one = {row_of(tensors.x, together.x_lead, together.x_stride()), {}};
    std::vector<std::vector<T>> expected;
    for (size_t layer = 0; layer < together.banks.size(); ++layer) {
      const int64_t stride = together.y_stride(layer);
      one.y.push_back(row_of(tensors.y[layer], together.y_lead, stride));
      expected.push_back(row_of(all[layer], together.y_lead, stride));
    }
    const auto got = run_cuda(alone, one);
    for (size_t layer = 0; layer < together.banks.size(); ++layer) {
      ASSERT_TRUE(
          std::equal(got[layer].begin(), got[layer].end(), expected[layer].begin(), same_bits<T>))
          << "token " << t << " of " << together.tokens() << ", layer " << layer;
    }
  }
}

}  // namespace adamix::testing
