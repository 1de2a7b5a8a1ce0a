#include <torch/csrc/stable/library.h>

#include "add_rows/add_rows_cuda.h"
#include "bindings/add_rows_args.h"
#include "bindings/cuda_context.h"

// add_rows' CUDA kernel behind its operator: launch on torch's current stream.
namespace adamix::bindings {
namespace {

void add_rows_(const std::vector<Tensor>& ys, const Tensor& values, const Tensor& slots) {
  const char* op = "add_rows_";
  check_add_rows(ys, values, slots);
  const DeviceGuard guard(op, values);
  const Tensor rows = with_adjacent_rows(values), routes = torch::stable::contiguous(slots);
  AddRowsCudaArgs args = {};
  args.element = element_of(ys[0].scalar_type());
  for (const Tensor& y : ys)
    args.ys[args.y_count++] = {y.mutable_data_ptr(), y.stride(0), y.size(1)};
  args.tokens = routes.size(0);
  args.values = const_view<float>(rows);
  args.slots = ints(routes);
  check_cuda(op, launch_add_rows(args, current_stream(op, values.get_device_index())));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CUDA, m) {
  m.impl("add_rows_", TORCH_BOX(&add_rows_));
}

}  // namespace adamix::bindings
