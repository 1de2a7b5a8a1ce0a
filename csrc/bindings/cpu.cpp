#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/cpu_context.h"
#include "bindings/delta_gemm_overloads.h"
#include "bitpack/bitpack.h"
#include "common/float16.h"
#include "delta_gemm/delta_gemm.h"
#include "gptq/gptq.h"

// The CPU kernels behind the operators: check, allocate, launch. Here data may be looked at too, so
// values that a kernel could not survive (codes wider than their lane, a table that points out of
// the arena) get a sentence as well. delta_embedding is in cpu_delta_embedding.cpp.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

Tensor pack(const Tensor& codes, int64_t bits) {
  check_pack(codes, bits);
  const Tensor source = contiguous(codes);
  const auto view = const_view<uint8_t>(source);
  for (int64_t lane = 0; lane < view.rows; ++lane) {
    uint8_t widest = 0;
    for (int64_t i = 0; i < view.cols; ++i) widest = std::max(widest, view.row(lane)[i]);
    ADAMIX_CHECK(widest <= max_code(static_cast<int>(bits)), "pack: codes of ", bits,
                 " bits must be at most ", max_code(static_cast<int>(bits)), ", got ", int{widest},
                 " in lane ", lane);
  }
  const int width = static_cast<int>(bits);
  const Tensor words = new_matrix(codes, view.rows, lane_words(view.cols, width), ScalarType::Int);
  pack_cpu({mutable_view<uint32_t>(words), view, width}, torch_for);
  return words;
}

Tensor unpack(const Tensor& words, int64_t bits, int64_t count) {
  check_unpack(words, bits, count);
  const Tensor source = contiguous(words);
  const Tensor codes = new_matrix(words, words.size(0), count, ScalarType::Byte);
  unpack_cpu({mutable_view<uint8_t>(codes), const_view<uint32_t>(source), static_cast<int>(bits)},
             torch_for);
  return codes;
}

Tensor gptq(const Tensor& weight, const Tensor& hinv, const Tensor& bits, const Tensor& scales,
            bool by_row) {
  check_gptq(weight, hinv, bits, scales, by_row);
  const Tensor source = contiguous(weight), factor = contiguous(hinv);
  const Tensor widths = contiguous(bits), steps = contiguous(scales);
  const auto* width = widths.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < widths.size(0); ++i) check_bits("gptq", width[i]);
  const Tensor codes = new_matrix(weight, weight.size(0), weight.size(1), ScalarType::Byte);
  gptq_cpu({mutable_view<uint8_t>(codes), const_view<float>(source), const_view<float>(factor),
            width, steps.const_data_ptr<float>(), by_row},
           torch_for);
  return codes;
}

// A matrix of delta_gemm.
struct Layer {
  CheckedBank bank;
  const Tensor& y;
};

Layer layer_of(const DeltaGemmInputs& inputs, size_t i, const Tensor& y) {
  const int64_t in = inputs.x.size(1), out = y.size(1);
  return {{inputs.op, name_in_list("table", i, inputs.tables), contiguous(inputs.tables[i]),
           inputs.arena.size(0), in, out,
           std::to_string(in) + " inputs and " + std::to_string(out) + " outputs", "in and out"},
          y};
}

// Everything is checked but the values. Those of all layers come before the first y changes.
void add_deltas(const DeltaGemmInputs& inputs, const Tensors& ys, Routes routes) {
  const int64_t max_rank = rank_bound(inputs, ys);
  std::vector<Layer> layers;
  for (size_t i = 0; i < ys.size(); ++i) {
    layers.push_back(layer_of(inputs, i, ys[i]));
    check_slots_in_use(layers.back().bank, routes, max_rank);
  }
  const Tensor x = with_adjacent_rows(inputs.x), arena = contiguous(inputs.arena);
  const auto* words = static_cast<const uint32_t*>(arena.const_data_ptr());
  const auto launch = [&](auto element) {
    using T = decltype(element);
    for (const Layer& layer : layers) {
      delta_gemm_cpu<T>({mutable_view<T>(layer.y), const_view<T>(x), words,
                         const_view<int64_t>(layer.bank.table), routes.slots},
                        torch_for);
    }
  };
  switch (x.scalar_type()) {
    case ScalarType::Half: return launch(Half{});
    case ScalarType::BFloat16: return launch(BFloat16{});
    default: return launch(float{});
  }
}

// One slot a token from the tokens of each segment; -1 for tokens in none.
std::vector<int32_t> slots_of_tokens(const DeltaGemmInputs& inputs, const TokenSegments& segments) {
  const int64_t tokens = inputs.x.size(0), capacity = inputs.tables[0].size(0);
  const Tensor index_tensor = contiguous(segments.indices), counts = contiguous(segments.counts);
  const Tensor starts = contiguous(segments.starts), slots = contiguous(segments.slots);
  const auto* indices = index_tensor.const_data_ptr<int32_t>();
  std::vector<int32_t> result(static_cast<size_t>(tokens), -1);
  for (int64_t segment = 0; segment < counts.size(0); ++segment) {
    const int32_t slot = slots.const_data_ptr<int32_t>()[segment];
    const int64_t count = counts.const_data_ptr<int32_t>()[segment];
    const int64_t start = starts.const_data_ptr<int32_t>()[segment];
    if (count == 0 || slot < 0 || slot >= capacity) continue;
    ADAMIX_CHECK(count > 0 && start >= 0 && start + count <= tokens, inputs.op, ": segment ",
                 segment, ", ", count, " tokens from ", start, " on, leads out of the ", tokens,
                 " token_indices");
    for (int64_t i = start; i < start + count; ++i) {
      ADAMIX_CHECK(indices[i] >= 0 && indices[i] < tokens, inputs.op, ": token_indices must be 0..",
                   tokens - 1, ", got ", indices[i], " in segment ", segment);
      ADAMIX_CHECK(result[indices[i]] < 0, inputs.op, ": token ", indices[i],
                   " is there twice, the second time in segment ", segment);
      result[indices[i]] = slot;
    }
  }
  return result;
}

struct Cpu {
  static void add_slots(const DeltaGemmInputs& inputs, const Tensors& ys, const Tensor& slots) {
    const Tensor routes = contiguous(slots);
    add_deltas(inputs, ys, {routes.const_data_ptr<int32_t>(), routes.size(0)});
  }

  static void add_segments(const DeltaGemmInputs& inputs, const Tensors& ys,
                           const TokenSegments& segments) {
    const std::vector<int32_t> slots = slots_of_tokens(inputs, segments);
    add_deltas(inputs, ys, {slots.data(), inputs.x.size(0)});
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gptq", TORCH_BOX(&gptq));
  DeltaGemmOverloads<Cpu>::implement(m);
}

}  // namespace adamix::bindings
