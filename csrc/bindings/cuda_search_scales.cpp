#include <torch/csrc/stable/library.h>

#include "bindings/cuda_context.h"
#include "bindings/search_scales_args.h"
#include "search_scales/search_scales_cuda.h"

// search_scales' CUDA kernel behind its operator: launch on torch's current stream.
namespace adamix::bindings {
namespace {

Tensor search_scales(const Tensor& lanes, const Tensor& bits, std::optional<Tensor> weights) {
  const char* op = "search_scales";
  check_search_scales(lanes, bits, weights);
  const DeviceGuard guard(op, lanes);
  const ScaleSearch search(lanes, bits, weights);
  check_cuda(op, launch_search_scales(search.args(), current_stream(op, lanes.get_device_index())));
  return search.scales;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CUDA, m) {
  m.impl("search_scales", TORCH_BOX(&search_scales));
}

}  // namespace adamix::bindings
