#include <torch/csrc/stable/library.h>

#include "bindings/cpu_context.h"
#include "bindings/search_scales_args.h"

// search_scales' CPU kernel behind its operator.
namespace adamix::bindings {
namespace {

Tensor search_scales(const Tensor& lanes, const Tensor& bits, std::optional<Tensor> weights) {
  check_search_scales(lanes, bits, weights);
  const ScaleSearch search(lanes, bits, weights);
  const SearchScalesArgs args = search.args();
  for (int64_t i = 0; i < args.lanes.rows; ++i) check_bits("search_scales", args.bits[i]);
  search_scales_cpu(args, torch_for);
  return search.scales;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CPU, m) {
  m.impl("search_scales", TORCH_BOX(&search_scales));
}

}  // namespace adamix::bindings
