#pragma once

#include <cstdint>

#include "common/matrix_view.h"
#include "common/parallel.h"

// y[t] += U_level · diag(scale) · V_level · x[t] with the delta in slot slots[t] of the bank
// (layout/packed_layout.h, BANK). Any mix of slots, ranks and widths. A slot below 0 or >= capacity
// is the base: nothing is added. Products are accumulated in fp32; z = scale · V_level · x stays
// fp32; y = round(fp32(y) + delta), one rounding. A token's result does not depend on the number of
// threads.
namespace adamix {

// Matrices of one call, on one x; a CUDA launch carries them among its arguments.
constexpr int kMaxLayers = 8;

template <typename T>  // float, Half or BFloat16
struct DeltaGemmArgs {
  // Outputs
  MatrixView<T> y;  // [tokens, out], rows do not overlap
  // Inputs
  MatrixView<const T> x;  // [tokens, in]
  const uint32_t* arena;  // every delta's words and scales
  MatrixView<const int64_t>
      table;             // [capacity, kTableColumns]; rows of slots in use lie inside the arena
  const int32_t* slots;  // [tokens]
};

template <typename T>
void delta_gemm_cpu(const DeltaGemmArgs<T>& args, const ParallelFor& parallel);

}  // namespace adamix
