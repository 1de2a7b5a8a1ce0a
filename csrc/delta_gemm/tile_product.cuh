#pragma once

#include <cuda_runtime.h>

#include "common/cuda_instructions.cuh"

// The product of two tiles in shared memory on the tensor cores, by a group of 4 warps:
//
//   sums [64 tokens, 128 rows] += tokens [64, 64 k] · rows [128, 64 k] transposed
//
// A tile's row is 64 numbers of 16 bits, 8 chunks of 16 bytes. Chunk c of row r lies at chunk
// c ^ r % 8: the same chunk of eight rows then lies in different banks. wgmma calls it the 128-byte
// swizzle.
namespace adamix {

constexpr int kStepCodes = 64;  // k of a tile
constexpr int kProductTokens = 64;
constexpr int kProductRows = 128;
constexpr int kTileChunks = 128 * kStepCodes / 8;

__device__ __forceinline__ int chunk_of(int row, int chunk) {
  return row * (kStepCodes / 8) + (chunk ^ row % 8);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// wgmma, of Hopper: both operands straight from shared memory, results in a warp of 16 tokens and
// 128 rows.
template <typename T>
class TileProduct {
 public:
  // The product is under way; the tiles are read until wait() says otherwise.
  __device__ void start(const uint4* tokens, const uint4* rows) {
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kStepCodes / 16; ++k) {
      wgmma_pairs<T>(sums_, tile_descriptor(tokens) + 2 * k, tile_descriptor(rows) + 2 * k);
    }
    wgmma_commit();
  }

  // Until at most kPending of the started products are under way.
  template <int kPending>
  __device__ void wait() {
    wgmma_wait<kPending>(sums_);
  }

  // What a thread has sums of: kTokens tokens times kPairs pairs of adjacent rows.
  static constexpr int kTokens = 2, kPairs = kProductRows / 8;
  static constexpr int kTokensAtOnce = 2;  // whose y there are registers for

  __device__ static int token(int i) {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * i;
  }
  __device__ static int row(int n) { return 8 * n + threadIdx.x % 4 * 2; }
  __device__ float2 sum(int i, int n) const {
    return {sums_[4 * n + 2 * i], sums_[4 * n + 2 * i + 1]};
  }

 private:
  // 8 rows of 128 bytes are 1024 bytes from the next 8; 128-byte swizzle. In units of 16 bytes.
  __device__ static uint64_t tile_descriptor(const uint4* tile) {
    return uint64_t{shared_address(tile) >> 4 & 0x3fffu} | uint64_t{1} << 16 | uint64_t{64} << 32 |
           uint64_t{1} << 62;
  }

  float sums_[kProductRows / 2] = {};
};

#else

// mma.sync, for every architecture. A warp has 32 tokens and 64 rows of the sums: fewer operand
// bytes from shared memory than with 16 and 128.
template <typename T>
class TileProduct {
 public:
  __device__ void start(const uint4* tokens, const uint4* rows) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const uint32_t token_tile = shared_address(tokens), row_tile = shared_address(rows);
#pragma unroll
    for (int k = 0; k < kStepCodes / 16; ++k) {
      uint32_t a[kTokenTiles][4];
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        load_matrices(a[m],
                      token_tile + 16 * chunk_of(first_token() + 16 * m + matrix % 2 * 8 + row,
                                                 2 * k + matrix / 2));
      }
#pragma unroll
      for (int n = 0; n < kRowTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, row_tile + 16 * chunk_of(first_row() + 8 * n + matrix / 2 * 8 + row,
                                                  2 * k + matrix % 2));
#pragma unroll
        for (int m = 0; m < kTokenTiles; ++m) {
          mma_pairs<T>(sums_[m][n], a[m], b[0], b[1]);
          mma_pairs<T>(sums_[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  template <int kPending>
  __device__ void wait() {}

  static constexpr int kTokens = 4, kPairs = kProductRows / 16;
  static constexpr int kTokensAtOnce = 1;

  __device__ static int token(int i) {
    return first_token() + 16 * (i / 2) + threadIdx.x % 32 / 4 + 8 * (i % 2);
  }
  __device__ static int row(int n) { return first_row() + 8 * n + threadIdx.x % 4 * 2; }
  __device__ float2 sum(int i, int n) const {
    return {sums_[i / 2][n][i % 2 * 2], sums_[i / 2][n][i % 2 * 2 + 1]};
  }

 private:
  static constexpr int kTokenTiles = 2, kRowTiles = 8;

  __device__ static int first_token() { return threadIdx.x / 32 % 2 * 32; }
  __device__ static int first_row() { return threadIdx.x / 32 % 4 / 2 * 64; }

  float sums_[kTokenTiles][kRowTiles][4] = {};
};

#endif

}  // namespace adamix
