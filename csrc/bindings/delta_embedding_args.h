#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "bindings/tensor_args.h"
#include "delta_embedding/delta_embedding.h"

// delta_embedding on one device: check devices, types, shapes and strides in words, allocate, add.
// No value is looked at: on a CUDA device that would synchronise.
namespace adamix::bindings {

struct DeltaEmbeddingInputs {
  const char* op;
  const Tensor& tokens;  // int32 or int64 [tokens]
  const Tensor& arena;   // int32 [words]
  const Tensor& table;   // int64 [capacity, kTableColumns]
  const Tensor& slots;   // int32 [tokens]
  int64_t vocab;
  std::optional<int64_t> max_rank;
};

inline void check_inputs(const DeltaEmbeddingInputs& inputs) {
  const auto& [op, tokens, arena, table, slots, vocab, max_rank] = inputs;
  const ScalarType dtype = tokens.scalar_type();
  ADAMIX_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op,
               ": tokens must be int32 or int64, got ", dtype_name(dtype));
  Arg{op, "tokens", tokens}.has_rank(1, "[tokens]");
  Arg{op, "arena", arena}
      .is_beside("tokens", tokens)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[words]");
  Arg{op, "table", table}
      .is_beside("tokens", tokens)
      .has_dtype(ScalarType::Long)
      .has_rank(2, "[capacity, columns]")
      .has_size(1, kTableColumns, "columns of a table");
  Arg{op, "slots", slots}
      .is_beside("tokens", tokens)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[tokens]")
      .has_size(0, tokens.size(0), "tokens");
  ADAMIX_CHECK(vocab >= 0 && vocab <= kMaxVocab, op, ": vocab_size must be 0..", kMaxVocab,
               ", got ", vocab);
  check_max_rank(op, max_rank);
}

inline void check_output(const DeltaEmbeddingInputs& inputs, const Tensor& y) {
  check_float(inputs.op, "y", y.scalar_type());
  const Arg arg{inputs.op, "y", y};
  arg.is_beside("tokens", inputs.tokens)
      .has_rank(2, "[tokens, hidden_size]")
      .has_size(0, inputs.tokens.size(0), "tokens");
  check_rows_to_add_to(arg);
}

// Components that a slot in use has at most, by the rule of delta_gemm: a delta that an output head
// shares is taken by both or refused by both.
inline int64_t rank_bound(const DeltaEmbeddingInputs& inputs, const Tensor& y) {
  return inputs.max_rank.value_or(std::max(inputs.vocab, y.size(1)));
}

inline TokenIds token_ids(const Tensor& tokens) {
  return {tokens.const_data_ptr(), tokens.scalar_type() == ScalarType::Long};
}

// Device adds rows to y, whose shape is checked:
//   static void add(const DeltaEmbeddingInputs&, const Tensor& y);
template <typename Device>
struct DeltaEmbedding {
  using OptionalRank = std::optional<int64_t>;

  static Tensor delta_embedding(const Tensor& tokens, const Tensor& arena, const Tensor& table,
                                const Tensor& slots, int64_t vocab, int64_t hidden,
                                ScalarType dtype, OptionalRank max_rank) {
    const DeltaEmbeddingInputs inputs{"delta_embedding", tokens, arena, table, slots, vocab,
                                      max_rank};
    check_inputs(inputs);
    ADAMIX_CHECK(hidden >= 0, inputs.op, ": hidden_size must not be negative, got ", hidden);
    check_float(inputs.op, "dtype", dtype);
    const Tensor y = torch::stable::new_zeros(tokens, {tokens.size(0), hidden}, dtype);
    Device::add(inputs, y);
    return y;
  }

  static void delta_embedding_(const Tensor& y, const Tensor& tokens, const Tensor& arena,
                               const Tensor& table, const Tensor& slots, int64_t vocab,
                               OptionalRank max_rank) {
    const DeltaEmbeddingInputs inputs{
        "delta_embedding_", tokens, arena, table, slots, vocab, max_rank};
    check_inputs(inputs);
    check_output(inputs, y);
    Device::add(inputs, y);
  }

  // m: the block of STABLE_TORCH_LIBRARY_IMPL.
  template <typename Library>
  static void implement(Library& m) {
    m.impl("delta_embedding", TORCH_BOX(&DeltaEmbedding::delta_embedding));
    m.impl("delta_embedding_", TORCH_BOX(&DeltaEmbedding::delta_embedding_));
  }
};

}  // namespace adamix::bindings
