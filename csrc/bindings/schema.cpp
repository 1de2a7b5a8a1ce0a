#include <torch/csrc/stable/library.h>

// Every operator's signature. What the arguments mean stands in the header of the kernel
// (csrc/<operator>/), what callers may pass in adamix/ops.py. Kernels register themselves per
// device in cpu*.cpp and cuda*.cpp.
STABLE_TORCH_LIBRARY(adamix, m) {
  // codes uint8 [lanes, n] -> words int32 [lanes, lane_words(n, bits)]
  m.def("pack(Tensor codes, int bits) -> Tensor");
  // words int32 [lanes, lane_words(count, bits)] -> codes uint8 [lanes, count]
  m.def("unpack(Tensor words, int bits, int count) -> Tensor");
  // weight fp32 [rows, n], hinv fp32 [n, n], bits int32 and scales fp32 [rows] or [n] -> codes
  // uint8 [rows, n]
  m.def("gptq(Tensor weight, Tensor hinv, Tensor bits, Tensor scales, bool by_row) -> Tensor");
  // lanes fp32 [lanes, n], bits int32 [lanes], weights fp32 [n] -> scales fp32 [lanes]
  m.def("search_scales(Tensor lanes, Tensor bits, Tensor? weights=None) -> Tensor");
  // x [tokens, in], arena int32 [words], table int64 [capacity, 11], slots int32 [tokens] ->
  // [tokens, out]; max_rank bounds the components of a slot in use
  m.def(
      "delta_gemm(Tensor x, Tensor arena, Tensor table, Tensor slots, int out_features, *, "
      "int? max_rank=None) -> Tensor");
  // the same, added to y [tokens, out] in fp32 and rounded once
  m.def(
      "delta_gemm_(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, Tensor slots, *, "
      "int? max_rank=None) -> ()");
  // both for several matrices on one x: a table and an output each
  m.def(
      "delta_gemm.layers(Tensor x, Tensor arena, Tensor[] tables, Tensor slots, "
      "int[] out_features, *, int? max_rank=None) -> Tensor[]");
  m.def(
      "delta_gemm_.layers(Tensor(a!)[] ys, Tensor x, Tensor arena, Tensor[] tables, "
      "Tensor slots, *, int? max_rank=None) -> ()");
  // tokens sorted by slot: token_indices int32 [tokens], the others int32 [segments]
  m.def(
      "delta_gemm_.segments(Tensor(a!)[] ys, Tensor x, Tensor arena, Tensor[] tables, "
      "Tensor token_indices, Tensor token_counts, Tensor token_starts, Tensor segment_slots, *, "
      "int? max_rank=None) -> ()");
  // tokens int64 or int32 [tokens], the rest as above; rows of U · diag(scale) · V [vocab_size,
  // hidden_size] -> [tokens, hidden_size] of dtype
  m.def(
      "delta_embedding(Tensor tokens, Tensor arena, Tensor table, Tensor slots, int vocab_size, "
      "int hidden_size, *, ScalarType dtype, int? max_rank=None) -> Tensor");
  // the same, added to y [tokens, hidden_size] in fp32 and rounded once
  m.def(
      "delta_embedding_(Tensor(a!) y, Tensor tokens, Tensor arena, Tensor table, Tensor slots, "
      "int vocab_size, *, int? max_rank=None) -> ()");
  // ys [tokens, width_i], values fp32 [capacity, sum of the widths], slots int32 [tokens]: each
  // token's row of values, cut as the ys are, added in fp32 and rounded once
  m.def("add_rows_(Tensor(a!)[] ys, Tensor values, Tensor slots) -> ()");
}
