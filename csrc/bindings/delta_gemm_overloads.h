#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "bindings/delta_gemm_args.h"

// The overloads of delta_gemm on one device: check, allocate, add. One matrix is a list of one.
namespace adamix::bindings {

// Device adds the delta to ys, whose shapes are checked:
//   static void add_slots(const DeltaGemmInputs&, const Tensors& ys, const Tensor& slots);
//   static void add_segments(const DeltaGemmInputs&, const Tensors& ys, const TokenSegments&);
template <typename Device>
struct DeltaGemmOverloads {
  using OptionalRank = std::optional<int64_t>;

  static Tensor delta_gemm(const Tensor& x, const Tensor& arena, const Tensor& table,
                           const Tensor& slots, int64_t out_features, OptionalRank max_rank) {
    const Tensors tables{table};
    return new_outputs({"delta_gemm", x, arena, tables, max_rank}, {out_features}, slots)[0];
  }

  static Tensors delta_gemm_layers(const Tensor& x, const Tensor& arena, const Tensors& tables,
                                   const Tensor& slots, const std::vector<int64_t>& out_features,
                                   OptionalRank max_rank) {
    return new_outputs({"delta_gemm.layers", x, arena, tables, max_rank}, out_features, slots);
  }

  static void delta_gemm_(const Tensor& y, const Tensor& x, const Tensor& arena,
                          const Tensor& table, const Tensor& slots, OptionalRank max_rank) {
    const Tensors tables{table};
    add_to_outputs({"delta_gemm_", x, arena, tables, max_rank}, {y}, slots);
  }

  static void delta_gemm_layers_(const Tensors& ys, const Tensor& x, const Tensor& arena,
                                 const Tensors& tables, const Tensor& slots,
                                 OptionalRank max_rank) {
    add_to_outputs({"delta_gemm_.layers", x, arena, tables, max_rank}, ys, slots);
  }

  static void delta_gemm_segments_(const Tensors& ys, const Tensor& x, const Tensor& arena,
                                   const Tensors& tables, const Tensor& token_indices,
                                   const Tensor& token_counts, const Tensor& token_starts,
                                   const Tensor& segment_slots, OptionalRank max_rank) {
    const DeltaGemmInputs inputs{"delta_gemm_.segments", x, arena, tables, max_rank};
    const TokenSegments segments{token_indices, token_counts, token_starts, segment_slots};
    check_inputs(inputs);
    check_outputs(inputs, ys);
    check_segments(inputs, segments);
    Device::add_segments(inputs, ys, segments);
  }

  // m: the block of STABLE_TORCH_LIBRARY_IMPL.
  template <typename Library>
  static void implement(Library& m) {
    m.impl("delta_gemm", TORCH_BOX(&DeltaGemmOverloads::delta_gemm));
    m.impl("delta_gemm_", TORCH_BOX(&DeltaGemmOverloads::delta_gemm_));
    m.impl("delta_gemm.layers", TORCH_BOX(&DeltaGemmOverloads::delta_gemm_layers));
    m.impl("delta_gemm_.layers", TORCH_BOX(&DeltaGemmOverloads::delta_gemm_layers_));
    m.impl("delta_gemm_.segments", TORCH_BOX(&DeltaGemmOverloads::delta_gemm_segments_));
  }

 private:
  static Tensors new_outputs(const DeltaGemmInputs& inputs,
                             const std::vector<int64_t>& out_features, const Tensor& slots) {
    check_inputs(inputs);
    check_out_features(inputs, out_features);
    check_slots(inputs, slots);
    const Tensor& x = inputs.x;
    Tensors ys;
    for (const int64_t out : out_features) {
      ys.push_back(torch::stable::new_zeros(x, {x.size(0), out}, x.scalar_type()));
    }
    Device::add_slots(inputs, ys, slots);
    return ys;
  }

  static void add_to_outputs(const DeltaGemmInputs& inputs, const Tensors& ys,
                             const Tensor& slots) {
    check_inputs(inputs);
    check_outputs(inputs, ys);
    check_slots(inputs, slots);
    Device::add_slots(inputs, ys, slots);
  }
};

}  // namespace adamix::bindings
