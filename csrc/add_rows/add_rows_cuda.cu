#include <algorithm>

#include "add_rows/add_rows_cuda.h"
#include "common/cuda_instructions.cuh"
#include "common/cuda_launch.cuh"
#include "delta_gemm/elements.cuh"

// One launch for all ys. A row of values is cut where the ys are, and each part into chunks of 8
// columns, the last of a part perhaps shorter:
//
//   values[slot]   | 0 1 2 .. 7 | 8 .. 15 | 16 17 | 18 .. 25 | 26 .. 33 |
//                  \__________ ys[0] ____________/ \______ ys[1] ______/
//   chunk               0            1        2         3          4
//   ys[i][t]         += 8            8        2         8          8
//
//   blockIdx.x, threadIdx.x    a chunk
//   blockIdx.y                 a token, and those that many further on
//
// A thread reads its token's slot, 16 bytes at a time what lies where 16 bytes may be read, adds,
// and writes back. Where the slot is the base's it reads no more.
namespace adamix {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 8;
constexpr int64_t kMaxGridRows = 65535;

struct Part {
  RowTarget y;
  int64_t first;        // its columns of values, from here on
  int64_t first_chunk;  // its chunks, likewise
  bool vector_y, vector_values;
};

struct AddRowsPlan {
  Part parts[kMaxRowTargets];
  int part_count;
  int64_t chunks;
};

__device__ __forceinline__ const Part& part_of(const AddRowsPlan& plan, int64_t chunk) {
  int part = 0;
#pragma unroll
  for (int i = 1; i < kMaxRowTargets; ++i) {
    if (i < plan.part_count && chunk >= plan.parts[i].first_chunk) part = i;
  }
  return plan.parts[part];
}

template <typename T>
__device__ __noinline__ void store_singly(T* y, const Eight<T>& sums, int count) {
#pragma unroll 1
  for (int j = 0; j < count; ++j) y[j] = reinterpret_cast<const T*>(&sums)[j];
}

// Eight adjacent elements, 16 bytes at a time by name: nvcc would take some of them in pieces.
template <typename T>
__device__ __forceinline__ Eight<T> load_vector(const T* data) {
  Eight<T> eight;
#pragma unroll
  for (int j = 0; j < Eight<T>::kWords; j += 4) {
    const uint4 four = __ldcg(reinterpret_cast<const uint4*>(data) + j / 4);
    eight.words[j] = four.x, eight.words[j + 1] = four.y;
    eight.words[j + 2] = four.z, eight.words[j + 3] = four.w;
  }
  return eight;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* data, const Eight<T>& eight) {
  const uint32_t* words = eight.words;
#pragma unroll
  for (int j = 0; j < Eight<T>::kWords; j += 4) {
    __stcg(reinterpret_cast<uint4*>(data) + j / 4,
           make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]));
  }
}

// Zeros behind the last of `count`.
template <typename T>
__device__ __forceinline__ Eight<T> load(const T* data, int count, bool vector) {
  if (vector && count == kChunk) return load_vector(data);
  Eight<T> eight;
  eight.load(data, 0, count, false);
  return eight;
}

// y[0 .. count), 1 to 8 elements, += values.
template <typename T>
__device__ __forceinline__ void add_chunk(T* y, const float* values, int count, bool vector_y,
                                          bool vector_values) {
  const Eight<float> own = load(values, count, vector_values);
  const Eight<T> before = load<T>(y, count, vector_y);
  Eight<T> after;
#pragma unroll
  for (int j = 0; j < kChunk; j += 2) {
    const float low = before.value(j) + own.value(j);
    const float high = before.value(j + 1) + own.value(j + 1);
    if constexpr (std::is_same_v<T, float>) {
      after.words[j] = __float_as_uint(low), after.words[j + 1] = __float_as_uint(high);
    } else {
      after.words[j / 2] = round_pair<T>(low, high);
    }
  }
  if (vector_y && count == kChunk) {
    store_vector(y, after);
  } else {
    const Eight<T> copy = after;  // so that the one above can stay in registers
    store_singly(y, copy, count);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_rows_kernel(const __grid_constant__ AddRowsCudaArgs args,
                    const __grid_constant__ AddRowsPlan plan) {
  const int64_t chunk = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const Part part = part_of(plan, chunk);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (chunk >= plan.chunks) return;
  const int64_t column = (chunk - part.first_chunk) * kChunk;
  const int count = static_cast<int>(min(part.y.width - column, int64_t{kChunk}));
  for (int64_t token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    const int slot = args.slots[token];
    if (slot < 0 || slot >= args.values.rows) continue;
    add_chunk(static_cast<T*>(part.y.data) + token * part.y.row_stride + column,
              args.values.row(slot) + part.first + column, count, part.vector_y,
              part.vector_values);
  }
}

// --- launcher ----------------------------------------------------------------------------------

// Whether every row begins where 16 bytes may be read; chunks are 16 bytes, or 32, apart.
bool in_vectors(const void* data, int64_t row_stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * element_bytes % 16 == 0;
}

AddRowsPlan plan_of(const AddRowsCudaArgs& args) {
  const int64_t element_bytes = args.element == Element::kFloat ? 4 : 2;
  AddRowsPlan plan = {};
  int64_t first = 0;
  for (int i = 0; i < args.y_count; ++i) {
    const RowTarget& y = args.ys[i];
    if (y.width == 0) continue;
    plan.parts[plan.part_count++] = {
        y, first, plan.chunks, in_vectors(y.data, y.row_stride, element_bytes),
        in_vectors(args.values.data + first, args.values.row_stride, sizeof(float))};
    first += y.width;
    plan.chunks += (y.width + kChunk - 1) / kChunk;
  }
  return plan;
}

template <typename T>
cudaError_t launch_for(const AddRowsCudaArgs& args, const AddRowsPlan& plan, cudaStream_t stream) {
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const auto rows = static_cast<unsigned>(std::min(args.tokens, kMaxGridRows));
  const auto blocks = static_cast<unsigned>((plan.chunks + kThreads - 1) / kThreads);
  return launch_overlapped(add_rows_kernel<T>, {dim3(blocks, rows), kThreads}, device, stream, args,
                           plan);
}

}  // namespace

cudaError_t launch_add_rows(const AddRowsCudaArgs& args, cudaStream_t stream) {
  const AddRowsPlan plan = plan_of(args);
  if (args.tokens == 0 || args.values.rows == 0 || plan.chunks == 0) return cudaSuccess;
  switch (args.element) {
    case Element::kHalf: return launch_for<__half>(args, plan, stream);
    case Element::kBFloat16: return launch_for<__nv_bfloat16>(args, plan, stream);
    default: return launch_for<float>(args, plan, stream);
  }
}

}  // namespace adamix
