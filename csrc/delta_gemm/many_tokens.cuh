#pragma once

#include <cuda_runtime_api.h>

#include "delta_gemm/delta_gemm_cuda.h"

// delta_gemm for many tokens a slot: see many_tokens.cu.
namespace adamix {

size_t many_tokens_scratch_bytes(const DeltaGemmCudaArgs& args);

// Needs 16-bit elements and args.capacity <= kMaxSortedSlots.
cudaError_t launch_many_tokens(const DeltaGemmCudaArgs& args, cudaStream_t stream);

constexpr int64_t kMaxSortedSlots = 8192;  // counters of the sort in shared memory

}  // namespace adamix
