#pragma once

#include <string>
#include <vector>

#include "add_rows/add_rows.h"
#include "bindings/tensor_args.h"

// add_rows_ on every device: devices, types, shapes and strides, in words. No value is looked at:
// on a CUDA device that would synchronise.
namespace adamix::bindings {

inline void check_add_rows(const std::vector<Tensor>& ys, const Tensor& values,
                           const Tensor& slots) {
  const char* op = "add_rows_";
  Arg{op, "values", values}.has_dtype(ScalarType::Float).has_rank(2, "[capacity, columns]");
  Arg{op, "slots", slots}
      .is_beside("values", values)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[tokens]");
  ADAMIX_CHECK(ys.size() >= 1 && ys.size() <= size_t{kMaxRowTargets}, op, ": ys must be 1..",
               kMaxRowTargets, " tensors, got ", ys.size());
  check_float(op, "ys[0]", ys[0].scalar_type());
  int64_t columns = 0;
  for (size_t i = 0; i < ys.size(); ++i) {
    const std::string name = "ys[" + std::to_string(i) + "]";
    const Arg arg{op, name.c_str(), ys[i]};
    arg.is_beside("values", values)
        .has_dtype(ys[0].scalar_type())
        .has_rank(2, "[tokens, width]")
        .has_size(0, slots.size(0), "tokens of slots");
    check_rows_to_add_to(arg);
    columns += ys[i].size(1);
  }
  ADAMIX_CHECK(columns == values.size(1), op, ": the ys must have as many columns as values, ",
               values.size(1), ", got ", columns);
}

}  // namespace adamix::bindings
