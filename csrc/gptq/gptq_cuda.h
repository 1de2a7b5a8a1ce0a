#pragma once

#include <cuda_runtime_api.h>

#include "gptq/gptq.h"

// The launcher: pointers in args and scratch are the device's; asynchronous on the stream, no
// allocation, no synchronisation. The codes are those of gptq_cpu on a machine with FMA, bit by
// bit: the same operations in the same order. Widths on the device are not looked at; what is
// outside 1..8 counts as 1 or 8.
namespace adamix {

constexpr int kGptqBlockColumns = 128;
constexpr int kGptqRowPadding = 128;  // whole tiles of rows: the kernels need no check of rows

constexpr int64_t gptq_padded_rows(int64_t rows) {
  return (rows + kGptqRowPadding - 1) / kGptqRowPadding * kGptqRowPadding;
}

// 16-byte aligned; what they hold before does not matter.
struct GptqScratch {
  float* columns;  // [n, gptq_padded_rows(rows)]: the weight, transposed, as the errors change it
  float* errors;   // [kGptqBlockColumns, gptq_padded_rows(rows)]: of the block of columns at work
};

cudaError_t launch_gptq(const GptqArgs& args, const GptqScratch& scratch, cudaStream_t stream);

}  // namespace adamix
