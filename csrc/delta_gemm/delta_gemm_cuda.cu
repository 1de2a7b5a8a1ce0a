#include <algorithm>

#include "delta_gemm/delta_gemm_cuda.h"
#include "delta_gemm/each_token.cuh"
#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/many_tokens.cuh"
#include "delta_gemm/routes.cuh"

namespace adamix {
namespace {

size_t element_bytes(Element element) {
  return element == Element::kFloat ? 4 : 2;
}

// Tokens [first, first + count) of a launch.
DeltaGemmCudaArgs slice_tokens(const DeltaGemmCudaArgs& args, int64_t first, int64_t count) {
  DeltaGemmCudaArgs slice = args;
  const size_t bytes = element_bytes(args.element);
  slice.x = static_cast<const char*>(args.x) + first * args.x_row_stride * bytes;
  for (int i = 0; i < args.layer_count; ++i) {
    DeltaLayer& layer = slice.layers[i];
    layer.y = static_cast<char*>(layer.y) + first * layer.y_row_stride * bytes;
  }
  if (args.routes.slots != nullptr) slice.routes.slots += first;
  slice.routes.first_token += first;
  slice.tokens = count;
  return slice;
}

// Sums of fp32 products need more digits than the tensor cores' 16-bit operands have.
bool are_many(const DeltaGemmCudaArgs& args) {
  return args.tokens > kFewTokens && args.element != Element::kFloat &&
         args.capacity <= kMaxSortedSlots;
}

}  // namespace

size_t delta_gemm_scratch_bytes(const DeltaGemmCudaArgs& args) {
  if (are_many(args)) return many_tokens_scratch_bytes(args);
  return few_tokens_scratch_bytes(
      slice_tokens(args, 0, std::min<int64_t>(args.tokens, kFewTokens)));
}

cudaError_t launch_delta_gemm(const DeltaGemmCudaArgs& args, cudaStream_t stream) {
  if (are_many(args)) return launch_many_tokens(args, stream);
  for (int64_t first = 0; first < args.tokens; first += kFewTokens) {
    const int64_t count = std::min<int64_t>(kFewTokens, args.tokens - first);
    const DeltaGemmCudaArgs slice = slice_tokens(args, first, count);
    const bool one = is_each_token(slice);
    cudaError_t status =
        one ? launch_each_token_down(slice, stream) : launch_few_tokens_down(slice, stream);
    if (status != cudaSuccess) return status;
    status = one ? launch_each_token_up(slice, stream) : launch_few_tokens_up(slice, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace adamix
