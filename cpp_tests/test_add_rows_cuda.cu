// add_rows on the GPU: the bits that one fp32 sum and one rounding give, and nothing else touched.
#include <gtest/gtest.h>

#include <memory>

#include "add_rows/add_rows_cuda.h"
#include "add_rows_call.h"
#include "device.h"

namespace adamix {
namespace {

using testing::add_rows_calls;
using testing::AddRowsCall;
using testing::DeviceArray;
using testing::has_device;
using testing::kEmulated;
using testing::mixed_slots;
using testing::same_bytes;
using testing::text_of;

template <typename T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, float>) return Element::kFloat;
  return std::is_same_v<T, Half> ? Element::kHalf : Element::kBFloat16;
}

template <typename T>
void check(const AddRowsCall& call) {
  const DeviceArray<float> values(call.values());
  const DeviceArray<int32_t> slots(call.slots);
  std::vector<std::unique_ptr<DeviceArray<T>>> ys;
  AddRowsCudaArgs args = {};
  args.element = element_of<T>();
  for (const auto& y : call.ys<T>()) {
    ys.push_back(std::make_unique<DeviceArray<T>>(y));
    const int i = args.y_count++;
    args.ys[i] = {ys[i]->data() + call.y_lead, call.y_stride(i), call.widths[i]};
  }
  args.tokens = call.tokens();
  args.values = call.view(values.data());
  args.slots = slots.data();
  ASSERT_EQ(launch_add_rows(args, nullptr), cudaSuccess);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto expected = call.expected<T>();
  for (size_t i = 0; i < ys.size(); ++i) {
    ASSERT_TRUE(same_bytes(ys[i]->to_host(), expected[i])) << "y " << i;
  }
}

void check_all_types(const AddRowsCall& call) {
  SCOPED_TRACE(text_of(call));
  check<float>(call);
  check<Half>(call);
  check<BFloat16>(call);
}

class AddRowsCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
  }
};

TEST_F(AddRowsCuda, SizesAndPlaces) {
  for (const AddRowsCall& call : add_rows_calls()) check_all_types(call);
}

TEST_F(AddRowsCuda, AnyNumberOfTokens) {
  for (const int64_t tokens : {1, 2, 8, 128, 129, 300}) {
    check_all_types({{40, 24}, mixed_slots(tokens)});
  }
}

TEST_F(AddRowsCuda, MoreTokensThanAGridHasRows) {
  if (kEmulated) GTEST_SKIP() << "slow there";
  check<BFloat16>({{9, 8}, mixed_slots(2 * 65535 + 5)});
}

}  // namespace
}  // namespace adamix
