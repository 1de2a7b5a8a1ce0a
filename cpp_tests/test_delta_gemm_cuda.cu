// delta_gemm on the GPU: see delta_gemm_call.h.
#include <gtest/gtest.h>

#include <limits>

#include "delta_gemm/each_token.cuh"
#include "delta_gemm_call.h"

namespace adamix {
namespace {

using testing::Bank;
using testing::bank_with_wrong_counts;
using testing::bound_of;
using testing::Call;
using testing::check;
using testing::check_company;
using testing::Counts;
using testing::Gain;
using testing::gain_of;
using testing::has_device;
using testing::kFew;
using testing::mixed_bank;
using testing::random_tensors;
using testing::run_cuda;
using testing::same_bits;
using testing::Segments;

void check_all_types(const Call& call) {
  SCOPED_TRACE(std::to_string(call.in()) + " inputs, " + std::to_string(call.banks[0].out) +
               " outputs, " + std::to_string(call.tokens()) + " tokens");
  check<float>(call);
  check<Half>(call);
  check<BFloat16>(call);
}

// Of mixed_bank: each of its slots, the base, and slots that there are not.
std::vector<int32_t> mixed_slots(int64_t tokens) {
  const int32_t some[] = {3, 0, -1, 2, 0, 1, 4, 3, 0, -2147483647, 2147483647, 0, 3};
  std::vector<int32_t> slots;
  for (int64_t t = 0; t < tokens; ++t) slots.push_back(some[t * t % 13 * 7 % 13]);
  return slots;
}

// So many tokens that those of a slot go together two by two (few_tokens.cuh), while fewer are each
// worked on alone (each_token.cuh).
constexpr int64_t kPaired = kEachTokens + 3;

// So many by tokens of the base.
std::vector<int32_t> paired(std::vector<int32_t> slots) {
  slots.resize(kPaired, -1);
  return slots;
}

class DeltaGemmCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
  }
};

class DeltaGemmCudaSizes : public DeltaGemmCuda,
                           public ::testing::WithParamInterface<std::pair<int64_t, int64_t>> {};

TEST_P(DeltaGemmCudaSizes, FewTokens) {
  const auto [in, out] = GetParam();
  for (const int64_t tokens : {int64_t{13}, kPaired}) {
    check_all_types({{mixed_bank(in, out)}, mixed_slots(tokens)});
    check_all_types({{mixed_bank(in, out, 4)}, mixed_slots(tokens)});
  }
}

TEST_P(DeltaGemmCudaSizes, ManyTokens) {
  const auto [in, out] = GetParam();
  check<Half>({{mixed_bank(in, out)}, mixed_slots(150)});
  check<BFloat16>({{mixed_bank(in, out, 4)}, mixed_slots(150)});
}

INSTANTIATE_TEST_SUITE_P(Edges, DeltaGemmCudaSizes,
                         ::testing::Values(std::pair<int64_t, int64_t>{1, 1}, std::pair{31, 33},
                                           std::pair{256, 256}, std::pair{257, 513},
                                           std::pair{520, 300}, std::pair{1300, 200}));

class DeltaGemmCudaWidths : public DeltaGemmCuda, public ::testing::WithParamInterface<int> {};

TEST_P(DeltaGemmCudaWidths, Alone) {
  for (const int64_t rank : {1, 37}) {
    Counts counts(kMaxBits, 0);
    counts[kMaxBits - GetParam()] = rank;
    Bank bank{300, 530, 4};
    bank.add(counts, counts, 1);
    check_all_types({{bank}, {0, 0, -1}});
    check_all_types({{bank}, paired({0, 0, -1})});
    std::vector<int32_t> many(131, 0);
    many[7] = -1;
    check<Half>({{bank}, many});
    check<BFloat16>({{bank}, many});
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, DeltaGemmCudaWidths, ::testing::Range(1, kMaxBits + 1));

TEST_F(DeltaGemmCuda, AnyNumberOfTokens) {
  for (const int64_t tokens : {0, 1, 2, 3, 16, 17, 128, 129, 300}) {
    check_all_types({{mixed_bank(70, 90, 4)}, mixed_slots(tokens)});
    check<BFloat16>({{mixed_bank(70, 90)}, std::vector<int32_t>(tokens, 3)});
    check<Half>({{mixed_bank(70, 90)}, std::vector<int32_t>(tokens, -1)});
  }
}

// More components than the kernels have in shared memory or in a tile at a time.
TEST_F(DeltaGemmCuda, ManyComponents) {
  Bank bank{300, 280, 4};
  bank.add({20, 30, 40, 50, 60, 70, 80, 90}, 7);
  bank.add({1, 2, 3, 4, 5, 20, 70, 33}, 14);
  check<float>({{bank}, {0, 1, 0}});
  check<float>({{bank}, paired({0, 1, 0})});
  check<BFloat16>({{bank}, mixed_slots(131)});
  Bank wide{40, 520, 4};
  wide.add({0, 0, 0, 0, 0, 7, 40, 4200}, 7);
  check<float>({{wide}, {0, 0, -1}});
  check<float>({{wide}, paired({0, 0, -1})});
  check<BFloat16>({{wide}, std::vector<int32_t>(129, 0)});
}

// Rows of x and y and words that may be read 16 bytes at a time, in whole tiles and in cut ones.
TEST_F(DeltaGemmCuda, WholeTiles) {
  for (const int64_t out : {256, 392}) {
    Bank bank{576, out, 4};
    bank.add({20, 30, 40, 50, 60, 20, 30, 40}, 7);
    bank.add({1, 2, 3, 4, 5, 20, 70, 33}, 14);
    Call call = {{bank}, mixed_slots(300)};
    call.y_gap = 8;
    check<Half>(call);
    check<BFloat16>(call);
    call.slots.assign(520, 0);
    check<BFloat16>(call);
  }
}

// More than one thread of the sort has places for.
TEST_F(DeltaGemmCuda, VeryManyTokens) {
  check<BFloat16>({{mixed_bank(31, 33)}, mixed_slots(8500)});
}

std::vector<Bank> three_layers() {
  return {mixed_bank(300, 520, 4), mixed_bank(300, 64), mixed_bank(300, 1)};
}

TEST_F(DeltaGemmCuda, LayersThatShareX) {
  for (const int64_t tokens : {int64_t{11}, kPaired, int64_t{140}}) {
    check_all_types({three_layers(), mixed_slots(tokens)});
  }
  Call most;
  for (int i = 0; i < kMaxLayers; ++i) most.banks.push_back(mixed_bank(40, 30 + i));
  for (const int64_t tokens : {int64_t{5}, kPaired}) {
    most.slots = mixed_slots(tokens);
    check_all_types(most);
  }
}

// Of large matrices, fewer tokens go together two by two.
TEST_F(DeltaGemmCuda, LargeLayersThatShareX) {
  Call call = {{mixed_bank(6000, 3500, 4), mixed_bank(6000, 2500, 4)}, {3, 0, 0, -1, 3, 2}};
  ASSERT_GT(call.tokens() * 6000 * 6000, kEachSize);
  check<BFloat16>(call);
}

TEST_F(DeltaGemmCuda, RowsAnywhere) {
  for (const int64_t tokens : {int64_t{9}, kPaired, int64_t{133}}) {
    for (const auto& [x_gap, y_gap, x_lead, y_lead] :
         {std::array<int64_t, 4>{0, 0, 1, 1}, {3, 3, 0, 0}, {8, 2, 0, 1}, {1, 0, 8, 2}}) {
      Call call = {{mixed_bank(200, 70, 4)}, mixed_slots(tokens)};
      call.x_gap = x_gap, call.y_gap = y_gap, call.x_lead = x_lead, call.y_lead = y_lead;
      check_all_types(call);
    }
  }
}

TEST_F(DeltaGemmCuda, ASlotWithMoreComponentsThanMaxRankIsEmpty) {
  for (const int64_t tokens : {int64_t{12}, kPaired, int64_t{140}}) {
    for (const int64_t max_rank : {0, 1, 32}) {
      Call call = {{mixed_bank(100, 90), mixed_bank(100, 40)}, mixed_slots(tokens)};
      call.max_rank = max_rank;
      check_all_types(call);
    }
  }
}

TEST_F(DeltaGemmCuda, ASlotWithOtherCountsInUThanInVIsEmpty) {
  for (const int64_t tokens : {int64_t{12}, kPaired, int64_t{140}}) {
    Call call = {{bank_with_wrong_counts(100, 90)}, mixed_slots(tokens)};
    call.max_rank = 40;
    check_all_types(call);
  }
}

// Segments in any order, with gaps between them, more of them than tokens; and what no segment
// should hold but a device may not trip over: the base, tokens and starts that there are not.
Call in_segments(int64_t tokens, std::vector<Bank> banks) {
  Call call = {std::move(banks), std::vector<int32_t>(tokens, -1)};
  Segments segments;
  segments.indices.assign(tokens, -1);  // in gaps
  const auto n = static_cast<int32_t>(tokens);
  for (int32_t i = 0; i < n; ++i) segments.indices[i] = (i * 7 + 3) % n;  // n is no multiple of 7
  if (n > 8) segments.indices[1] = n + 5, segments.indices[6] = -1;
  const auto add = [&](int32_t start, int32_t count, int32_t slot) {
    segments.starts.push_back(start), segments.counts.push_back(count);
    segments.slots.push_back(slot);
    if (slot < 0 || slot >= call.banks[0].capacity() || start < 0) return;
    for (int32_t i = start; i < std::min(n, start + count); ++i) {
      const int32_t token = segments.indices[i];
      if (token >= 0 && token < n) call.slots[token] = slot;
    }
  };
  const int32_t half = n / 2;
  add(half, n - half + 3, 3);  // ends behind the last index
  if (half >= 2) add(0, 2, 0);
  const int empty = n > kFew ? 1100 : n + 1;  // 1100: more than a thread block has threads
  for (int i = 0; i < empty; ++i) add(i % n, 0, i % 4);
  add(2, 1, -1);
  add(3, 1, 99);
  if (half > 6) add(5, half - 6, 0);  // 4 and half - 1 are in none
  add(n + 2, 1, 0);
  add(-1, 2, 0);
  add(1, -4, 3);
  call.segments = segments;
  return call;
}

TEST_F(DeltaGemmCuda, TokensInSegments) {
  for (const int64_t tokens : {1, 5, 17, 128, 129, 300}) {
    check_all_types(in_segments(tokens, {mixed_bank(70, 90), mixed_bank(70, 33)}));
  }
}

TEST_F(DeltaGemmCuda, NanAndInfinityStayWithinTheirToken) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const int64_t tokens : {int64_t{9}, kPaired, int64_t{133}}) {
    const Call call = {{mixed_bank(300, 270)}, std::vector<int32_t>(tokens, 0)};
    auto tensors = random_tensors<BFloat16>(call);
    const auto clean = run_cuda(call, tensors)[0];
    const auto put = [&](int64_t token, int64_t k, float value) {
      tensors.x[token * call.x_stride() + k] = from_float<BFloat16>(value);
    };
    put(1, 17, std::numeric_limits<float>::quiet_NaN());
    put(4, 299, kInfinity);
    put(tokens - 1, 0, -kInfinity);
    const auto got = run_cuda(call, tensors)[0];
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t row = 0; row < 270; ++row) {
        const auto at = static_cast<size_t>(t * call.y_stride(0) + row);
        if (t == 1 || t == 4 || t == tokens - 1) {
          ASSERT_FALSE(std::isfinite(to_float(got[at]))) << "token " << t << ", row " << row;
        } else {
          ASSERT_TRUE(same_bits(got[at], clean[at])) << "token " << t << ", row " << row;
        }
      }
    }
  }
}

TEST_F(DeltaGemmCuda, ZerosAndNumbersOfAnySize) {
  for (const auto& [size, tokens] : {std::pair<float, int64_t>{0.0f, 6},
                                     {0.0f, kPaired},
                                     {1e-30f, 6},
                                     {1e-30f, kPaired},
                                     {1e-12f, 6},
                                     {1e12f, 6},
                                     {1e12f, kPaired}}) {
    const Call call = {{mixed_bank(90, 50)}, mixed_slots(tokens)};
    auto tensors = random_tensors<float>(call);
    for (float& value : tensors.x) value *= size;
    const auto got = run_cuda(call, tensors)[0];
    for (int64_t t = 0; t < call.tokens(); ++t) {
      const Gain gain = gain_of(call.banks[0], call.slot(0, t), &tensors.x[t * 90]);
      for (size_t row = 0; row < gain.exact.size(); ++row) {
        const size_t at = static_cast<size_t>(t * call.y_stride(0)) + row;
        const double before = tensors.y[0][at];
        ASSERT_LE(std::abs(got[at] - (before + gain.exact[row])),
                  bound_of<float>(call, gain, row, before).cuda)
            << "token " << t << ", row " << row << ", size " << size;
      }
    }
  }
}

// Up to 128 tokens, sums are exact: the same token has the same bits alone and in any company.
TEST_F(DeltaGemmCuda, ATokenDoesNotFeelItsCompany) {
  for (const int64_t tokens : {11, 128}) {
    check_company<BFloat16>({three_layers(), mixed_slots(tokens)}, tokens / 9);
  }
}

#if defined(ADAMIX_EMULATED)

class DeltaGemmCudaDevices : public DeltaGemmCuda {
 protected:
  ~DeltaGemmCudaDevices() override { emulator::device = emulator::Device{}; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kLeastKilobytes = 120;  // a Hopper has more; two stages of its kernels
#else
constexpr int kLeastKilobytes = 99;
#endif

// 99 KiB are the least that there is, 163 KiB an A100's.
template <typename Body>
void on_any_device(Body body) {
  for (const int multiprocessors : {1, 3, 7, 200}) {
    for (const int kilobytes : {kLeastKilobytes, 163}) {
      emulator::device.multiprocessors = multiprocessors;
      emulator::device.shared_bytes = kilobytes * 1024;
      SCOPED_TRACE(std::to_string(multiprocessors) + " multiprocessors of " +
                   std::to_string(kilobytes) + " KiB");
      body();
    }
  }
}

TEST_F(DeltaGemmCudaDevices, FewTokensOnAnyDevice) {
  on_any_device([] {
    check<float>({three_layers(), mixed_slots(11)});
    check<float>({three_layers(), mixed_slots(kPaired)});
    for (const auto& slots : {std::vector<int32_t>{3, 0, 0}, paired({3, 0, 0})}) {
      check<BFloat16>({{mixed_bank(6700, 300, 4)}, slots});
      check<BFloat16>({{mixed_bank(40, 1500, 4)}, slots});
    }
  });
}

TEST_F(DeltaGemmCudaDevices, ManyTokensOnAnyDevice) {
  on_any_device([] {
    check<BFloat16>({{mixed_bank(1300, 200)}, mixed_slots(131)});
    check<Half>({{mixed_bank(1344, 136, 4)}, std::vector<int32_t>(260, 3)});
  });
}

#endif

}  // namespace
}  // namespace adamix
