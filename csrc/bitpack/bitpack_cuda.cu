#include <algorithm>

#include "bitpack/bitpack_cuda.h"
#include "common/cuda_launch.cuh"
#include "common/for_bits.h"
#include "layout/block_bytes.h"
#include "layout/packed_layout.h"

// codes [lanes, n] uint8 <-> words [lanes, lane_words(n, bits)], for any n, strides and alignment.
//
// Memory bounds the time, codes more than words. The blocks of all lanes, one lane behind the
// other, are cut into tiles of 32; a warp takes a tile, a thread one block. All that crosses global
// memory does so in pieces of 16 bytes, at adjacent addresses in a warp:
//
//   codes   2 pieces a thread        changed hands by shuffles    32 codes in 8 registers
//   words   at most 2 a thread       changed hands in shared      b words in b registers
//                                    memory
//
// That needs codes that lie end to end in whole blocks, as those of a contiguous matrix with
// n % 32 = 0 do. Other tiles, and the last one where it is not full, go byte by byte, a block at a
// time: correct for all, at a fraction of the speed.
namespace adamix {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kTileBlocks = kWarpThreads;  // one a thread
constexpr int kWarps = 8;                  // a thread block
constexpr int kThreads = kWarps * kWarpThreads;
// Thread blocks at once on an SM: with 48 warps, 48 KiB of codes are on their way to it; an H200
// needs about 25 (its 4.8 TB/s times 700 ns, over 132 SMs).
constexpr int kResident = 6;
constexpr unsigned kAll = 0xffffffffu;

constexpr int kPieceBytes = 16;  // what a thread can load or store at once
constexpr int kPieceWords = kPieceBytes / 4;
constexpr int kTileWords = kTileBlocks * kMaxBits;  // at 8 bits; as many bytes as its codes have
static_assert(kTileWords * 4 == kTileBlocks * kBlockCodes);

// What both kernels know of a matrix of codes. Blocks are counted through all lanes.
struct Shape {
  int64_t lanes;
  int64_t lane_blocks;
  // So many of the first blocks lie end to end in memory from an address on that suits pieces: all
  // of a contiguous matrix, but for codes of a last block that is not full; or none.
  int64_t joined_codes;
  int64_t joined_words;
};

struct Place {
  int64_t lane;
  int64_t block;  // of the lane
};

// 32 blocks that follow each other, from lane to lane.
struct Tile {
  int64_t first;
  int blocks;         // 32; fewer in the last tile, none behind it
  bool joined_codes;  // all 32 of them
  bool joined_words;
  Place start;  // unless both are joined
  int64_t lane_blocks;

  // The place of block i of the tile. A tile can span many short lanes.
  __device__ Place place(int i) const {
    const int64_t block = start.block + i;
    if (block < lane_blocks) return {start.lane, block};
    if (lane_blocks >= kTileBlocks) return {start.lane + 1, block - lane_blocks};
    const auto length = static_cast<unsigned>(lane_blocks), far = static_cast<unsigned>(block);
    return {start.lane + far / length, far % length};
  }
};

__device__ Tile locate_tile(const Shape& shape) {
  Tile tile{};
  tile.first = (int64_t{blockIdx.x} * kWarps + threadIdx.y) * kTileBlocks;
  const int64_t left = shape.lanes * shape.lane_blocks - tile.first;
  tile.blocks = left < 0 ? 0 : left < kTileBlocks ? static_cast<int>(left) : kTileBlocks;
  tile.joined_codes = tile.first + kTileBlocks <= shape.joined_codes;
  tile.joined_words = tile.first + kTileBlocks <= shape.joined_words;
  tile.lane_blocks = shape.lane_blocks;
  if (!tile.joined_codes || !tile.joined_words) {  // spare the others the division
    tile.start.lane = tile.first / shape.lane_blocks;
    tile.start.block = tile.first - tile.start.lane * shape.lane_blocks;
  }
  return tile;
}

// --- codes ------------------------------------------------------------------------------------

// A block takes two pieces. Loaded at adjacent addresses, thread t has pieces t and 32 + t of the
// tile, so that neighbours have halves of the same two blocks; they swap one each, and swap back.
__device__ int block_of_thread(int thread) {
  return thread / 2 + thread % 2 * (kTileBlocks / 2);
}

__device__ void swap_halves(uint32_t (&bytes)[kBlockFields]) {
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < kPieceWords; ++i) {
    uint32_t& first = bytes[i];
    uint32_t& second = bytes[kPieceWords + i];
    const uint32_t received = __shfl_xor_sync(kAll, odd ? first : second, 1);
    first = odd ? received : first;
    second = odd ? second : received;
  }
}

__device__ void load_pieces(const uint8_t* tile_codes, uint32_t (&bytes)[kBlockFields]) {
  const auto* pieces = reinterpret_cast<const uint4*>(tile_codes) + threadIdx.x;
  const uint4 low = __ldcs(pieces), high = __ldcs(pieces + kWarpThreads);  // read once
  bytes[0] = low.x, bytes[1] = low.y, bytes[2] = low.z, bytes[3] = low.w;
  bytes[4] = high.x, bytes[5] = high.y, bytes[6] = high.z, bytes[7] = high.w;
  swap_halves(bytes);
}

__device__ void store_pieces(uint8_t* tile_codes, uint32_t (&bytes)[kBlockFields]) {
  swap_halves(bytes);
  auto* pieces = reinterpret_cast<uint4*>(tile_codes) + threadIdx.x;
  pieces[0] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
  pieces[kWarpThreads] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
}

// Thread t moves code t of one block after the other; codes behind the lane's end are 0.
__device__ void gather_codes(const Tile& tile, const MatrixView<const uint8_t>& codes,
                             uint32_t* shared, uint32_t (&bytes)[kBlockFields]) {
  auto* staged = reinterpret_cast<uint8_t*>(shared);
#pragma unroll 8
  for (int i = 0; i < kTileBlocks; ++i) {
    const Place place = tile.place(i);
    const int64_t k = place.block * kBlockCodes + threadIdx.x;
    const bool there = i < tile.blocks && k < codes.cols;
    staged[i * kBlockCodes + threadIdx.x] = there ? codes.row(place.lane)[k] : uint8_t{0};
  }
  __syncwarp();
  const uint32_t* mine = shared + block_of_thread(threadIdx.x) * kBlockFields;
#pragma unroll
  for (int i = 0; i < kBlockFields; ++i) bytes[i] = mine[i];
  __syncwarp();
}

__device__ void scatter_codes(const Tile& tile, const MatrixView<uint8_t>& codes, uint32_t* shared,
                              const uint32_t (&bytes)[kBlockFields]) {
  __syncwarp();
  uint32_t* mine = shared + block_of_thread(threadIdx.x) * kBlockFields;
#pragma unroll
  for (int i = 0; i < kBlockFields; ++i) mine[i] = bytes[i];
  __syncwarp();
  const auto* staged = reinterpret_cast<const uint8_t*>(shared);
#pragma unroll 8
  for (int i = 0; i < tile.blocks; ++i) {
    const Place place = tile.place(i);
    const int64_t k = place.block * kBlockCodes + threadIdx.x;
    if (k < codes.cols) codes.row(place.lane)[k] = staged[i * kBlockCodes + threadIdx.x];
  }
}

// --- words ------------------------------------------------------------------------------------

// A block's words, aligned so that shared memory takes several at once where their number is even.
template <int kBits>
struct alignas(4 * std::min(kBits & -kBits, kPieceWords)) BlockWords {
  uint32_t word[kBits];
};

template <int kBits>
constexpr int kPieces = kTileBlocks * kBits / kPieceWords;  // of a tile: at most two a thread

template <int kBits>
__device__ BlockWords<kBits>* my_words(uint32_t* shared) {
  return reinterpret_cast<BlockWords<kBits>*>(shared) + block_of_thread(threadIdx.x);
}

template <int kBits>
__device__ void store_words(const Tile& tile, const MatrixView<uint32_t>& words, uint32_t* shared,
                            const BlockWords<kBits>& block) {
  *my_words<kBits>(shared) = block;
  __syncwarp();
  if (tile.joined_words) {
    auto* target = reinterpret_cast<uint4*>(words.data + tile.first * kBits);
#pragma unroll
    for (int first = 0; first < kPieces<kBits>; first += kWarpThreads) {
      const int i = first + threadIdx.x;
      if (i < kPieces<kBits>) target[i] = reinterpret_cast<const uint4*>(shared)[i];
    }
    return;
  }
  for (int i = threadIdx.x; i < tile.blocks * kBits; i += kWarpThreads) {
    const Place place = tile.place(i / kBits);
    words.row(place.lane)[place.block * kBits + i % kBits] = shared[i];
  }
}

template <int kBits>
__device__ BlockWords<kBits> load_words(const Tile& tile, const MatrixView<const uint32_t>& words,
                                        uint32_t* shared) {
  if (tile.joined_words) {
    const auto* source = reinterpret_cast<const uint4*>(words.data + tile.first * kBits);
#pragma unroll
    for (int first = 0; first < kPieces<kBits>; first += kWarpThreads) {
      const int i = first + threadIdx.x;
      if (i < kPieces<kBits>) reinterpret_cast<uint4*>(shared)[i] = __ldcs(source + i);
    }
  } else {
    for (int i = threadIdx.x; i < tile.blocks * kBits; i += kWarpThreads) {
      const Place place = tile.place(i / kBits);
      shared[i] = words.row(place.lane)[place.block * kBits + i % kBits];
    }
  }
  __syncwarp();
  return *my_words<kBits>(shared);
}

// --- kernels ----------------------------------------------------------------------------------

template <int kBits>
__global__ void __launch_bounds__(kThreads, kResident) pack_kernel(PackArgs args, Shape shape) {
  alignas(kPieceBytes) __shared__ uint32_t tiles[kWarps][kTileWords];
  uint32_t* shared = tiles[threadIdx.y];
  const Tile tile = locate_tile(shape);
  if (tile.blocks == 0) return;
  uint32_t bytes[kBlockFields];
  if (tile.joined_codes) {
    load_pieces(args.codes.data + tile.first * kBlockCodes, bytes);
  } else {
    gather_codes(tile, args.codes, shared, bytes);
  }
  // A code too wide for its lane must not spill into its neighbours: nobody has looked at codes on
  // the device. pack_block drops its upper bits.
  BlockWords<kBits> block;
  pack_block<kBits>(bytes, block.word);
  store_words<kBits>(tile, args.words, shared, block);
}

template <int kBits>
__global__ void __launch_bounds__(kThreads, kResident) unpack_kernel(UnpackArgs args, Shape shape) {
  alignas(kPieceBytes) __shared__ uint32_t tiles[kWarps][kTileWords];
  uint32_t* shared = tiles[threadIdx.y];
  const Tile tile = locate_tile(shape);
  if (tile.blocks == 0) return;
  const auto block = load_words<kBits>(tile, args.words, shared);
  uint32_t bytes[kBlockFields];
  unpack_block<kBits>(block.word, bytes);
  if (tile.joined_codes) {
    store_pieces(args.codes.data + tile.first * kBlockCodes, bytes);
  } else {
    scatter_codes(tile, args.codes, shared, bytes);
  }
}

// --- launchers --------------------------------------------------------------------------------

// Rows of `row` elements that matter lie end to end, the first where pieces can begin.
template <typename T>
bool end_to_end(const MatrixView<T>& view, int64_t row) {
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % kPieceBytes == 0;
  return aligned && (view.rows == 1 || view.row_stride == row);
}

template <typename Codes, typename Words>
Shape shape_of(const MatrixView<Codes>& codes, const MatrixView<Words>& words, int bits) {
  const int64_t lane_blocks = block_count(codes.cols);
  const bool whole = codes.rows == 1 || codes.cols % kBlockCodes == 0;
  const bool joined = whole && end_to_end(codes, codes.cols);
  return {codes.rows, lane_blocks, joined ? codes.rows * codes.cols / kBlockCodes : 0,
          end_to_end(words, lane_blocks * bits) ? codes.rows * lane_blocks : 0};
}

// Any size fits: as many thread blocks as a grid holds would write a terabyte of words.
Grid grid_of(const Shape& shape) {
  constexpr int64_t kBlocks = kWarps * kTileBlocks;
  const int64_t blocks = (shape.lanes * shape.lane_blocks + kBlocks - 1) / kBlocks;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kWarpThreads, kWarps)};
}

}  // namespace

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  if (args.codes.rows == 0 || args.codes.cols == 0) return cudaSuccess;
  const Shape shape = shape_of(args.codes, args.words, args.bits);
  return for_bits(args.bits, [&](auto bits) {
    return launch(pack_kernel<decltype(bits)::value>, grid_of(shape), stream, args, shape);
  });
}

cudaError_t launch_unpack(const UnpackArgs& args, cudaStream_t stream) {
  if (args.codes.rows == 0 || args.codes.cols == 0) return cudaSuccess;
  const Shape shape = shape_of(args.codes, args.words, args.bits);
  return for_bits(args.bits, [&](auto bits) {
    return launch(unpack_kernel<decltype(bits)::value>, grid_of(shape), stream, args, shape);
  });
}

}  // namespace adamix
