#pragma once

#include <cstdint>

#include "common/matrix_view.h"
#include "common/parallel.h"

// GPTQ: codes whose error, weighted by the Hessian H of the inputs, is small. For every row,
// columns left to right:
//
//   q_j    = quantize(w_j)                                    (packed_layout.h, VALUE)
//   err    = (w_j - scale * level(q_j)) / hinv[j][j]
//   w_k   -= err * hinv[j][k]                                 for all k > j
//
// hinv is the upper Cholesky factor of H^-1; below its diagonal nothing is read. Rows are
// independent of each other. A NaN quantizes to code 0. All arithmetic is fp32.
namespace adamix {

struct GptqArgs {
  // Outputs
  MatrixView<uint8_t> codes;  // [rows, n]
  // Inputs
  MatrixView<const float> weight;  // [rows, n], not changed
  MatrixView<const float> hinv;    // [n, n]
  const int32_t* bits;             // 1..8: [rows] if by_row, else [n]
  const float* scales;             // same shape as bits
  bool by_row;                     // a lane is a row of the weight (V), not a column (U)
};

void gptq_cpu(const GptqArgs& args, const ParallelFor& parallel);

}  // namespace adamix
