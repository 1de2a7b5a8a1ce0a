#pragma once

#include <cuda_runtime_api.h>

#include "add_rows/add_rows.h"
#include "delta_gemm/delta_gemm_cuda.h"

// add_rows on the device; as in add_rows.h. Slots are read on the device: a launch depends on
// nothing but the sizes below, so it can be captured in a graph while slots are rerouted and values
// are replaced in place.
namespace adamix {

struct RowTarget {
  void* data;  // [tokens, width], elements of a row adjacent, rows do not overlap
  int64_t row_stride;
  int64_t width;
};

struct AddRowsCudaArgs {
  // Outputs
  Element element;  // of every y
  RowTarget ys[kMaxRowTargets];
  int y_count;
  // Inputs
  int64_t tokens;
  MatrixView<const float> values;  // [capacity, sum of the widths]
  const int32_t* slots;            // [tokens]
};

// Asynchronous on the stream; no allocation, no synchronisation.
cudaError_t launch_add_rows(const AddRowsCudaArgs& args, cudaStream_t stream);

}  // namespace adamix
