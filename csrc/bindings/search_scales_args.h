#pragma once

#include <optional>

#include "bindings/tensor_args.h"
#include "search_scales/search_scales.h"

// search_scales on every device: devices, types and shapes, in words; then tensors that lie as the
// kernels read them.
namespace adamix::bindings {

inline void check_search_scales(const Tensor& lanes, const Tensor& bits,
                                const std::optional<Tensor>& weights) {
  const char* op = "search_scales";
  Arg{op, "lanes", lanes}.has_dtype(ScalarType::Float).has_rank(2, "[lanes, n]");
  Arg{op, "bits", bits}
      .is_beside("lanes", lanes)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[lanes]")
      .has_size(0, lanes.size(0), "one a lane");
  if (!weights) return;
  Arg{op, "weights", *weights}
      .is_beside("lanes", lanes)
      .has_dtype(ScalarType::Float)
      .has_rank(1, "[n]")
      .has_size(0, lanes.size(1), "entries of a lane");
}

// A search of which everything is checked but the widths.
struct ScaleSearch {
  Tensor lanes, bits;
  std::optional<Tensor> weights;
  Tensor scales;  // the output

  ScaleSearch(const Tensor& lanes, const Tensor& bits, const std::optional<Tensor>& weights)
      : lanes(with_adjacent_rows(lanes)),
        bits(torch::stable::contiguous(bits)),
        scales(torch::stable::new_empty(lanes, {lanes.size(0)}, ScalarType::Float)) {
    if (weights) this->weights = torch::stable::contiguous(*weights);
  }

  SearchScalesArgs args() const {
    return {scales.mutable_data_ptr<float>(), const_view<float>(lanes),
            bits.const_data_ptr<int32_t>(), weights ? weights->const_data_ptr<float>() : nullptr};
  }
};

}  // namespace adamix::bindings
