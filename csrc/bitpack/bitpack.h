#pragma once

#include <cstdint>

#include "common/matrix_view.h"
#include "common/parallel.h"

// Codes <-> packed lanes (layout/packed_layout.h).
namespace adamix {

struct PackArgs {
  // Outputs
  MatrixView<uint32_t> words;  // [lanes, lane_words(n, bits)]
  // Inputs
  MatrixView<const uint8_t> codes;  // [lanes, n], each below 2^bits
  int bits;                         // 1..8
};

struct UnpackArgs {
  // Outputs
  MatrixView<uint8_t> codes;  // [lanes, n]
  // Inputs
  MatrixView<const uint32_t> words;  // [lanes, lane_words(n, bits)]
  int bits;                          // 1..8
};

void pack_cpu(const PackArgs& args, const ParallelFor& parallel);
void unpack_cpu(const UnpackArgs& args, const ParallelFor& parallel);

}  // namespace adamix
