#pragma once

#include "common/float16.h"
#include "cuda_runtime.h"

using __nv_bfloat16 = adamix::BFloat16;

inline float __bfloat162float(__nv_bfloat16 value) {
  return adamix::to_float(value);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return adamix::from_float<adamix::BFloat16>(value);
}
