#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bindings/cuda_context.h"
#include "bindings/delta_embedding_args.h"
#include "delta_embedding/delta_embedding_cuda.h"

// delta_embedding's CUDA kernels behind its operators: scratch memory, launch on torch's current
// stream.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

struct Cuda {
  static void add(const DeltaEmbeddingInputs& inputs, const Tensor& y) {
    const char* op = inputs.op;
    const DeviceGuard guard(op, y);
    ADAMIX_CHECK(y.size(1) <= kMaxOutFeatures, op, ": hidden_size must be at most ",
                 kMaxOutFeatures, " on a CUDA device, got ", y.size(1));
    const Tensor tokens = contiguous(inputs.tokens), slots = contiguous(inputs.slots);
    const Tensor table = contiguous(inputs.table), arena = contiguous(inputs.arena);
    DeltaEmbeddingCudaArgs args = {};
    args.element = element_of(y.scalar_type());
    args.y = y.mutable_data_ptr();
    args.y_row_stride = y.stride(0);
    args.tokens = token_ids(tokens);
    args.token_count = tokens.size(0);
    args.vocab = inputs.vocab;
    args.hidden = y.size(1);
    args.arena = static_cast<const uint32_t*>(arena.const_data_ptr());
    args.table = static_cast<const int64_t*>(table.const_data_ptr());
    args.capacity = table.size(0);
    args.slots = ints(slots);
    args.max_rank = std::min(rank_bound(inputs, y), kMaxInFeatures);
    const Tensor scratch = torch::stable::new_empty(
        y, {static_cast<int64_t>(delta_embedding_scratch_bytes(args))}, ScalarType::Byte);
    args.scratch = scratch.mutable_data_ptr();
    check_cuda(op, launch_delta_embedding(args, current_stream(op, y.get_device_index())));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CUDA, m) {
  DeltaEmbedding<Cuda>::implement(m);
}

}  // namespace adamix::bindings
