#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bindings/cuda_context.h"
#include "bindings/delta_gemm_overloads.h"
#include "delta_gemm/delta_gemm_cuda.h"

// delta_gemm's CUDA kernels behind its overloads: scratch memory, launch on torch's current stream.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

// Adds the delta to ys; what routes point to is kept by the caller.
void launch(const DeltaGemmInputs& inputs, const Tensors& ys, const TokenRoutes& routes) {
  const auto& [op, x, arena, tables, given_rank] = inputs;
  const int64_t tokens = x.size(0), in = x.size(1);
  ADAMIX_CHECK(in <= kMaxInFeatures, op, ": x must have at most ", kMaxInFeatures,
               " columns on a CUDA device, got ", in);
  // U's sums over components have room for as many as V's over inputs.
  for (const Tensor& y : ys) {
    ADAMIX_CHECK(y.size(1) <= kMaxOutFeatures, op, ": outputs must be at most ", kMaxOutFeatures,
                 " on a CUDA device, got ", y.size(1));
  }
  const int64_t max_rank = std::min(rank_bound(inputs, ys), kMaxInFeatures);
  // Nothing to add; without inputs the kernels would not even write the z that they read.
  if (tokens == 0 || in == 0 || max_rank == 0) return;
  const Tensor rows = with_adjacent_rows(x), words = contiguous(arena);
  Tensors entries;
  for (const Tensor& table : tables) entries.push_back(contiguous(table));

  DeltaGemmCudaArgs args = {};
  for (size_t i = 0; i < ys.size(); ++i) {
    if (ys[i].size(1) == 0) continue;
    args.layers[args.layer_count++] = {ys[i].mutable_data_ptr(), ys[i].stride(0), ys[i].size(1),
                                       static_cast<const int64_t*>(entries[i].const_data_ptr())};
  }
  if (args.layer_count == 0) return;
  args.element = element_of(x.scalar_type());
  args.x = rows.const_data_ptr();
  args.x_row_stride = rows.stride(0);
  args.tokens = tokens;
  args.in = in;
  args.arena = static_cast<const uint32_t*>(words.const_data_ptr());
  args.capacity = tables[0].size(0);
  args.routes = routes;
  args.max_rank = max_rank;
  const Tensor scratch = torch::stable::new_empty(
      x, {static_cast<int64_t>(delta_gemm_scratch_bytes(args))}, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  check_cuda(op, launch_delta_gemm(args, current_stream(op, x.get_device_index())));
}

struct Cuda {
  static void add_slots(const DeltaGemmInputs& inputs, const Tensors& ys, const Tensor& slots) {
    const DeviceGuard guard(inputs.op, inputs.x);
    const Tensor route = contiguous(slots);
    TokenRoutes routes;
    routes.slots = ints(route);
    launch(inputs, ys, routes);
  }

  static void add_segments(const DeltaGemmInputs& inputs, const Tensors& ys,
                           const TokenSegments& segments) {
    const DeviceGuard guard(inputs.op, inputs.x);
    const Tensor indices = contiguous(segments.indices), counts = contiguous(segments.counts);
    const Tensor starts = contiguous(segments.starts), slots = contiguous(segments.slots);
    TokenRoutes routes;
    routes.token_indices = ints(indices);
    routes.token_counts = ints(counts);
    routes.token_starts = ints(starts);
    routes.segment_slots = ints(slots);
    routes.segments = counts.size(0);
    routes.indices = indices.size(0);
    launch(inputs, ys, routes);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CUDA, m) {
  DeltaGemmOverloads<Cuda>::implement(m);
}

}  // namespace adamix::bindings
