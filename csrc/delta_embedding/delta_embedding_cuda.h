#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "delta_embedding/delta_embedding.h"
#include "delta_gemm/delta_gemm_cuda.h"

// delta_embedding on the device; as in delta_embedding.h. Tokens, slots, ranks, widths and offsets
// are read on the device: a launch depends on nothing but the sizes below, so it can be captured in
// a graph while tokens and slots change and deltas are swapped in place.
namespace adamix {

struct DeltaEmbeddingCudaArgs {
  // Outputs
  Element element;  // of y
  void* y;          // [tokens, hidden], elements of a row adjacent, rows do not overlap
  int64_t y_row_stride;
  // Inputs
  TokenIds tokens;
  int64_t token_count;
  int64_t vocab;   // at most kMaxVocab
  int64_t hidden;  // at most kMaxOutFeatures
  const uint32_t* arena;
  const int64_t* table;  // [capacity, kTableColumns]
  int64_t capacity;
  const int32_t* slots;  // [tokens]
  int64_t max_rank;      // a slot with more components counts as empty; at most kMaxInFeatures
  // Scratch
  void* scratch;  // delta_embedding_scratch_bytes(args), aligned to 256 bytes
};

size_t delta_embedding_scratch_bytes(const DeltaEmbeddingCudaArgs& args);

// Asynchronous on the stream; no allocation, no synchronisation.
cudaError_t launch_delta_embedding(const DeltaEmbeddingCudaArgs& args, cudaStream_t stream);

}  // namespace adamix
