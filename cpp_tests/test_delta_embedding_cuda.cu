// delta_embedding on the GPU: against plain loops in double, with a bound for every element, and
// against delta_embedding_cpu.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "bank.h"
#include "delta_embedding/delta_embedding_cuda.h"
#include "device.h"

namespace adamix {
namespace {

using testing::Bank;
using testing::const_view;
using testing::Counts;
using testing::DeviceArray;
using testing::has_device;
using testing::mixed_bank;
using testing::random_numbers;
using testing::row_gain_of;
using testing::RowGain;

constexpr int64_t kGuardBytes = 512;

template <typename T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, float>) return Element::kFloat;
  return std::is_same_v<T, Half> ? Element::kHalf : Element::kBFloat16;
}

// Banks have V of bank.in codes, the hidden size, and U of bank.out, the vocabulary.
struct Call {
  Bank bank;
  std::vector<int64_t> tokens;
  std::vector<int32_t> slots;
  bool wide = true;               // tokens in int64
  int64_t y_gap = 2, y_lead = 0;  // elements
  int64_t max_rank = -1;

  int64_t count() const { return static_cast<int64_t>(tokens.size()); }
  int64_t stride() const { return bank.in + y_gap; }
  int64_t rank_bound() const { return max_rank >= 0 ? max_rank : bank.max_rank(); }

  RowGain gain(int64_t t) const {
    const int32_t slot = slots[t];
    const bool there = slot >= 0 && slot < bank.capacity();
    const bool fits = there && bank.deltas[slot].rank() <= rank_bound();
    return row_gain_of(bank, fits ? slot : -1, tokens[t]);
  }
};

// Each slot of mixed_bank, the base, and slots and tokens that there are not.
Call mixed_call(Bank bank, int64_t count) {
  const int32_t some[] = {3, 0, -1, 2, 0, 1, 4, 3, 0, -2147483647, 2147483647, 0, 3};
  Call call = {std::move(bank), {}, {}};
  const int64_t vocab = call.bank.out;
  for (int64_t t = 0; t < count; ++t) {
    call.slots.push_back(some[t * t % 13 * 7 % 13]);
    const int64_t edges[] = {0, vocab - 1, vocab, -1, -(int64_t{1} << 31), (int64_t{1} << 31) - 1};
    call.tokens.push_back(t % 7 == 6 ? edges[t / 7 % 6] : t * 37 % vocab);
  }
  return call;
}

template <typename T>
std::vector<T> random_y(const Call& call) {
  return random_numbers<T>(call.y_lead + call.count() * call.stride(), 1e-2f, 6);
}

// y afterwards, with all that lies round its rows.
template <typename T>
std::vector<T> run_cuda(const Call& call, const std::vector<T>& y_before) {
  const DeviceArray<uint32_t> arena(call.bank.arena);
  const DeviceArray<int64_t> table(call.bank.table), wide(call.tokens);
  const DeviceArray<int32_t> narrow(std::vector<int32_t>(call.tokens.begin(), call.tokens.end()));
  const DeviceArray<int32_t> slots(call.slots);
  const DeviceArray<T> y(y_before);
  DeltaEmbeddingCudaArgs args = {};
  args.element = element_of<T>();
  args.y = y.data() + call.y_lead;
  args.y_row_stride = call.stride();
  args.tokens = {call.wide ? static_cast<const void*>(wide.data()) : narrow.data(), call.wide};
  args.token_count = call.count();
  args.vocab = call.bank.out;
  args.hidden = call.bank.in;
  args.arena = arena.data();
  args.table = table.data();
  args.capacity = call.bank.capacity();
  args.slots = slots.data();
  args.max_rank = call.rank_bound();
  // Scratch begins as NaN and ends in some: nothing may depend on it, nothing be written behind it.
  const size_t bytes = delta_embedding_scratch_bytes(args);
  const DeviceArray<uint8_t> scratch(std::vector<uint8_t>(bytes + kGuardBytes, 0xff));
  args.scratch = scratch.data();
  EXPECT_EQ(launch_delta_embedding(args, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto after = scratch.to_host();
  EXPECT_EQ(std::count(after.begin() + bytes, after.end(), 0xff), kGuardBytes)
      << "a stray write behind the scratch";
  return y.to_host();
}

template <typename T>
std::vector<T> run_cpu(const Call& call, std::vector<T> y) {
  delta_embedding_cpu<T>({{y.data() + call.y_lead, call.count(), call.bank.in, call.stride()},
                          {call.tokens.data(), true},
                          call.bank.out,
                          call.bank.arena.data(),
                          const_view(call.bank.table, call.bank.capacity(), kTableColumns),
                          call.slots.data()},
                         serial_for);
  return y;
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Every element: within the bounds where a row is added, untouched elsewhere.
template <typename T>
void check(const Call& call) {
  const auto before = random_y<T>(call);
  const auto got = run_cuda(call, before), cpu = run_cpu(call, before);
  ASSERT_TRUE(std::equal(before.begin(), before.begin() + call.y_lead, got.begin(), same_bits<T>));
  const double terms = static_cast<double>(call.rank_bound() + 3) * 0x1p-24;
  for (int64_t t = 0; t < call.count(); ++t) {
    const RowGain gain = call.gain(t);
    for (int64_t h = 0; h < call.stride(); ++h) {
      const auto at = static_cast<size_t>(call.y_lead + t * call.stride() + h);
      const auto where = [&] {
        return "token " + std::to_string(t) + " of " + std::to_string(call.count()) + ", column " +
               std::to_string(h) + " of " + std::to_string(call.bank.in);
      };
      if (h >= call.bank.in || gain.exact.empty()) {
        ASSERT_TRUE(same_bits(got[at], before[at])) << "a stray write at " << where();
        continue;
      }
      const double y = to_float(before[at]), exact = y + gain.exact[h], result = to_float(got[at]);
      const double after = testing::rounding_at<T>(exact);
      // Whole numbers: w is rounded to fp32 and to 2^-23 of the largest; sums are exact, and are
      // rounded to fp32 and added to y.
      const double cuda =
          0x1p-23 * gain.spread[h] + 0x1p-23 * gain.magnitude[h] + 0x1p-23 * std::abs(y) + after;
      const double bound_of_cpu = terms * (gain.magnitude[h] + std::abs(y)) + after;
      ASSERT_LE(std::abs(result - exact), cuda) << where();
      ASSERT_LE(std::abs(result - to_float(cpu[at])), cuda + bound_of_cpu) << where();
    }
  }
}

void check_all_types(Call call) {
  check<float>(call);
  check<Half>(call);
  call.wide = false;
  check<BFloat16>(call);
}

class DeltaEmbeddingCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
  }
};

class DeltaEmbeddingCudaSizes : public DeltaEmbeddingCuda,
                                public ::testing::WithParamInterface<std::pair<int64_t, int64_t>> {
};

TEST_P(DeltaEmbeddingCudaSizes, MixedSlots) {
  const auto [vocab, hidden] = GetParam();
  check_all_types(mixed_call(mixed_bank(hidden, vocab), 29));
  check_all_types(mixed_call(mixed_bank(hidden, vocab, 4), 29));
}

INSTANTIATE_TEST_SUITE_P(Edges, DeltaEmbeddingCudaSizes,
                         ::testing::Values(std::pair<int64_t, int64_t>{1, 1}, std::pair{33, 31},
                                           std::pair{256, 256}, std::pair{513, 257},
                                           std::pair{300, 520}, std::pair{200, 1300}));

class DeltaEmbeddingCudaWidths : public DeltaEmbeddingCuda,
                                 public ::testing::WithParamInterface<int> {};

TEST_P(DeltaEmbeddingCudaWidths, Alone) {
  for (const int64_t rank : {1, 37}) {
    Counts counts(kMaxBits, 0);
    counts[kMaxBits - GetParam()] = rank;
    Bank bank{300, 530, 4};
    bank.add(counts, counts, 1);
    Call call = {bank, {529, 0, 31, 256, 511, 512}, {0, 0, -1, 0, 0, 0}};
    check_all_types(call);
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, DeltaEmbeddingCudaWidths, ::testing::Range(1, kMaxBits + 1));

TEST_F(DeltaEmbeddingCuda, AnyNumberOfTokens) {
  for (const int64_t count : {0, 1, 2, 3, 16, 128, 129, 300}) {
    check_all_types(mixed_call(mixed_bank(90, 70, 4), count));
  }
}

TEST_F(DeltaEmbeddingCuda, AWideTokenIsNotCutTo32Bits) {
  constexpr int64_t kWide = int64_t{1} << 32;
  check<float>({mixed_bank(40, 30), {kWide, 3, kWide + 3, 3 - kWide}, {0, 0, 0, 0}});
}

// More than the warps of a token have in one turn, and than up has in shared memory.
TEST_F(DeltaEmbeddingCuda, ManyComponents) {
  Bank bank{280, 300, 4};
  bank.add({20, 30, 40, 50, 60, 70, 80, 90}, 7);
  bank.add({2100, 0, 0, 0, 0, 7, 40, 1}, 14);
  check<float>({bank, {299, 0, 100}, {0, 1, 1}});
  check<BFloat16>({bank, {2, 0, 100}, {0, 1, 0}});
}

TEST_F(DeltaEmbeddingCuda, RowsAnywhere) {
  for (const auto& [gap, lead] : {std::pair<int64_t, int64_t>{0, 1}, {3, 0}, {8, 2}}) {
    Call call = mixed_call(mixed_bank(200, 70, 4), 131);
    call.y_gap = gap, call.y_lead = lead;
    check_all_types(call);
  }
}

TEST_F(DeltaEmbeddingCuda, ASlotWithMoreComponentsThanMaxRankIsEmpty) {
  for (const int64_t max_rank : {0, 1, 32}) {
    Call call = mixed_call(mixed_bank(100, 90), 12);
    call.max_rank = max_rank;
    const auto before = random_y<float>(call);
    const auto got = run_cuda(call, before);
    for (int64_t t = 0; t < call.count(); ++t) {
      const bool adds = !call.gain(t).exact.empty();
      const auto* row = &before[t * call.stride()];
      EXPECT_EQ(std::equal(row, row + 100, &got[t * call.stride()]), !adds) << "token " << t;
    }
  }
}

// Sums are exact: the same token has the same bits alone and in any company.
TEST_F(DeltaEmbeddingCuda, ATokenDoesNotFeelItsCompany) {
  const Call together = mixed_call(mixed_bank(300, 520, 4), 150);
  const auto y = random_y<BFloat16>(together);
  const auto all = run_cuda(together, y);
  for (int64_t t = 0; t < together.count(); t += 13) {
    const Call alone = {together.bank, {together.tokens[t]}, {together.slots[t]}};
    const auto* row = &y[t * together.stride()];
    const auto got = run_cuda(alone, std::vector<BFloat16>(row, row + together.stride()));
    ASSERT_TRUE(
        std::equal(got.begin(), got.end(), &all[t * together.stride()], same_bits<BFloat16>))
        << "token " << t;
  }
}

#if defined(ADAMIX_EMULATED)

class DeltaEmbeddingCudaDevices : public DeltaEmbeddingCuda {
 protected:
  ~DeltaEmbeddingCudaDevices() override { emulator::device = emulator::Device{}; }
};

TEST_F(DeltaEmbeddingCudaDevices, OnAnyDevice) {
  for (const int multiprocessors : {1, 3, 200}) {
    for (const int kilobytes : {99, 163}) {
      emulator::device.multiprocessors = multiprocessors;
      emulator::device.shared_bytes = kilobytes * 1024;
      SCOPED_TRACE(std::to_string(multiprocessors) + " multiprocessors");
      check<BFloat16>(mixed_call(mixed_bank(1500, 40, 4), 13));
    }
  }
}

#endif

}  // namespace
}  // namespace adamix
