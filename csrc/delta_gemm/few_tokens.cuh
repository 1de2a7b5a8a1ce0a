#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "delta_gemm/delta_gemm_cuda.h"
#include "delta_gemm/fixed_point.cuh"
#include "delta_gemm/routes.cuh"
#include "delta_gemm/word_stream.cuh"

// delta_gemm where few tokens share a delta: the packed words bound the time, each is read once and
// serves the two tokens of a group. Two kernels, one thread block a multiprocessor:
//
//   down   z = scale · V x      a tile: 16 components of a group, all panels of V
//   up     y += U z             a tile: 256 outputs (one panel of U) of a group, all components
//
// A thread block has a part of a group's tiles (routes.cuh), worked off in batches of as many as
// there are sums for in shared memory, and each batch is cut into equal shares for the warps. A
// warp streams its words through shared memory (word_stream.cuh) and multiplies codes as unsigned
// bytes with x or z as three signed ones (fixed_point.cuh):
//
//   sum of level · v = 2 * sum of code · v - (2^b - 1) * sum of v
//
// All of that is whole numbers, so sums may be shared out and added in any order: the same token
// gives the same bits, whatever else is in the launch.
namespace adamix {

// fp32 z [layers, tokens, positions]; positions: components of every width of up's lanes padded to
// whole runs, the padding zero.
inline size_t few_tokens_scratch_bytes(const DeltaGemmCudaArgs& args) {
  return static_cast<size_t>(args.layer_count * args.tokens * (args.max_rank + kMaxPadding)) *
         sizeof(float);
}

__device__ __forceinline__ int64_t z_row(const DeltaGemmCudaArgs& args, int layer, int token) {
  return (layer * args.tokens + token) * (args.max_rank + kMaxPadding);
}

// z of a component, and zeros in the padding that is its own to write.
__device__ __forceinline__ void put_z(float* z, const Entry& entry, int component, float value) {
  const ZPlace place = find_in_z(entry.up.counts.at, component, padded_count);
  z[place.position] = value;
#pragma unroll 1
  for (int i = place.position + 1; i < place.end; ++i) z[i] = 0.0f;
}

// Both need args.tokens <= kFewTokens.
cudaError_t launch_few_tokens_down(const DeltaGemmCudaArgs& args, cudaStream_t stream);
cudaError_t launch_few_tokens_up(const DeltaGemmCudaArgs& args, cudaStream_t stream);

// Sums of a tile in shared memory: [column][row], a column being a (token, digit).
constexpr int kColumns = kGroupTokens * kDigits;

struct Tokens {
  int id[kGroupTokens];  // -1: none

  // Which of them a thread works for; no array access, which would put the array into memory.
  __device__ int of(int which) const { return which == 0 ? id[0] : id[1]; }

  __device__ bool operator==(const Tokens& other) const {
    return id[0] == other.id[0] && id[1] == other.id[1];
  }
};

// Thread 4g + t of a warp holds column g of the second factor: four columns a token, three of them
// digits. What the others hold is multiplied and never added.
__device__ inline int plane_of_thread(const Tokens& tokens) {
  const int g = threadIdx.x % 32 / 4, token = g / 4, digit = g % 4;
  return tokens.of(token) < 0 ? 0 : token * kDigits + min(digit, kDigits - 1);
}

// A thread's sums are of columns 2t and 2t + 1 of the second factor; the last of four is no digit.
// Where its first one is among the columns of sums.
__device__ __forceinline__ int first_column(int t) {
  return t / 2 * kDigits + t % 2 * 2;
}

__device__ inline int64_t read_sum(const int32_t* tile, int column_stride, int row, int token) {
  const int32_t* high = tile + token * kDigits * column_stride + row;
  return join_digits(high[0], high[column_stride], high[2 * column_stride]);
}

// A multiple of four words, aligned to 16 bytes.
__device__ inline void zero_words(void* words, int count) {
  auto* data = static_cast<uint4*>(words);
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x) data[i] = make_uint4(0, 0, 0, 0);
}

// As many warps as get a ring each.
inline int warps_for(int bytes, int ring_words, int most) {
  return std::clamp(bytes / (ring_words * 4), 1, most);
}

}  // namespace adamix
