#include <torch/csrc/stable/library.h>

#include "bindings/add_rows_args.h"
#include "bindings/cpu_context.h"
#include "common/float16.h"

// add_rows' CPU kernel behind its operator.
namespace adamix::bindings {
namespace {

template <typename T>
void launch(const std::vector<Tensor>& ys, const Tensor& values, const Tensor& slots) {
  AddRowsArgs<T> args = {};
  for (const Tensor& y : ys) args.ys[args.y_count++] = mutable_view<T>(y);
  args.values = const_view<float>(values);
  args.slots = slots.const_data_ptr<int32_t>();
  add_rows_cpu<T>(args, torch_for);
}

void add_rows_(const std::vector<Tensor>& ys, const Tensor& values, const Tensor& slots) {
  check_add_rows(ys, values, slots);
  const Tensor rows = with_adjacent_rows(values), routes = torch::stable::contiguous(slots);
  switch (ys[0].scalar_type()) {
    case ScalarType::Half: return launch<Half>(ys, rows, routes);
    case ScalarType::BFloat16: return launch<BFloat16>(ys, rows, routes);
    default: return launch<float>(ys, rows, routes);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CPU, m) {
  m.impl("add_rows_", TORCH_BOX(&add_rows_));
}

}  // namespace adamix::bindings
