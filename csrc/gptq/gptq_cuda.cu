#include "common/cuda_instructions.cuh"
#include "common/cuda_launch.cuh"
#include "gptq/gptq_cuda.h"
#include "layout/packed_layout.h"

// Columns go in blocks of 128, two kernels a block, as in gptq_cpu:
//
//                begin   end      n
//   hinv     ..    |\walk | push |    walk   quantizes the block's columns in turn; an error goes
//                  |   \  |      |           at once to the columns behind it in the block
//   W        ..    | walk | push |    push   the columns beyond: W[:, end:] -= errors · hinv, one
//                                            product of [rows, 128] and [128, n - end]
//
// Order: w - err * h is one FMA per error, first error first, inside a block; beyond it the block's
// 128 products are summed from 0 by FMAs, then subtracted. Tensor cores and cuBLAS would round or
// order otherwise, and a code on a boundary would change with them.
//
// The weight is copied once, transposed, its rows padded to whole tiles: then a warp reads a column
// of 32 rows at adjacent addresses, both factors of the product lie in memory as its inner loop
// reads them, and only columns need checks. Padding rows hold zeros at first and are never stored.
namespace adamix {
namespace {

constexpr int kWarpThreads = 32;

// --- copy ----------------------------------------------------------------------------------------

constexpr int kCopyTile = 32;  // square; a warp reads 32 columns of a row and writes 32 rows of one
constexpr int kCopyWarps = 8;

// --- walk: a thread a row ------------------------------------------------------------------------

// A column is a chain of two divisions: what bounds the time is latency. Few rows a thread block
// spread the warps over all SMs, where each has a scheduler of its own.
constexpr int kWalkThreads = 64;
constexpr int kWalkWarps = kWalkThreads / kWarpThreads;
// Columns of a row in registers, a panel. Errors of earlier panels are pushed into it when its turn
// comes: one read of an error for 16 FMAs, and the order per element stays.
constexpr int kPanelColumns = 16;
constexpr int kEarlierErrors = kGptqBlockColumns - kPanelColumns;  // those of the last: no use

// --- push: a product of 128 errors ---------------------------------------------------------------

// 8 x 8 results a thread: 4 reads of 16 bytes for 64 FMAs. 256 threads x 2 thread blocks leave a
// thread 128 registers; while one block ends with its reads and writes of W, the other multiplies.
constexpr int kTileRows = 128, kTileColumns = 128;
constexpr int kPushThreads = 256, kPushBlocksPerSm = 2;
constexpr int kDepth = 16;  // errors in shared memory at a time, and as many on their way
constexpr int kQuad = 4;    // a thread's 8 rows (columns) are two runs of 4, 16 bytes each
constexpr int kWarpRows = 64, kWarpColumns = 32;  // a warp's part of the tile: 8 x 4 threads

static_assert(kGptqRowPadding % kTileRows == 0 && kGptqRowPadding % kWalkThreads == 0 &&
              kGptqRowPadding % kCopyTile == 0);
static_assert(kGptqBlockColumns % kPanelColumns == 0 && kGptqBlockColumns % kDepth == 0);
static_assert(kPanelColumns == sizeof(uint4), "a panel's codes of a row are one uint4");
static_assert(kTileRows / kWarpRows * (kTileColumns / kWarpColumns) * kWarpThreads == kPushThreads);

struct Work {
  GptqArgs args;
  GptqScratch scratch;
  int64_t padded_rows;

  __device__ float* column(int64_t k) const { return scratch.columns + k * padded_rows; }
  __device__ float* errors(int64_t j) const { return scratch.errors + j * padded_rows; }
};

// What a row (of V) or a column (of U) is quantized with.
struct Lane {
  float scale = 1.0f;
  float half = 1.0f;  // half of its levels

  __device__ float top() const { return 2.0f * half - 1.0f; }  // its highest code
};

__device__ Lane load_lane(const GptqArgs& args, int64_t lane, int64_t lanes) {
  if (lane >= lanes) return {};
  const int bits = min(max(args.bits[lane], 1), kMaxBits);
  return {args.scales[lane], static_cast<float>(1 << (bits - 1))};
}

__device__ float quantize(float w, Lane lane) {
  const float q = floorf(__fdiv_rn(w, 2.0f * lane.scale)) + lane.half;
  return fminf(fmaxf(q, 0.0f), lane.top());  // fmaxf makes 0 of a NaN
}

__device__ float error_of(float w, float q, Lane lane, float diagonal) {
  return __fdiv_rn(__fmaf_rn(-lane.scale, 2.0f * q - lane.top(), w), diagonal);
}

__global__ void __launch_bounds__(kCopyTile* kCopyWarps) copy_kernel(Work work) {
  __shared__ float tile[kCopyTile][kCopyTile + 1];
  const MatrixView<const float> weight = work.args.weight;
  const int64_t first_row = int64_t{blockIdx.x} * kCopyTile,
                first = int64_t{blockIdx.y} * kCopyTile;
  const int64_t k = first + threadIdx.x;
  for (int i = threadIdx.y; i < kCopyTile; i += kCopyWarps) {
    const bool there = first_row + i < weight.rows && k < weight.cols;
    tile[i][threadIdx.x] = there ? weight.row(first_row + i)[k] : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kCopyTile && first + i < weight.cols; i += kCopyWarps)
    work.column(first + i)[first_row + threadIdx.x] = tile[threadIdx.x][i];
}

// --- walk ----------------------------------------------------------------------------------------

using Strip = float[kGptqBlockColumns][kPanelColumns];

// The panel's columns of hinv, from the block's first row down to the diagonal. Below it and beyond
// n the unit matrix stands in: columns that are not there cost time, not meaning.
__device__ void fetch_strip(const Work& work, int64_t begin, int first, Strip& strip) {
  const int c = threadIdx.x % kPanelColumns;
  const int64_t k = begin + first + c;
  for (int j = threadIdx.x / kPanelColumns; j < first + kPanelColumns;
       j += kWalkThreads / kPanelColumns) {
    if (j <= first + c && k < work.args.hinv.cols) {
      copy_async_4(shared_address(&strip[j][c]), work.args.hinv.row(begin + j) + k);
    } else {
      strip[j][c] = j == first + c ? 1.0f : 0.0f;
    }
  }
  commit_copies();
}

// One row's part of 16 columns. If lanes are columns, thread i of a warp holds the lane of column
// i % 16.
struct Panel {
  float w[kPanelColumns];
  Lane lane;
};

template <bool kByRow>
__device__ Panel load_panel(const Work& work, int64_t row, int64_t first) {
  const int64_t n = work.args.weight.cols;
  Panel panel;
#pragma unroll
  for (int c = 0; c < kPanelColumns; ++c)
    panel.w[c] = first + c < n ? work.column(first + c)[row] : 0.0f;
  panel.lane = kByRow ? load_lane(work.args, row, work.args.weight.rows)
                      : load_lane(work.args, first + threadIdx.x % kPanelColumns, n);
  return panel;
}

__device__ void load_factors(const float* from, float (&to)[kPanelColumns]) {
#pragma unroll
  for (int c = 0; c < kPanelColumns; c += kQuad)
    *reinterpret_cast<float4*>(to + c) = *reinterpret_cast<const float4*>(from + c);
}

// w[c] -= err * factors[c] for the columns behind `after`.
__device__ void push_error(float err, const float (&factors)[kPanelColumns], int after,
                           float (&w)[kPanelColumns]) {
#pragma unroll
  for (int c = 0; c < kPanelColumns; ++c)
    if (c > after) w[c] = __fmaf_rn(-err, factors[c], w[c]);
}

// Columns first .. first + 15 of the block. Leaves the errors where the weights were.
template <bool kByRow>
__device__ uint4 walk_panel(const Strip& strip, int first, Panel& panel) {
  uint32_t codes[kPanelColumns / 4] = {};
#pragma unroll
  for (int c = 0; c < kPanelColumns; ++c) {
    Lane lane = panel.lane;
    if (!kByRow) {
      lane.scale = __shfl_sync(0xffffffffu, lane.scale, c);
      lane.half = __shfl_sync(0xffffffffu, lane.half, c);
    }
    alignas(16) float factors[kPanelColumns];
    load_factors(strip[first + c], factors);
    const float q = quantize(panel.w[c], lane);
    const float err = error_of(panel.w[c], q, lane, factors[c]);
    push_error(err, factors, c, panel.w);
    panel.w[c] = err;
    codes[c / 4] |= static_cast<uint32_t>(q) << (c % 4 * 8);
  }
  return {codes[0], codes[1], codes[2], codes[3]};
}

// A warp's codes of a panel, 16 adjacent bytes of two rows at a time.
__device__ void store_codes(const Work& work, int64_t warp_row, int64_t first, const uint4& mine,
                            uint4 (&staged)[kWarpThreads]) {
  const int lane = threadIdx.x % kWarpThreads;
  staged[lane] = mine;
  __syncwarp();
  const auto* bytes = reinterpret_cast<const uint8_t*>(staged);
  const MatrixView<uint8_t> codes = work.args.codes;
  const int64_t k = first + lane % kPanelColumns;
#pragma unroll
  for (int i = 0; i < kPanelColumns; ++i) {
    const int64_t row = warp_row + 2 * i + lane / kPanelColumns;
    if (row < codes.rows && k < codes.cols) codes.row(row)[k] = bytes[i * kWarpThreads + lane];
  }
}

template <bool kByRow>
__global__ void __launch_bounds__(kWalkThreads) walk_kernel(Work work, int64_t begin) {
  alignas(16) __shared__ Strip strips[2];
  __shared__ float errors[kEarlierErrors][kWalkThreads];  // a thread reads what it wrote itself
  __shared__ uint4 codes[kWalkWarps][kWarpThreads];
  const int64_t width = min(int64_t{kGptqBlockColumns}, work.args.weight.cols - begin);
  const int thread = threadIdx.x, warp = thread / kWarpThreads;
  const int64_t row = int64_t{blockIdx.x} * kWalkThreads + thread;

  fetch_strip(work, begin, 0, strips[0]);
  Panel next = load_panel<kByRow>(work, row, begin);
  for (int first = 0; first < width; first += kPanelColumns) {
    wait_copies<0>();
    __syncthreads();  // this strip is there; nobody reads the other one, nor the staged codes
    const Strip& strip = strips[first / kPanelColumns % 2];
    Panel panel = next;
    if (first + kPanelColumns < width) {
      fetch_strip(work, begin, first + kPanelColumns, strips[(first / kPanelColumns + 1) % 2]);
      next = load_panel<kByRow>(work, row, begin + first + kPanelColumns);
    }
#pragma unroll 4
    for (int j = 0; j < first; ++j) {
      alignas(16) float factors[kPanelColumns];
      load_factors(strip[j], factors);
      push_error(errors[j][thread], factors, -1, panel.w);
    }
    const uint4 mine = walk_panel<kByRow>(strip, first, panel);
#pragma unroll
    for (int c = 0; c < kPanelColumns; ++c) {
      if (first < kEarlierErrors) errors[first + c][thread] = panel.w[c];
      work.errors(first + c)[row] = panel.w[c];
    }
    store_codes(work, row - thread % kWarpThreads, begin + first, mine, codes[warp]);
  }
}

// --- push ----------------------------------------------------------------------------------------

struct Slice {
  float errors[kDepth][kTileRows];
  float factors[kDepth][kTileColumns];
};

// `from` is 16 rows of at least kWide elements, each `stride` behind the one before. Starts copies
// of kRun elements; where a run would begin behind `last`, the one at `last` comes again.
template <int kRun, int kWide>
__device__ void fetch_rows(const float* from, int64_t stride, int64_t last,
                           float (&to)[kDepth][kWide]) {
  constexpr int kRuns = kWide / kRun, kRowsAtOnce = kPushThreads / kRuns;
  const int c = threadIdx.x % kRuns * kRun, j = threadIdx.x / kRuns;
  from += j * stride + min(int64_t{c}, last);
#pragma unroll
  for (int i = 0; i < kDepth; i += kRowsAtOnce) {
    const uint32_t target = shared_address(&to[j + i][c]);
    if constexpr (kRun == kQuad) {
      copy_async_16(target, from + i * stride);
    } else {
      copy_async_4(target, from + i * stride);
    }
  }
}

// Errors j .. j + 15 of the block. Beyond n any element of hinv does: the sums are not stored.
template <int kRun>
__device__ void fetch_slice(const Work& work, int64_t begin, int j, int64_t first_row,
                            int64_t first_column, Slice& slice) {
  const MatrixView<const float> hinv = work.args.hinv;
  fetch_rows<kQuad>(work.errors(j) + first_row, work.padded_rows, kTileRows, slice.errors);
  fetch_rows<kRun>(hinv.row(begin + j) + first_column, hinv.row_stride,
                   hinv.cols - kRun - first_column, slice.factors);
  commit_copies();
}

// Where a thread's results lie in the tile: rows row + 0..3 and row + 32 + 0..3, columns column +
// 0..3 and column + 16 + 0..3. Threads i and i ^ 1 share their rows, i and i ^ 2 their columns:
// then a warp's reads of 16 bytes need the fewest passes.
struct Place {
  int row, column;

  __device__ Place() {
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    constexpr int kWarpsDown = kTileRows / kWarpRows;
    row = warp % kWarpsDown * kWarpRows + lane % 16 / 2 * kQuad;
    column = warp / kWarpsDown * kWarpColumns + (lane / 16 * 2 + lane % 2) * kQuad;
  }
};

__device__ void load_two_quads(const float* from, int apart, float (&to)[2 * kQuad]) {
  *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
  *reinterpret_cast<float4*>(to + kQuad) = *reinterpret_cast<const float4*>(from + apart);
}

__device__ void store_two_quads(const float (&from)[2 * kQuad], int apart, float* to) {
  *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
  *reinterpret_cast<float4*>(to + apart) = *reinterpret_cast<const float4*>(from + kQuad);
}

using Sums = float[2 * kQuad][2 * kQuad];  // [column][row]

__device__ void multiply_slice(const Slice& slice, Place place, Sums& sums) {
#pragma unroll
  for (int j = 0; j < kDepth; ++j) {
    alignas(16) float err[2 * kQuad], factor[2 * kQuad];
    load_two_quads(&slice.errors[j][place.row], kWarpRows / 2, err);
    load_two_quads(&slice.factors[j][place.column], kWarpColumns / 2, factor);
#pragma unroll
    for (int c = 0; c < 2 * kQuad; ++c) {
#pragma unroll
      for (int r = 0; r < 2 * kQuad; ++r) sums[c][r] = __fmaf_rn(err[r], factor[c], sums[c][r]);
    }
  }
}

// Four columns a pass: all their reads are on their way before the first value is needed.
__device__ void subtract(const Work& work, int64_t first_row, int64_t first_column, Place place,
                         const Sums& sums) {
  const int64_t n = work.args.weight.cols;
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const int64_t k = first_column + place.column + pass * (kWarpColumns / 2);
    float* from = work.column(k) + first_row + place.row;
    alignas(16) float w[kQuad][2 * kQuad];
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
      if (k + c < n) load_two_quads(from + c * work.padded_rows, kWarpRows / 2, w[c]);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
#pragma unroll
      for (int r = 0; r < 2 * kQuad; ++r) w[c][r] -= sums[pass * kQuad + c][r];
      if (k + c < n) store_two_quads(w[c], kWarpRows / 2, from + c * work.padded_rows);
    }
  }
}

// kRun: elements of hinv that are copied at once, 4 if its rows begin at multiples of 16 bytes.
template <int kRun>
__global__ void __launch_bounds__(kPushThreads, kPushBlocksPerSm)
    push_kernel(Work work, int64_t begin) {
  alignas(16) __shared__ Slice slices[2];
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t first_column = begin + kGptqBlockColumns + int64_t{blockIdx.y} * kTileColumns;
  const Place place;
  Sums sums = {};
  fetch_slice<kRun>(work, begin, 0, first_row, first_column, slices[0]);
  for (int j = 0; j < kGptqBlockColumns; j += kDepth) {
    wait_copies<0>();
    __syncthreads();  // this slice is there, and nobody reads the other one
    if (j + kDepth < kGptqBlockColumns)
      fetch_slice<kRun>(work, begin, j + kDepth, first_row, first_column,
                        slices[(j / kDepth + 1) % 2]);
    multiply_slice(slices[j / kDepth % 2], place, sums);
  }
  subtract(work, first_row, first_column, place, sums);
}

// --- launches ------------------------------------------------------------------------------------

// Columns are the y of a grid, which ends at 65535 tiles, 2 million columns: no hinv is that large.
dim3 grid_of(int64_t rows, int row_tile, int64_t columns, int column_tile) {
  return dim3(static_cast<unsigned>((rows + row_tile - 1) / row_tile),
              static_cast<unsigned>((columns + column_tile - 1) / column_tile));
}

cudaError_t copy(const Work& work, cudaStream_t stream) {
  const Grid grid = {grid_of(work.padded_rows, kCopyTile, work.args.weight.cols, kCopyTile),
                     dim3(kCopyTile, kCopyWarps)};
  return launch(copy_kernel, grid, stream, work);
}

cudaError_t walk(const Work& work, int64_t begin, cudaStream_t stream) {
  const Grid grid = {grid_of(work.padded_rows, kWalkThreads, 1, 1), dim3(kWalkThreads)};
  return launch(work.args.by_row ? walk_kernel<true> : walk_kernel<false>, grid, stream, work,
                begin);
}

bool has_aligned_rows(MatrixView<const float> matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % sizeof(float4) == 0 &&
         matrix.row_stride % kQuad == 0 && matrix.cols % kQuad == 0;
}

cudaError_t push(const Work& work, int64_t begin, cudaStream_t stream) {
  const int64_t columns = work.args.weight.cols - begin - kGptqBlockColumns;
  if (columns <= 0) return cudaSuccess;
  const Grid grid = {grid_of(work.padded_rows, kTileRows, columns, kTileColumns),
                     dim3(kPushThreads)};
  return launch(has_aligned_rows(work.args.hinv) ? push_kernel<kQuad> : push_kernel<1>, grid,
                stream, work, begin);
}

}  // namespace

cudaError_t launch_gptq(const GptqArgs& args, const GptqScratch& scratch, cudaStream_t stream) {
  if (args.weight.rows == 0) return cudaSuccess;
  const Work work{args, scratch, gptq_padded_rows(args.weight.rows)};
  cudaError_t status = args.weight.cols > 0 ? copy(work, stream) : cudaSuccess;
  for (int64_t begin = 0; begin < args.weight.cols && status == cudaSuccess;
       begin += kGptqBlockColumns) {
    status = walk(work, begin, stream);
    if (status == cudaSuccess) status = push(work, begin, stream);
  }
  return status;
}

}  // namespace adamix
