#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings/tensor_args.h"
#include "delta_gemm/delta_gemm.h"

// What the overloads of delta_gemm check on every device: devices, types, shapes and strides, in
// words. No value is looked at: on a CUDA device that would synchronise. One matrix is a list of
// one, so the same lines check all overloads: check_inputs first, then check_out_features or
// check_outputs, then check_slots or check_segments.
namespace adamix::bindings {

using Tensors = std::vector<Tensor>;

struct DeltaGemmInputs {
  const char* op;         // the overload: "delta_gemm_.layers"
  const Tensor& x;        // fp16, bf16 or fp32 [tokens, in]
  const Tensor& arena;    // int32 [words]
  const Tensors& tables;  // int64 [capacity, kTableColumns], one a layer
  std::optional<int64_t> max_rank;
};

// Tokens sorted by slot: the count = counts[i] tokens of segment i are indices[starts[i]] ..
// indices[starts[i] + count - 1], and slots[i] has their delta.
struct TokenSegments {
  const Tensor& indices;  // int32 [tokens]
  const Tensor& counts;   // int32 [segments]
  const Tensor& starts;   // int32 [segments or more]
  const Tensor& slots;    // int32 [segments]
};

// What sentences call a tensor of a list: "tables[2]", in a list of one "table".
inline std::string name_in_list(const char* name, size_t i, const Tensors& list) {
  return list.size() == 1 ? name : name + ("s[" + std::to_string(i) + "]");
}

// An argument that has to lie where x lies.
inline Arg beside_x(const DeltaGemmInputs& inputs, const char* name, const Tensor& tensor) {
  return Arg{inputs.op, name, tensor}.is_beside("x", inputs.x);
}

inline void check_inputs(const DeltaGemmInputs& inputs) {
  const auto& [op, x, arena, tables, max_rank] = inputs;
  check_float(op, "x", x.scalar_type());
  Arg{op, "x", x}.has_rank(2, "[tokens, in]");
  beside_x(inputs, "arena", arena).has_dtype(ScalarType::Int).has_rank(1, "[words]");
  ADAMIX_CHECK(tables.size() >= 1 && tables.size() <= size_t{kMaxLayers}, op,
               ": tables must be 1..", kMaxLayers, " tensors, got ", tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    const std::string name = name_in_list("table", i, tables);
    beside_x(inputs, name.c_str(), tables[i])
        .has_dtype(ScalarType::Long)
        .has_rank(2, "[capacity, columns]")
        .has_size(1, kTableColumns, "columns of a table")
        .has_size(0, tables[0].size(0), "capacity of tables[0]");
  }
  check_max_rank(op, max_rank);
}

inline void check_one_a_table(const DeltaGemmInputs& inputs, const char* name, size_t count) {
  ADAMIX_CHECK(count == inputs.tables.size(), inputs.op, ": ", name, " must be ",
               inputs.tables.size(), ", one a table, got ", count);
}

inline void check_out_features(const DeltaGemmInputs& inputs,
                               const std::vector<int64_t>& out_features) {
  check_one_a_table(inputs, "out_features", out_features.size());
  for (const int64_t out : out_features) {
    ADAMIX_CHECK(out >= 0, inputs.op, ": out_features must not be negative, got ", out);
  }
}

inline void check_outputs(const DeltaGemmInputs& inputs, const Tensors& ys) {
  check_one_a_table(inputs, "ys", ys.size());
  for (size_t i = 0; i < ys.size(); ++i) {
    const std::string name = name_in_list("y", i, ys);
    const Tensor& y = ys[i];
    beside_x(inputs, name.c_str(), y)
        .has_dtype(inputs.x.scalar_type())
        .has_rank(2, "[tokens, out]")
        .has_size(0, inputs.x.size(0), "tokens of x");
    check_rows_to_add_to({inputs.op, name.c_str(), y});
  }
}

inline void check_slots(const DeltaGemmInputs& inputs, const Tensor& slots) {
  beside_x(inputs, "slots", slots)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[tokens]")
      .has_size(0, inputs.x.size(0), "tokens of x");
}

inline void check_segments(const DeltaGemmInputs& inputs, const TokenSegments& segments) {
  beside_x(inputs, "token_indices", segments.indices)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[tokens]")
      .has_size(0, inputs.x.size(0), "tokens of x");
  beside_x(inputs, "token_counts", segments.counts)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[segments]");
  const int64_t count = segments.counts.size(0);
  beside_x(inputs, "token_starts", segments.starts)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[segments]");
  ADAMIX_CHECK(segments.starts.size(0) >= count, inputs.op, ": token_starts must be at least ",
               count, " (segments of token_counts), got shape ", shape_text(segments.starts));
  beside_x(inputs, "segment_slots", segments.slots)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[segments]")
      .has_size(0, count, "segments of token_counts");
}

// Components that a slot in use has at most: max_rank, or else the most that any of the matrices
// has rows or columns. Bounds what a device sets aside for z.
inline int64_t rank_bound(const DeltaGemmInputs& inputs, const Tensors& ys) {
  if (inputs.max_rank) return *inputs.max_rank;
  int64_t bound = inputs.x.size(1);
  for (const Tensor& y : ys) bound = std::max(bound, y.size(1));
  return bound;
}

}  // namespace adamix::bindings
