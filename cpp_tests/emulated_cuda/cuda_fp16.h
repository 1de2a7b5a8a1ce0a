#pragma once

#include "common/float16.h"
#include "cuda_runtime.h"

using __half = adamix::Half;

inline float __half2float(__half value) {
  return adamix::to_float(value);
}
inline __half __float2half_rn(float value) {
  return adamix::from_float<adamix::Half>(value);
}
