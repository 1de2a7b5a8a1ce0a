#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace adamix {

// A matrix that somebody else owns. Elements of a row are adjacent; rows are row_stride elements
// apart.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;

  ADAMIX_HD T* row(int64_t i) const { return data + i * row_stride; }
};

}  // namespace adamix
