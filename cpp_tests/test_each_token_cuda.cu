// delta_gemm of few tokens on the GPU, each worked on alone: as the CPU has it, and with the bits
// of the same token in any other call; see delta_gemm_call.h.
#include <gtest/gtest.h>

#include "delta_gemm/each_token.cuh"
#include "delta_gemm_call.h"

namespace adamix {
namespace {

using testing::Bank;
using testing::bank_with_wrong_counts;
using testing::Call;
using testing::check;
using testing::check_company;
using testing::Counts;
using testing::has_device;
using testing::mixed_bank;
using testing::Segments;

class EachToken : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
  }
};

// Each of these slots alone, against the CPU; and among the others, with the same bits: as few as
// are worked on alone, and more, where two tokens of a slot go together.
template <typename T>
void check_slots(Call call, const std::vector<int32_t>& slots) {
  for (const int32_t slot : slots) {
    call.slots = {slot};
    check<T>(call);
  }
  if (slots.size() > 1) {
    call.slots = slots;
    check<T>(call);
    check_company<T>(call, 1);
  }
  while (call.slots.size() <= kEachTokens) {
    call.slots.insert(call.slots.end(), slots.begin(), slots.end());
  }
  check_company<T>(call, 5);
}

void check_all_types(const Call& call, const std::vector<int32_t>& slots) {
  SCOPED_TRACE(std::to_string(call.in()) + " inputs, " + std::to_string(call.banks[0].out) +
               " outputs");
  check_slots<float>(call, slots);
  check_slots<Half>(call, slots);
  check_slots<BFloat16>(call, slots);
}

class EachTokenSizes : public EachToken,
                       public ::testing::WithParamInterface<std::pair<int64_t, int64_t>> {};

TEST_P(EachTokenSizes, AnyAlignment) {
  const auto [in, out] = GetParam();
  for (const int64_t alignment : {1, 4}) {
    check_all_types({{mixed_bank(in, out, alignment)}, {}}, {0, 1, 2, 3, -1, 4});
  }
}

INSTANTIATE_TEST_SUITE_P(Edges, EachTokenSizes,
                         ::testing::Values(std::pair<int64_t, int64_t>{1, 1}, std::pair{33, 100},
                                           std::pair{100, 257}, std::pair{257, 33},
                                           std::pair{256, 256}, std::pair{520, 1030},
                                           std::pair{8, 31}));

class EachTokenWidths : public EachToken, public ::testing::WithParamInterface<int> {};

// Part of a run, of a group and of a stage, and more than one of each.
TEST_P(EachTokenWidths, Alone) {
  for (const int64_t alignment : {1, 4}) {
    Bank bank{300, 340, alignment};
    for (const int64_t rank : {1, 8, 13, 37, 150}) {
      Counts counts(kMaxBits, 0);
      counts[kMaxBits - GetParam()] = rank;
      bank.add(counts, counts, static_cast<uint32_t>(rank));
    }
    check_all_types({{bank}, {}}, {0, 1, 2, 3, 4});
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, EachTokenWidths, ::testing::Range(1, kMaxBits + 1));

TEST_F(EachToken, LayersOfAnySize) {
  const std::vector<Bank> banks = {mixed_bank(300, 520, 4), mixed_bank(300, 64), mixed_bank(300, 1),
                                   mixed_bank(300, 100, 4)};
  for (size_t layers = 1; layers <= banks.size(); ++layers) {
    check_all_types({{banks.begin(), banks.begin() + layers}, {}}, {3, 0, 2});
  }
  Call most;
  for (int i = 0; i < kMaxLayers; ++i) most.banks.push_back(mixed_bank(40, 30 + 7 * i));
  check_all_types(most, {0, 3});
}

TEST_F(EachToken, RowsAnywhere) {
  for (const auto& [x_gap, y_gap, x_lead, y_lead] :
       {std::array<int64_t, 4>{0, 0, 1, 1}, {3, 3, 0, 0}, {8, 2, 0, 1}, {1, 0, 8, 3}}) {
    Call call = {{mixed_bank(200, 70, 4)}, {}};
    call.x_gap = x_gap, call.y_gap = y_gap, call.x_lead = x_lead, call.y_lead = y_lead;
    check_all_types(call, {0, 3});
  }
}

// One way in which the kernels read tables, and the other.
TEST_F(EachToken, AnyCapacity) {
  for (const int slots : {1, 13, 14, 26, 27, 60}) {
    Bank bank{40, 50};
    for (int i = 0; i < slots; ++i) {
      Counts counts(kMaxBits, 0);
      counts[i % kMaxBits] = 1 + i % 5;
      bank.add(counts, static_cast<uint32_t>(i));
    }
    check_slots<Half>({{bank}, {}}, {0, slots / 2, slots - 1, -1, slots, slots + 1});
  }
}

TEST_F(EachToken, ASlotWithMoreComponentsThanMaxRankIsEmpty) {
  Bank large = mixed_bank(100, 90);
  large.add({0, 0, 0, 0, 0, 0, 0, 9000}, 9);
  for (const int64_t max_rank : {0, 1, 17, 18, 33, 500, 9000}) {
    Call call = {{large, mixed_bank(100, 40), mixed_bank(100, 40)}, {}};
    call.banks[1].add({0, 0, 0, 0, 0, 0, 0, 1}, 5), call.banks[2].add({0, 1, 0, 0, 0, 0, 0, 0}, 5);
    call.max_rank = max_rank;
    check_slots<BFloat16>(call, {0, 3, 4});
  }
}

TEST_F(EachToken, ASlotWithOtherCountsInUThanInVIsEmpty) {
  Call call = {{bank_with_wrong_counts(100, 90), bank_with_wrong_counts(100, 600)}, {}};
  call.max_rank = 40;
  check_slots<BFloat16>(call, {0, 3});
}

TEST_F(EachToken, InASegment) {
  const Segments somewhere[] = {
      {{0}, {1}, {0}, {3}},
      {{5, -1, 0}, {0, 2, 3}, {0, 0, 0}, {0, 2, 3}},
      {{0}, {1, 1, 1, 4}, {1, -1, 0, 0}, {0, 2, 99, 3}},
  };
  for (const Segments& segments : somewhere) {
    Call call = {{mixed_bank(70, 90), mixed_bank(70, 33)}, {3}};
    call.segments = segments;
    if (segments.indices.size() == 3) call.segments->slots[1] = -1;
    check<float>(call);
    check<BFloat16>(call);
  }
  Call none = {{mixed_bank(70, 90)}, {-1}};
  none.segments = Segments{{0}, {0, 1}, {0, 0}, {3, -1}};
  check<Half>(none);
}

// Outputs enough for wide tiles on a device of up to 160 multiprocessors: whole panels and a part
// of one, more words than shared memory has room for, layers of both kinds of sizes.
TEST_F(EachToken, WideTiles) {
#if defined(ADAMIX_EMULATED)
  emulator::device.multiprocessors = 1;
  const int64_t out = 2080;
#else
  const int64_t out = 42000;
#endif
  for (const int64_t alignment : {1, 4}) {
    Bank bank = mixed_bank(40, out, alignment);
    bank.add({0, 17, 0, 33, 0, 600, 900, 31}, 7);
    const auto last = static_cast<int32_t>(bank.capacity() - 1);
    check_slots<BFloat16>({{bank}, {}}, {0, 3, last});
    check_slots<float>({{mixed_bank(40, 70, alignment), mixed_bank(40, out + 25, alignment)}, {}},
                       {3, 0});
  }
#if defined(ADAMIX_EMULATED)
  emulator::device = emulator::Device{};
#endif
}

// More runs than thread blocks, more panels than warps, more codes than shared memory has room for.
TEST_F(EachToken, LargeSizes) {
  Bank tall{300, 700, 4};
  tall.add({20, 30, 40, 50, 60, 70, 80, 90}, 7);
  tall.add({1, 2, 3, 4, 5, 20, 70, 33}, 14);
  check_slots<float>({{tall}, {}}, {0, 1});
  Bank wide{40, 1300, 4};
  wide.add({0, 300, 0, 0, 0, 7, 40, 4200}, 7);
  check_slots<BFloat16>({{wide}, {}}, {0});
  Bank beyond{24, 40, 4};
  beyond.add({0, 0, 0, 0, 0, 0, 0, 8200}, 7);
  check_slots<BFloat16>({{beyond}, {}}, {0});
  check_slots<Half>({{mixed_bank(3584, 96, 4)}, {}}, {0, 3});
  for (const int64_t in : {4500, 4504}) check_slots<Half>({{mixed_bank(in, 33)}, {}}, {0, 3});
  check_slots<BFloat16>({{mixed_bank(96, 3584)}, {}}, {0, 3});
  check_slots<BFloat16>({{mixed_bank(18944, 40, 4)}, {}}, {0, 3});
  check_slots<float>({{mixed_bank(30720, 33)}, {}}, {0, 3});
  check_slots<Half>({{mixed_bank(30728, 33)}, {}}, {0});
}

#if defined(ADAMIX_EMULATED)

class EachTokenDevices : public EachToken {
 protected:
  ~EachTokenDevices() override { emulator::device = emulator::Device{}; }
};

TEST_F(EachTokenDevices, AnyDevice) {
  Bank tall{300, 700, 4};
  tall.add({20, 30, 40, 50, 60, 70, 80, 90}, 7);
  for (const int multiprocessors : {1, 3, 7, 12, 200}) {
    for (const int kilobytes : {99, 163}) {
      emulator::device.multiprocessors = multiprocessors;
      emulator::device.shared_bytes = kilobytes * 1024;
      SCOPED_TRACE(std::to_string(multiprocessors) + " multiprocessors of " +
                   std::to_string(kilobytes) + " KiB");
      check_slots<float>({{tall, mixed_bank(300, 64)}, {}}, {0});
      check_slots<BFloat16>({{mixed_bank(6700, 300, 4)}, {}}, {3, 0});
      check_slots<BFloat16>({{mixed_bank(40, 1500, 4)}, {}}, {3, 0});
      check_slots<Half>({{mixed_bank(30720, 40, 4)}, {}}, {0});
    }
  }
}

#endif

}  // namespace
}  // namespace adamix
