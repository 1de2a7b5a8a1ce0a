#include <algorithm>

#include "bitpack/bitpack_cuda.h"
#include "common/for_bits.h"
#include "layout/packed_layout.h"

// One warp a block of 32 codes, one thread a code: codes and words are read and written at adjacent
// addresses. Both kernels move bytes and compute next to nothing; the grid strides over blocks and
// lanes, so any size fits.
namespace adamix {
namespace {

constexpr int kWarpThreads = 32;
static_assert(kBlockCodes == kWarpThreads, "one thread a code");
constexpr int kWarps = 8;               // a thread block: enough to fill an SM with eight of them
constexpr int64_t kMaxGridX = 1 << 16;  // then warps stride on
constexpr int64_t kMaxGridY = 65535;    // the hardware's limit

dim3 grid_of(int64_t lanes, int64_t codes) {
  const int64_t x = std::min<int64_t>(kMaxGridX, (block_count(codes) + kWarps - 1) / kWarps);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min<int64_t>(kMaxGridY, lanes)));
}

// body(lane, block) for this warp's share of a matrix of codes.
template <typename Body>
__device__ void for_each_block(int64_t lanes, int64_t codes, Body body) {
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.y,
                step = int64_t{gridDim.x} * kWarps;
  for (int64_t lane = blockIdx.y; lane < lanes; lane += gridDim.y) {
    for (int64_t block = first; block < block_count(codes); block += step) body(lane, block);
  }
}

template <int kBits>
__global__ void pack_kernel(PackArgs args) {
  const int i = threadIdx.x;
  for_each_block(args.codes.rows, args.codes.cols, [&](int64_t lane, int64_t block) {
    const int64_t k = block * kBlockCodes + i;
    // A code too wide for its lane must not spill into its neighbours: nobody has looked at codes
    // on the device.
    const uint32_t code = k < args.codes.cols ? args.codes.row(lane)[k] & max_code(kBits) : 0u;
    uint32_t mine = 0;
#pragma unroll
    for (int word = 0; word < kBits; ++word) {
      const uint32_t whole = __reduce_or_sync(0xffffffffu, code_in_word(code, i, kBits, word));
      if (i == word) mine = whole;
    }
    if (i < kBits) args.words.row(lane)[block * kBits + i] = mine;
  });
}

template <int kBits>
__global__ void unpack_kernel(UnpackArgs args) {
  const int i = threadIdx.x;
  for_each_block(args.codes.rows, args.codes.cols, [&](int64_t lane, int64_t block) {
    const int64_t k = block * kBlockCodes + i;
    if (k >= args.codes.cols) return;
    const uint32_t* words = args.words.row(lane) + block * kBits;
    args.codes.row(lane)[k] = static_cast<uint8_t>(read_code(words, i, kBits));
  });
}

}  // namespace

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  if (args.codes.rows == 0 || args.codes.cols == 0) return cudaSuccess;
  return for_bits(args.bits, [&](auto bits) {
    pack_kernel<decltype(bits)::value>
        <<<grid_of(args.codes.rows, args.codes.cols), dim3(kWarpThreads, kWarps), 0, stream>>>(
            args);
    return cudaGetLastError();
  });
}

cudaError_t launch_unpack(const UnpackArgs& args, cudaStream_t stream) {
  if (args.codes.rows == 0 || args.codes.cols == 0) return cudaSuccess;
  return for_bits(args.bits, [&](auto bits) {
    unpack_kernel<decltype(bits)::value>
        <<<grid_of(args.codes.rows, args.codes.cols), dim3(kWarpThreads, kWarps), 0, stream>>>(
            args);
    return cudaGetLastError();
  });
}

}  // namespace adamix
