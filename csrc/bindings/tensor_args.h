#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/matrix_view.h"
#include "layout/packed_layout.h"

// What every binding needs: checks in words, and the way from a torch tensor to a view. A check
// names the operator and the argument, says what is expected and what it got, and throws; kernels
// then trust their arguments.
namespace adamix::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void append(std::string& text, const std::string& part) {
  text += part;
}

template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
void append(std::string& text, Integer part) {
  text += std::to_string(part);
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

// Not STD_TORCH_CHECK: that one writes through std::ostringstream, and where a compiler links
// libstdc++ statically into this library, its streams crash beside the shared libstdc++ of torch
// (seen with GCC 13). It would also put a source line in front of the sentence.
#define ADAMIX_CHECK(condition, ...)                         \
  do {                                                       \
    if (!(condition)) ::adamix::bindings::fail(__VA_ARGS__); \
  } while (false)

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    default: return "another type";
  }
}

// What deltas are added to, and multiplied with.
inline void check_float(const char* op, const char* name, ScalarType dtype) {
  ADAMIX_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
      ": ", name, " must be float16, bfloat16 or float32, got ", dtype_name(dtype));
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

// An argument together with the words that name it: "gptq: hinv".
struct Arg {
  const char* op;
  const char* name;
  const Tensor& tensor;

  const Arg& is_beside(const char* first, const Tensor& other) const {
    ADAMIX_CHECK(tensor.device() == other.device(), op, ": ", name, " must be on the device of ",
                 first, ", ", device_name(other), ", got ", device_name(tensor));
    return *this;
  }

  const Arg& has_dtype(ScalarType dtype) const {
    ADAMIX_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype),
                 ", got ", dtype_name(tensor.scalar_type()));
    return *this;
  }

  const Arg& has_rank(int64_t rank, const char* shape) const {
    ADAMIX_CHECK(tensor.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, ", shape,
                 ", got ", shape_text(tensor));
    return *this;
  }

  const Arg& has_size(int64_t dim, int64_t size, const char* meaning) const {
    ADAMIX_CHECK(tensor.size(dim) == size, op, ": ", name, " must be ", size, " (", meaning,
                 ") in dimension ", dim, ", got shape ", shape_text(tensor));
    return *this;
  }
};

// y, where a kernel adds to it row by row.
inline void check_rows_to_add_to(const Arg& y) {
  const Tensor& rows = y.tensor;
  ADAMIX_CHECK(rows.size(1) <= 1 || rows.stride(1) == 1, y.op, ": ", y.name,
               " must have adjacent elements in a row (stride 1), got stride ", rows.stride(1));
  ADAMIX_CHECK(rows.size(0) <= 1 || rows.stride(0) >= rows.size(1), y.op, ": rows of ", y.name,
               " must not overlap: expected a row stride of at least ", rows.size(1), ", got ",
               rows.stride(0));
}

inline void check_max_rank(const char* op, std::optional<int64_t> max_rank) {
  ADAMIX_CHECK(max_rank.value_or(0) >= 0, op, ": max_rank must not be negative, got ", *max_rank);
}

inline void check_bits(const char* op, int64_t bits) {
  ADAMIX_CHECK(bits >= 1 && bits <= kMaxBits, op, ": bits must be 1..", kMaxBits, ", got ", bits);
}

inline void check_pack(const Tensor& codes, int64_t bits) {
  check_bits("pack", bits);
  Arg{"pack", "codes", codes}.has_dtype(ScalarType::Byte).has_rank(2, "[lanes, n]");
}

inline void check_unpack(const Tensor& words, int64_t bits, int64_t count) {
  check_bits("unpack", bits);
  ADAMIX_CHECK(count >= 0 && count < int64_t{1} << 48, "unpack: count must be 0..2^48 - 1, got ",
               count);
  Arg{"unpack", "words", words}.has_dtype(ScalarType::Int).has_rank(2, "[lanes, lane_words]");
  const int64_t expected = lane_words(count, static_cast<int>(bits));
  ADAMIX_CHECK(words.size(1) == expected, "unpack: ", count, " codes of ", bits, " bits need ",
               expected, " words a lane, got ", words.size(1));
}

inline void check_gptq(const Tensor& weight, const Tensor& hinv, const Tensor& bits,
                       const Tensor& scales, bool by_row) {
  Arg{"gptq", "weight", weight}.has_dtype(ScalarType::Float).has_rank(2, "[rows, n]");
  const int64_t n = weight.size(1), lanes = weight.size(by_row ? 0 : 1);
  const char* lane = by_row ? "one a row" : "one a column";
  Arg{"gptq", "hinv", hinv}
      .is_beside("weight", weight)
      .has_dtype(ScalarType::Float)
      .has_rank(2, "[n, n]")
      .has_size(0, n, "columns of weight")
      .has_size(1, n, "columns of weight");
  Arg{"gptq", "bits", bits}
      .is_beside("weight", weight)
      .has_dtype(ScalarType::Int)
      .has_rank(1, "[lanes]")
      .has_size(0, lanes, lane);
  Arg{"gptq", "scales", scales}
      .is_beside("weight", weight)
      .has_dtype(ScalarType::Float)
      .has_rank(1, "[lanes]")
      .has_size(0, lanes, lane);
}

// Outputs are fresh and contiguous, on the device of `like`.
inline Tensor new_matrix(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype) {
  return torch::stable::new_empty(like, {rows, cols}, dtype);
}

// As kernels read a matrix: rows lie anywhere, the elements of each are adjacent. A copy only where
// they are not.
inline Tensor with_adjacent_rows(const Tensor& matrix) {
  const bool adjacent = matrix.size(1) <= 1 || matrix.stride(1) == 1;
  return adjacent ? matrix : torch::stable::contiguous(matrix);
}

// T is the kernel's type for the elements; its size is that of the tensor's dtype, which has been
// checked.
template <typename T>
MatrixView<const T> const_view(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

template <typename T>
MatrixView<T> mutable_view(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

}  // namespace adamix::bindings
