#include <torch/csrc/stable/library.h>

#include <string>

#include "bindings/cpu_context.h"
#include "bindings/delta_embedding_args.h"
#include "common/float16.h"

// delta_embedding's CPU kernel behind its operators.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

struct Cpu {
  static void add(const DeltaEmbeddingInputs& inputs, const Tensor& y) {
    const Tensor table = contiguous(inputs.table), slots = contiguous(inputs.slots);
    const Tensor arena = contiguous(inputs.arena), tokens = contiguous(inputs.tokens);
    const int64_t vocab = inputs.vocab, hidden = y.size(1);
    const Routes routes = {slots.const_data_ptr<int32_t>(), slots.size(0)};
    check_slots_in_use(
        {inputs.op, "table", table, arena.size(0), hidden, vocab,
         "vocab_size " + std::to_string(vocab) + " and hidden_size " + std::to_string(hidden),
         "vocab_size and hidden_size"},
        routes, rank_bound(inputs, y));
    const auto launch = [&](auto element) {
      using T = decltype(element);
      delta_embedding_cpu<T>({mutable_view<T>(y), token_ids(tokens), vocab,
                              static_cast<const uint32_t*>(arena.const_data_ptr()),
                              const_view<int64_t>(table), routes.slots},
                             torch_for);
    };
    switch (y.scalar_type()) {
      case ScalarType::Half: return launch(Half{});
      case ScalarType::BFloat16: return launch(BFloat16{});
      default: return launch(float{});
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CPU, m) {
  DeltaEmbedding<Cpu>::implement(m);
}

}  // namespace adamix::bindings
