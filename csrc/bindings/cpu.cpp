#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "bindings/tensor_args.h"
#include "bitpack/bitpack.h"
#include "common/float16.h"
#include "delta_gemm/delta_gemm.h"
#include "gptq/gptq.h"

// The CPU kernels behind the operators: check, allocate, launch. Here data may be looked at too, so
// values that a kernel could not survive (codes wider than their lane, a table that points out of
// the arena) get a sentence as well.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

// torch's own thread pool: torch.set_num_threads rules.
void torch_for(int64_t n, int64_t grain, const RangeBody& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

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
  Arg{"gptq", "weight", weight}.has_dtype(ScalarType::Float).has_rank(2, "[rows, n]");
  const int64_t n = weight.size(1), lanes = weight.size(by_row ? 0 : 1);
  const char* lane = by_row ? "one a row" : "one a column";
  Arg{"gptq", "hinv", hinv}
      .has_dtype(ScalarType::Float)
      .has_rank(2, "[n, n]")
      .has_size(0, n, "columns of weight")
      .has_size(1, n, "columns of weight");
  Arg{"gptq", "bits", bits}
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[lanes]")
      .has_size(0, lanes, lane);
  Arg{"gptq", "scales", scales}
      .has_dtype(ScalarType::Float)
      .has_rank(1, "[lanes]")
      .has_size(0, lanes, lane);

  const Tensor source = contiguous(weight), factor = contiguous(hinv);
  const Tensor widths = contiguous(bits), steps = contiguous(scales);
  const auto* width = widths.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < lanes; ++i) check_bits("gptq", width[i]);
  const Tensor codes = new_matrix(weight, weight.size(0), n, ScalarType::Byte);
  gptq_cpu({mutable_view<uint8_t>(codes), const_view<float>(source), const_view<float>(factor),
            width, steps.const_data_ptr<float>(), by_row},
           torch_for);
  return codes;
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// `count` runs of `words` words from `offset` on lie inside an arena; written so that nothing
// overflows.
bool fits(int64_t offset, int64_t words, int64_t count, int64_t arena_words) {
  return offset >= 0 && offset <= arena_words && count >= 0 &&
         (words == 0 || count <= (arena_words - offset) / words);
}

// Whether both factors and the scales of a slot lie inside the arena.
bool slot_fits(const int64_t* entry, int64_t in, int64_t out, int64_t arena_words) {
  int64_t v = entry[kTableVOffset], u = entry[kTableUOffset], scale = entry[kTableScaleOffset];
  for (int bits = kMaxBits; bits >= 1; --bits) {
    const int64_t count = entry[kTableFirstCount + kMaxBits - bits];
    const int64_t v_lane = lane_words(in, bits), u_lane = lane_words(out, bits);
    if (!fits(v, v_lane, count, arena_words) || !fits(u, u_lane, count, arena_words) ||
        !fits(scale, 1, count, arena_words)) {
      return false;
    }
    v += v_lane * count;
    u += u_lane * count;
    scale += count;
  }
  return true;
}

void check_slots_in_use(const char* op, MatrixView<const int64_t> table, const int32_t* slots,
                        int64_t tokens, int64_t in, int64_t out, int64_t arena_words) {
  std::vector<bool> checked(static_cast<size_t>(table.rows), false);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = slots[token];
    if (slot < 0 || slot >= table.rows || checked[slot]) continue;
    checked[slot] = true;
    ADAMIX_CHECK(slot_fits(table.row(slot), in, out, arena_words), op, ": table row ", slot,
                 " does not fit: its offsets and counts, for ", in, " inputs and ", out,
                 " outputs, lead out of the arena of ", arena_words, " words");
  }
}

// y is checked, x, arena, table and slots are not yet.
void add_delta(const char* op, const Tensor& y, const Tensor& x, const Tensor& arena,
               const Tensor& table, const Tensor& slots) {
  Arg{op, "x", x}
      .has_rank(2, "[tokens, in]")
      .has_dtype(y.scalar_type())
      .has_size(0, y.size(0), "tokens of y");
  Arg{op, "arena", arena}.has_dtype(ScalarType::Int).has_rank(1, "[words]");
  Arg{op, "table", table}
      .has_dtype(ScalarType::Long)
      .has_rank(2, "[capacity, columns]")
      .has_size(1, kTableColumns, "columns of a table");
  Arg{op, "slots", slots}
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[tokens]")
      .has_size(0, x.size(0), "tokens of x");

  const Tensor inputs = x.size(1) > 1 && x.stride(1) != 1 ? contiguous(x) : x;
  const Tensor words = contiguous(arena), entries = contiguous(table), routes = contiguous(slots);
  const auto entry_view = const_view<int64_t>(entries);
  const auto* route = routes.const_data_ptr<int32_t>();
  check_slots_in_use(op, entry_view, route, x.size(0), x.size(1), y.size(1), words.size(0));

  const auto launch = [&](auto element) {
    using T = decltype(element);
    const auto* arena_words = static_cast<const uint32_t*>(words.const_data_ptr());
    delta_gemm_cpu<T>({mutable_view<T>(y), const_view<T>(inputs), arena_words, entry_view, route},
                      torch_for);
  };
  switch (y.scalar_type()) {
    case ScalarType::Half: return launch(Half{});
    case ScalarType::BFloat16: return launch(BFloat16{});
    default: return launch(float{});
  }
}

void check_activations(const char* op, const char* name, const Tensor& tensor, const char* shape) {
  ADAMIX_CHECK(is_float(tensor.scalar_type()), op, ": ", name,
               " must be float16, bfloat16 or float32, got ", dtype_name(tensor.scalar_type()));
  Arg{op, name, tensor}.has_rank(2, shape);
}

Tensor delta_gemm(const Tensor& x, const Tensor& arena, const Tensor& table, const Tensor& slots,
                  int64_t out_features) {
  check_activations("delta_gemm", "x", x, "[tokens, in]");
  ADAMIX_CHECK(out_features >= 0, "delta_gemm: out_features must not be negative, got ",
               out_features);
  const Tensor y = torch::stable::new_zeros(x, {x.size(0), out_features}, x.scalar_type());
  add_delta("delta_gemm", y, x, arena, table, slots);
  return y;
}

void delta_gemm_(const Tensor& y, const Tensor& x, const Tensor& arena, const Tensor& table,
                 const Tensor& slots) {
  check_activations("delta_gemm_", "y", y, "[tokens, out]");
  ADAMIX_CHECK(y.size(1) <= 1 || y.stride(1) == 1,
               "delta_gemm_: y must have adjacent elements in a row (stride 1), got stride ",
               y.stride(1));
  ADAMIX_CHECK(y.size(0) <= 1 || y.stride(0) >= y.size(1),
               "delta_gemm_: rows of y must not overlap: expected a row stride of at least ",
               y.size(1), ", got ", y.stride(0));
  add_delta("delta_gemm_", y, x, arena, table, slots);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gptq", TORCH_BOX(&gptq));
  m.impl("delta_gemm", TORCH_BOX(&delta_gemm));
  m.impl("delta_gemm_", TORCH_BOX(&delta_gemm_));
}

}  // namespace adamix::bindings
