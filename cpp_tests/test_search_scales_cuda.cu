// search_scales on the GPU against search_scales_cpu, bit by bit. Skipped by name without a GPU.
#include <gtest/gtest.h>

#include <cstring>

#include "device.h"
#include "search_scales/search_scales_cuda.h"
#include "search_scales_call.h"

namespace adamix {
namespace {

using testing::cpu_rounds_once;
using testing::DeviceArray;
using testing::has_device;
using testing::kEmulated;
using testing::LaneKind;
using testing::search_scales_calls;
using testing::SearchScalesCall;
using testing::text_of;

class SearchScalesCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
    if (!cpu_rounds_once()) GTEST_SKIP() << "this CPU has no FMA";
  }
};

std::vector<float> on_gpu(const SearchScalesCall& call, const std::vector<int32_t>& widths) {
  const DeviceArray<float> scales(call.no_scales()), lanes(call.lanes()), weights(call.weights());
  const DeviceArray<int32_t> bits(widths);
  const auto args = call.args(scales.data(), lanes.data(), bits.data(), weights.data());
  EXPECT_EQ(launch_search_scales(args, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  return scales.to_host();
}

void expect_the_cpus_scales(const SearchScalesCall& call) {
  SCOPED_TRACE(text_of(call));
  EXPECT_EQ(on_gpu(call, call.bits()), call.on_cpu());
}

TEST_F(SearchScalesCuda, TheScalesAreTheCpus) {
  for (const SearchScalesCall& call : search_scales_calls()) expect_the_cpus_scales(call);
}

TEST_F(SearchScalesCuda, LanesOfModels) {
  for (const int64_t n : {3584, 18944}) {
    for (const bool weighted : {false, true}) {
      expect_the_cpus_scales({kEmulated ? 2 : 64, n, LaneKind::kNormal, weighted});
      expect_the_cpus_scales({kEmulated ? 2 : 64, n, LaneKind::kHeavy, weighted});
    }
  }
}

// 60,000 entries are more than any device has room for beside the sums; 151,936 are a vocabulary.
TEST_F(SearchScalesCuda, LanesThatAreLongerThanSharedMemory) {
  for (const int64_t n : {60000, 151936}) {
    for (const bool weighted : {false, true})
      expect_the_cpus_scales({kEmulated ? 1 : 16, n, LaneKind::kNormal, weighted, 5, 3});
  }
}

TEST_F(SearchScalesCuda, ManyLanes) {
  expect_the_cpus_scales({kEmulated ? 200 : 70000, 40, LaneKind::kHeavy});
}

TEST_F(SearchScalesCuda, WidthsThatThereAreNotCountAsTheNearest) {
  const SearchScalesCall call = {6, 300};
  const auto wrong = on_gpu(call, {-5, 0, -2147483647, 9, 100, 2147483647});
  EXPECT_EQ(wrong, on_gpu(call, {1, 1, 1, 8, 8, 8}));
}

TEST_F(SearchScalesCuda, NanAndInfinityEndAndGetAPositiveScale) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = HUGE_VALF;
  const DeviceArray<float> lanes(
      {nan, 1.0f, inf, 1.0f, -inf, nan, nan, nan, 3.4e38f, -3.4e38f, 1e-44f, 0.0f});
  const DeviceArray<int32_t> bits({1, 2, 8, 1, 2, 8});
  const DeviceArray<float> scales(std::vector<float>(6, -1.0f));
  const SearchScalesArgs args = {scales.data(), {lanes.data(), 6, 2, 2}, bits.data(), nullptr};
  ASSERT_EQ(launch_search_scales(args, nullptr), cudaSuccess);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (const float scale : scales.to_host()) EXPECT_TRUE(scale > 0.0f && scale < inf) << scale;
}

#if defined(ADAMIX_EMULATED)
// What a lane may take and one entry more, on devices with less.
TEST_F(SearchScalesCuda, AnySharedMemory) {
  const auto before = emulator::device;
  for (const int kilobytes : {2, 8}) {
    emulator::device.shared_bytes = kilobytes * 1024;
    for (int64_t n = kilobytes * 256 - 360; n <= kilobytes * 256; n += n < 300 ? 1 : 7)
      expect_the_cpus_scales({1, n, LaneKind::kHeavy});
  }
  emulator::device = before;
}
#endif

}  // namespace
}  // namespace adamix
