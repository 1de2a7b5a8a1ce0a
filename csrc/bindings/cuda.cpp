#include <torch/csrc/stable/library.h>

#include "bindings/cuda_context.h"
#include "bitpack/bitpack_cuda.h"
#include "gptq/gptq_cuda.h"

// The CUDA kernels behind the operators: check, allocate, launch on torch's current stream. Plain
// C++, so nvcc never reads a torch header. Values on the device are not looked at: that would
// synchronise. delta_gemm is in cuda_delta_gemm.cpp.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

Tensor pack(const Tensor& codes, int64_t bits) {
  check_pack(codes, bits);
  const DeviceGuard guard("pack", codes);
  const Tensor source = contiguous(codes);
  const int width = static_cast<int>(bits);
  const Tensor words =
      new_matrix(codes, codes.size(0), lane_words(codes.size(1), width), ScalarType::Int);
  check_cuda("pack",
             launch_pack({mutable_view<uint32_t>(words), const_view<uint8_t>(source), width},
                         current_stream("pack", codes.get_device_index())));
  return words;
}

Tensor unpack(const Tensor& words, int64_t bits, int64_t count) {
  check_unpack(words, bits, count);
  const DeviceGuard guard("unpack", words);
  const Tensor source = contiguous(words);
  const Tensor codes = new_matrix(words, words.size(0), count, ScalarType::Byte);
  check_cuda("unpack", launch_unpack({mutable_view<uint8_t>(codes), const_view<uint32_t>(source),
                                      static_cast<int>(bits)},
                                     current_stream("unpack", words.get_device_index())));
  return codes;
}

Tensor gptq(const Tensor& weight, const Tensor& hinv, const Tensor& bits, const Tensor& scales,
            bool by_row) {
  check_gptq(weight, hinv, bits, scales, by_row);
  const DeviceGuard guard("gptq", weight);
  const Tensor source = with_adjacent_rows(weight), factor = with_adjacent_rows(hinv);
  const Tensor widths = contiguous(bits), steps = contiguous(scales);
  const int64_t rows = weight.size(0), n = weight.size(1), padded = gptq_padded_rows(rows);
  const Tensor codes = new_matrix(weight, rows, n, ScalarType::Byte);
  const Tensor columns = new_matrix(weight, n, padded, ScalarType::Float);
  const Tensor errors = new_matrix(weight, kGptqBlockColumns, padded, ScalarType::Float);
  const GptqArgs args{mutable_view<uint8_t>(codes),  const_view<float>(source),
                      const_view<float>(factor),     widths.const_data_ptr<int32_t>(),
                      steps.const_data_ptr<float>(), by_row};
  check_cuda(
      "gptq",
      launch_gptq(args, {columns.mutable_data_ptr<float>(), errors.mutable_data_ptr<float>()},
                  current_stream("gptq", weight.get_device_index())));
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gptq", TORCH_BOX(&gptq));
}

}  // namespace adamix::bindings
