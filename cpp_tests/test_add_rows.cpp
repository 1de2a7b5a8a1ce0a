#include <gtest/gtest.h>

#include "add_rows_call.h"

namespace adamix {
namespace {

using testing::add_rows_calls;
using testing::AddRowsCall;
using testing::mixed_slots;
using testing::same_bytes;
using testing::text_of;
using testing::threads_for;

template <typename T>
void check(const AddRowsCall& call, const ParallelFor& parallel) {
  const auto values = call.values();
  auto ys = call.ys<T>();
  AddRowsArgs<T> args = {};
  for (size_t i = 0; i < ys.size(); ++i) {
    args.ys[args.y_count++] = {ys[i].data() + call.y_lead, call.tokens(), call.widths[i],
                               call.y_stride(i)};
  }
  args.values = call.view(values.data());
  args.slots = call.slots.data();
  add_rows_cpu(args, parallel);
  const auto expected = call.expected<T>();
  for (size_t i = 0; i < ys.size(); ++i) EXPECT_TRUE(same_bytes(ys[i], expected[i])) << "y " << i;
}

TEST(AddRows, SizesAndPlaces) {
  for (const AddRowsCall& call : add_rows_calls()) {
    SCOPED_TRACE(text_of(call));
    check<float>(call, serial_for);
    check<Half>(call, serial_for);
    check<BFloat16>(call, serial_for);
  }
}

TEST(AddRows, OnThreads) {
  const AddRowsCall call = {{40, 9}, mixed_slots(100)};
  for (const int threads : {1, 3}) check<BFloat16>(call, threads_for(threads));
}

}  // namespace
}  // namespace adamix
