#pragma once

#include <cstdint>

#include "common/matrix_view.h"
#include "common/parallel.h"

// ys[i][t] += values[slots[t], first_i .. first_i + width_i): each token's own row of values, cut
// into pieces that lie side by side, one a y, in order: what a fine-tune adds to the biases of q, k
// and v. Nothing at all is added where the slot is below 0 or >= capacity (the base): y keeps its
// bits. y = round(fp32(y) + value), one rounding.
namespace adamix {

constexpr int kMaxRowTargets = 8;

template <typename T>  // float, Half or BFloat16
struct AddRowsArgs {
  // Outputs
  MatrixView<T> ys[kMaxRowTargets];  // [tokens, width_i], rows do not overlap
  int y_count;
  // Inputs
  MatrixView<const float> values;  // [capacity, sum of the widths]
  const int32_t* slots;            // [tokens]
};

template <typename T>
void add_rows_cpu(const AddRowsArgs<T>& args, const ParallelFor& parallel);

}  // namespace adamix
