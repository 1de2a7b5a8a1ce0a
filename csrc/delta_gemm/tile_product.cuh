#pragma once

#include <cuda_runtime.h>

#include "common/cuda_instructions.cuh"

// The product of two tiles in shared memory on the tensor cores, by a group of 4 warps:
//
//   sums [tokens, 128 rows] += tokens [tokens, 64 k] · rows [128, 64 k] transposed
//
// of 128 tokens on Hopper, which has the registers for it, of 64 elsewhere.
//
// A tile is of lines of 128 bytes, 64 numbers of 16 bits or 8 chunks of 16 bytes. Chunk c of line
// l lies at chunk c ^ l % 8: the same chunk of eight lines then lies in different banks. wgmma
// calls it the 128-byte swizzle.
//
//            along k               along rows
//   line l   row l, 64 k           k l % 64, rows 64 (l / 64) .. + 63
//
// Tokens lie along k, rows (components, outputs) as their codes do: V's along k, U's along rows.
//
// Where the sums go, 32 rows are exchanged so that what a thread has lies side by side:
//
//   row   8t + 2i + e   of 32 is row   8i + 2t + e   of the tile       i, t = 0..3, e = 0, 1
namespace adamix {

constexpr int kStepCodes = 64;  // k of a tile
constexpr int kProductRows = 128;
constexpr int kLineChunks = 8;
constexpr int kLineBytes = 16 * kLineChunks;

// In tiles at multiples of 1024 bytes, the address of chunk c is that of chunk 0 with c exchanged
// in place: chunk_of(line, c) == (chunk_of(line, 0) ^ c).
__device__ __forceinline__ int chunk_of(int line, int chunk) {
  return line * kLineChunks + (chunk ^ line % 8);
}

// Which row a row of the tile is; its own inverse, so also the other way round.
__device__ __forceinline__ int exchanged(int row) {
  return (row & ~31) + row % 8 / 2 * 8 + row / 8 % 4 * 2 + row % 2;
}

struct EightSums {
  float at[8];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kProductTokens = 128;

// wgmma, of Hopper: both operands straight from shared memory, results in a warp of 16 of 64 tokens
// and 128 rows.
template <typename T, bool kAlongK>
class TileProduct {
 public:
  // With tiles at these shared addresses, kFirst before the others. The product is under way; the
  // tiles are read until wait() says otherwise.
  template <bool kFirst>
  __device__ void start(uint32_t tokens, uint32_t rows) {
    constexpr int kStride = kAlongK ? 2 : 16 * kLineChunks;  // chunks of 16 k
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kStepCodes / 16; ++k) {
      const uint64_t columns =
          descriptor(rows / 16 + kStride * k, kAlongK ? 1 : kProductRows / 2 * kLineChunks);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const uint64_t lines = descriptor(tokens / 16 + 64 * kLineChunks * m + 2 * k, 1);
        if (kFirst && k == 0) {
          wgmma_pairs<T, kAlongK, false>(sums_[m], lines, columns);
        } else {
          wgmma_pairs<T, kAlongK, true>(sums_[m], lines, columns);
        }
      }
    }
    wgmma_commit();
  }

  // Until at most kPending of the started products are under way.
  template <int kPending>
  __device__ void wait() {
    wgmma_wait<kPending>(sums_);
  }

  // What a thread has sums of: kTokens tokens times kEights runs of eight rows.
  static constexpr int kTokens = kProductTokens / 32, kEights = kProductRows / 32;

  __device__ static int token(int i) {
    return i / 2 * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * (i % 2);
  }
  __device__ static int row(int n) { return 32 * n + threadIdx.x % 4 * 8; }
  __device__ EightSums eight(int i, int n) const {
    EightSums eight;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      eight.at[j] = sums_[i / 2][16 * n + j / 2 * 4 + 2 * (i % 2) + j % 2];
    }
    return eight;
  }

 private:
  static constexpr int kBlocks = kProductTokens / 64;

  // In chunks: where the tile is; from 64 rows to the next 64, of a tile along rows; from eight
  // lines to the next eight. 128-byte swizzle.
  __device__ static uint64_t descriptor(uint32_t tile, uint32_t far) {
    return uint64_t{1u << 30 | 8 * kLineChunks} << 32 | (tile + (far << 16));
  }

  float sums_[kBlocks][kProductRows / 2];
};

#else

constexpr int kProductTokens = 64;

// mma.sync, for every architecture. A warp has 32 tokens and 64 rows of the sums: fewer operand
// bytes from shared memory than with 16 and 128.
template <typename T, bool kAlongK>
class TileProduct {
 public:
  template <bool kFirst>
  __device__ void start(uint32_t tokens, uint32_t rows) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
    for (int k = 0; k < kStepCodes / 16; ++k) {
      uint32_t a[kTokenTiles][4];
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        load_matrices(a[m], tokens + 16 * chunk_of(first_token() + 16 * m + matrix % 2 * 8 + row,
                                                   2 * k + matrix / 2));
      }
#pragma unroll
      for (int n = 0; n < kRowTiles; n += 2) {
        uint32_t b[4];  // k 0 .. 7 and 8 .. 15 of 8 rows, then of the next 8
        if constexpr (kAlongK) {
          load_matrices(b, rows + 16 * chunk_of(first_row() + 8 * n + matrix / 2 * 8 + row,
                                                2 * k + matrix % 2));
        } else {
          const int line = first_row() + 16 * k + matrix % 2 * 8 + row;
          load_matrices_transposed(b, rows + 16 * chunk_of(line, n + matrix / 2));
        }
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

  static constexpr int kTokens = 4, kEights = kProductRows / 64;

  __device__ static int token(int i) {
    return first_token() + 16 * (i / 2) + threadIdx.x % 32 / 4 + 8 * (i % 2);
  }
  __device__ static int row(int n) { return first_row() + 32 * n + threadIdx.x % 4 * 8; }
  __device__ EightSums eight(int i, int n) const {
    EightSums eight;
#pragma unroll
    for (int j = 0; j < 8; ++j) eight.at[j] = sums_[i / 2][4 * n + j / 2][i % 2 * 2 + j % 2];
    return eight;
  }

 private:
  static constexpr int kTokenTiles = 2, kRowTiles = 8;

  __device__ static int first_token() { return threadIdx.x / 32 % 2 * 32; }
  __device__ static int first_row() { return threadIdx.x / 32 % 4 / 2 * 64; }  // and a first line

  float sums_[kTokenTiles][kRowTiles][4] = {};
};

#endif

}  // namespace adamix
