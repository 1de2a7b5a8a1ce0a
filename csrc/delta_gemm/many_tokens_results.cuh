#pragma once

#include "delta_gemm/many_tokens_pipeline.cuh"

// Where the sums of a tile product go: a thread has runs of eight adjacent rows of some tokens, 16
// bytes of z or y, and the four threads beside each other have 64.
namespace adamix {

template <typename T>
__device__ __forceinline__ uint4 round_eight(const float (&values)[8]) {
  return make_uint4(round_pair<T>(values[0], values[1]), round_pair<T>(values[2], values[3]),
                    round_pair<T>(values[4], values[5]), round_pair<T>(values[6], values[7]));
}

// In bf16. A component that is not there has the codes of another and scale 0: its sum must not
// count, even if NaN.
__device__ __forceinline__ uint4 scale_eight(const EightSums& sums, const float* scales) {
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = scales[j] != 0.0f ? scales[j] * sums.at[j] : 0.0f;
  return round_eight<__nv_bfloat16>(values);
}

// numbers + sums, rounded once.
template <typename T>
__device__ __forceinline__ uint4 add_eight(const uint4& numbers, const EightSums& sums) {
  const uint32_t pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    values[j] = widen(from_bits<T>(pairs[j / 2] >> j % 2 * 16)) + sums.at[j];
  }
  return round_eight<T>(values);
}

// Where number j of run t of 32 components stands in a part of z: what the four threads of a line
// write at a time lies side by side.
//
//   t 0, j 0..3 | t 1, j 0..3 | t 2 | t 3 | t 0, j 4..7 | t 1, j 4..7 | t 2 | t 3
//
// component: the first of the run, 32 n + 8 t.
__device__ __forceinline__ int at_in_part(int component) {
  return component - component % 32 / 2;
}
constexpr int kPartHalf = 16;  // from j to j + 4

// z = scale · sums, in bf16, or the sums of a part of the inputs, in fp32.
template <typename Sums>
struct StoreZ {
  uint16_t* z;          // of this product's first token and component; if null, the part:
  float* part;          // likewise
  int64_t z_step;       // numbers from 64 components of z to the next 64
  int z_width;          // of a part
  int tokens;           // of the product
  const float* scales;  // of the tile's components,
  int components;       // so many of them
  float* group_scales;  // the same in shared memory; 0 where there is none
  int group;
  int first_row = 0;

  __device__ void begin() {
    first_row = group * kProductTokens;
    if (z == nullptr) return;
    const int i = threadIdx.x % kGroupThreads;
    const float scale = i < components ? scales[i] : 0.0f;
    barrier_sync(kFirstConsumerBarrier + group, kGroupThreads);  // those before are read
    group_scales[i] = scale;
    barrier_sync(kFirstConsumerBarrier + group, kGroupThreads);
  }

  __device__ void store(const Sums& sums) const {
#pragma unroll
    for (int i = 0; i < Sums::kTokens; ++i) {
      const int token = first_row + sums.token(i);
      if (token >= tokens) continue;
#pragma unroll
      for (int n = 0; n < Sums::kEights; ++n) {
        const int row = sums.row(n);
        const EightSums eight = sums.eight(i, n);
        if (z != nullptr) {
          uint16_t* target = z + row / kStepCodes * z_step;
          *reinterpret_cast<uint4*>(target + 8 * chunk_of(token, row % kStepCodes / 8)) =
              scale_eight(eight, group_scales + row);
        } else {
          float* target = part + token * z_width + at_in_part(row);
          const float* sum = eight.at;
          *reinterpret_cast<float4*>(target) = make_float4(sum[0], sum[1], sum[2], sum[3]);
          *reinterpret_cast<float4*>(target + kPartHalf) =
              make_float4(sum[4], sum[5], sum[6], sum[7]);
        }
      }
    }
  }
};

// y += sums. y comes to L2 while the sums grow: there are no registers to hold it.
template <typename T, typename Sums>
struct AddToY {
  const DeltaLayer& layer;
  const int* order;  // of the product's first token
  int64_t rows;      // of y
  int tokens;        // of the product
  int first_output;  // of the tile
  int group;
  bool pieces = false;              // whether 16 bytes at a time are too many
  uint16_t* y[Sums::kTokens] = {};  // of a run's first output; null: the token is not there

  __device__ void begin() {
    pieces = reinterpret_cast<uintptr_t>(layer.y) % 16 != 0 || layer.y_row_stride % 8 != 0 ||
             first_output + kTileRows > layer.out;
#pragma unroll
    for (int i = 0; i < Sums::kTokens; ++i) {
      const int sorted = group * kProductTokens + Sums::token(i);
      const int token = sorted < tokens ? order[sorted] : -1;
      if (token < 0 || token >= rows) continue;
      y[i] = static_cast<uint16_t*>(layer.y) + token * layer.y_row_stride + first_output +
             Sums::row(0);
      if (pieces) continue;
#pragma unroll
      for (int n = 0; n < Sums::kEights; n += 2) prefetch(y[i] + 32 * n);  // 128 bytes a token
    }
  }

  __device__ void store(const Sums& sums) {
#pragma unroll
    for (int i = 0; i < Sums::kTokens; ++i) {
      if (y[i] == nullptr) continue;
      if (pieces) {
        add_pieces(sums, i);
        continue;
      }
      uint4 before[Sums::kEights];
#pragma unroll
      for (int n = 0; n < Sums::kEights; ++n) {
        before[n] = *reinterpret_cast<const uint4*>(y[i] + 32 * n);
      }
#pragma unroll
      for (int n = 0; n < Sums::kEights; ++n) {
        *reinterpret_cast<uint4*>(y[i] + 32 * n) = add_eight<T>(before[n], sums.eight(i, n));
      }
    }
  }

  __device__ void add_pieces(const Sums& sums, int i) const {
    const int64_t left = layer.out - first_output - Sums::row(0);
#pragma unroll
    for (int n = 0; n < Sums::kEights; ++n) {
      const EightSums eight = sums.eight(i, n);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint16_t* one = y[i] + 32 * n + j;
        if (32 * n + j >= left) continue;
        const float sum = widen(from_bits<T>(*one)) + eight.at[j];
        *one = static_cast<uint16_t>(round_pair<T>(sum, 0.0f));
      }
    }
  }
};

}  // namespace adamix
