#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "delta_gemm/delta_gemm.h"

// delta_gemm on the device, for several matrices on one x (q/k/v; gate/up): per layer
//
//   y[t] += U_level · diag(scale) · V_level · x[t]     with the delta in the slot of token t
//
// as in delta_gemm.h. Slots, ranks, widths and offsets are read on the device: a launch depends on
// nothing but the sizes below, so it can be captured in a graph while slots are rerouted and deltas
// are swapped in place.
namespace adamix {

constexpr int64_t kMaxInFeatures = 1 << 16;   // sums of byte products stay below 2^31
constexpr int64_t kMaxOutFeatures = 1 << 19;  // and so do a delta's words

enum class Element { kFloat, kHalf, kBFloat16 };

struct DeltaLayer {
  void* y;  // [tokens, out], elements of a row adjacent, rows do not overlap
  int64_t y_row_stride;
  int64_t out;
  const int64_t* table;  // [capacity, kTableColumns]
};

// Which token goes to which slot: a slot for every token, or tokens already sorted into segments.
struct TokenRoutes {
  const int32_t* slots = nullptr;  // [tokens]; if null, the segments:
  const int32_t* token_indices = nullptr;
  const int32_t* token_counts = nullptr;   // [segments]
  const int32_t* token_starts = nullptr;   // [segments]: where a segment begins in token_indices
  const int32_t* segment_slots = nullptr;  // [segments]
  int64_t segments = 0;
  int64_t indices = 0;      // of token_indices
  int64_t first_token = 0;  // of this launch: token_indices count from here
};

struct DeltaGemmCudaArgs {
  // Outputs
  DeltaLayer layers[kMaxLayers];
  int layer_count;
  // Inputs
  Element element;  // of x and of every y
  const void* x;    // [tokens, in], elements of a row adjacent
  int64_t x_row_stride;
  int64_t tokens;
  int64_t in;
  const uint32_t* arena;
  int64_t capacity;  // slots of every table
  TokenRoutes routes;
  int64_t max_rank;  // a slot with more components counts as empty, or with other counts in U
  bool up_by_v;      // y += V z in place of U z, z being in the scratch already: delta_embedding
  // Scratch
  void* scratch;  // delta_gemm_scratch_bytes(args), aligned to 256 bytes
};

size_t delta_gemm_scratch_bytes(const DeltaGemmCudaArgs& args);

// Asynchronous on the stream; no allocation, no synchronisation.
cudaError_t launch_delta_gemm(const DeltaGemmCudaArgs& args, cudaStream_t stream);

}  // namespace adamix
