#include "common/cuda_instructions.cuh"
#include "common/cuda_launch.cuh"
#include "search_scales/search_scales_cuda.h"

// A thread block a lane, a thread a strand. The lane is read once, into shared memory if it fits;
// a thread reads there what it wrote itself. Longer ones, embeddings' columns of U, are read again
// from L2 or global memory in every pass, 3 over the entries for all candidates and one for each
// refinement:
//
//   measure      largest magnitude, sum of magnitudes -> 32 candidates, one a thread of warp 0
//   scan, twice  16 candidates, their sums in registers: 6 instructions an entry and candidate, and
//                what bounds the time is how many a multiprocessor can issue
//   refine       error, drift and power at one scale: at most 6 times
//
// Between passes every warp sums the warps' sums itself, in the same order, and comes to the same
// decision: one barrier a pass.
namespace adamix {
namespace {

constexpr int kThreads = kScaleStrands;
constexpr int kWarpThreads = 32;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kAtOnce = 16;      // candidates: 2 registers each, all sums of a scan are under way
constexpr int kBlocksPerSm = 4;  // leaves a thread 64 registers
static_assert(kScaleRun == kWarpThreads, "a warp sums a run");
static_assert(kScaleCandidates == kWarpThreads, "a thread of a warp a candidate");

// In front of the entries, both dynamic.
struct alignas(16) Shared {
  float largest[kWarps];
  float magnitudes[kWarps];
  float candidates[kScaleCandidates];
  float inverses[kScaleCandidates];
  float errors[kWarps][kScaleCandidates];
  float4 levels[2][kWarps];  // error, drift, power; a pass writes while others read of the last
};

// A thread's own entries of a lane.
template <bool kOnChip>
struct Entries {
  const float* values;   // entry k is values[k * kThreads]
  const float* weights;  // likewise, always in global memory
  int count;
  float last;  // last_sum of the lane's top level

  __device__ float magnitude(int k) const { return fabsf(values[int64_t{k} * kThreads]); }
  __device__ float weight(int k) const { return __ldg(weights + int64_t{k} * kThreads); }
};

struct Rounded {
  float level, residual;
};

__device__ __forceinline__ Rounded round_to_level(float magnitude, float inverse, float last) {
  const float sum = __fmaf_rn(magnitude, inverse, kLevelShift);
  const float level = fminf(fmaxf(sum, kFirstSum), last) - kLevelShift;
  return {level, __fmaf_rn(magnitude, inverse, -level)};
}

// --- sums of a warp ------------------------------------------------------------------------------

// All threads' sums of kLeft things, added as ORDER in search_scales.h says: sum i is then sums[0]
// of the threads from i * 32 / kLeft on. While several are left, a thread gives half of its own
// away.
template <int kLeft, int kApart = kWarpThreads / 2>
__device__ __forceinline__ void sum_warp(float* sums) {
  constexpr int kKept = kLeft > 1 ? kLeft / 2 : 1;
  if constexpr (kLeft == 1) {
    sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], kApart);
  } else {
    const bool upper = threadIdx.x & kApart;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float given = upper ? sums[i] : sums[i + kKept];
      const float kept = upper ? sums[i + kKept] : sums[i];
      sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, kApart);
    }
  }
  if constexpr (kApart > 1) sum_warp<kKept, kApart / 2>(sums);
}

__device__ __forceinline__ float sum_in_order(const float* first, int apart) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += first[warp * apart];
  return sum;
}

// --- passes over the entries ---------------------------------------------------------------------

// Reads the lane, onto the chip where it stays there.
template <bool kOnChip>
__device__ Entries<kOnChip> measure(const SearchScalesArgs& args, float* entries, Shared& shared) {
  const float* row = args.lanes.row(blockIdx.x) + threadIdx.x;
  const auto count = static_cast<int>((args.lanes.cols + kThreads - 1 - threadIdx.x) / kThreads);
  float largest = 0.0f, sum = 0.0f;
#pragma unroll 8
  for (int k = 0; k < count; ++k) {
    const float value = row[int64_t{k} * kThreads], magnitude = fabsf(value);
    if constexpr (kOnChip) entries[int64_t{k} * kThreads + threadIdx.x] = magnitude;
    largest = fmaxf(largest, magnitude);
    sum += magnitude;
  }
#pragma unroll
  for (int apart = kWarpThreads / 2; apart > 0; apart /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
  sum_warp<1>(&sum);
  if (threadIdx.x % kWarpThreads == 0) {
    shared.largest[threadIdx.x / kWarpThreads] = largest;
    shared.magnitudes[threadIdx.x / kWarpThreads] = sum;
  }
  const float last = last_sum(top_level(args.bits[blockIdx.x]));
  return {kOnChip ? entries + threadIdx.x : row, args.weights + threadIdx.x, count, last};
}

// Errors of candidates first .. first + 15.
template <bool kOnChip, bool kWeighted>
__device__ void scan(const Entries<kOnChip>& entries, int first, Shared& shared) {
  float inverses[kAtOnce], errors[kAtOnce];
#pragma unroll
  for (int c = 0; c < kAtOnce; ++c) inverses[c] = shared.inverses[first + c], errors[c] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < entries.count; ++k) {
    const float magnitude = entries.magnitude(k), weight = kWeighted ? entries.weight(k) : 1.0f;
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const float residual = round_to_level(magnitude, inverses[c], entries.last).residual;
      const float weighted = kWeighted ? __fmul_rn(residual, weight) : residual;
      errors[c] = __fmaf_rn(weighted, residual, errors[c]);
    }
  }
  sum_warp<kAtOnce>(errors);
  const int thread = threadIdx.x % kWarpThreads;
  constexpr int kHolders = kWarpThreads / kAtOnce;
  if (thread % kHolders == 0)
    shared.errors[threadIdx.x / kWarpThreads][first + thread / kHolders] = errors[0];
}

// `pass` counts the calls.
template <bool kOnChip, bool kWeighted>
__device__ LevelSums levels_at(const Entries<kOnChip>& entries, float scale, int pass,
                               Shared& shared) {
  const float inverse = 1.0f / scale;
  float sums[4] = {};
#pragma unroll 4
  for (int k = 0; k < entries.count; ++k) {
    const Rounded rounded = round_to_level(entries.magnitude(k), inverse, entries.last);
    const float weight = kWeighted ? entries.weight(k) : 1.0f;
    const float weighted = kWeighted ? __fmul_rn(rounded.residual, weight) : rounded.residual;
    const float power = kWeighted ? __fmul_rn(rounded.level, weight) : rounded.level;
    sums[0] = __fmaf_rn(weighted, rounded.residual, sums[0]);
    sums[1] = __fmaf_rn(weighted, rounded.level, sums[1]);
    sums[2] = __fmaf_rn(power, rounded.level, sums[2]);
  }
  sum_warp<4>(sums);
  float4* all = shared.levels[pass % 2];
  const int thread = threadIdx.x % kWarpThreads;
  if (thread % 8 == 0)
    reinterpret_cast<float*>(all + threadIdx.x / kWarpThreads)[thread / 8] = sums[0];
  __syncthreads();
  LevelSums levels;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float4 part = all[warp];
    levels.error += part.x, levels.drift += part.y, levels.power += part.z;
  }
  return levels;
}

// --- one lane ------------------------------------------------------------------------------------

// Only warp 0: few units compute a power in fp64.
__device__ void make_candidates(const SearchScalesArgs& args, Shared& shared) {
  if (threadIdx.x >= kWarpThreads) return;
  float largest = 0.0f;
  for (const float of_warp : shared.largest) largest = fmaxf(largest, of_warp);
  const float sum = sum_in_order(shared.magnitudes, 1);
  const float scale =
      candidate_scale(largest, sum, args.lanes.cols, top_level(args.bits[blockIdx.x]), threadIdx.x);
  shared.candidates[threadIdx.x] = scale;
  shared.inverses[threadIdx.x] = 1.0f / scale;
}

// The first of the best candidates; the widest where none has an error. Every warp finds it.
__device__ float best_candidate(const Shared& shared, float widest) {
  int i = threadIdx.x % kWarpThreads;
  const float sum = sum_in_order(&shared.errors[0][i], kScaleCandidates);
  float error = comparable_error(sum, shared.candidates[i], widest);
  if (!(error < INFINITY)) error = INFINITY, i = kScaleCandidates - 1;
#pragma unroll
  for (int apart = kWarpThreads / 2; apart > 0; apart /= 2) {
    const float other_error = __shfl_xor_sync(0xffffffffu, error, apart);
    const int other = __shfl_xor_sync(0xffffffffu, i, apart);
    if (other_error < error || (other_error == error && other < i)) error = other_error, i = other;
  }
  return shared.candidates[i];
}

template <bool kOnChip, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    search_scales_kernel(const __grid_constant__ SearchScalesArgs args) {
  auto& shared = *static_cast<Shared*>(dynamic_shared());
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Entries<kOnChip> entries =
      measure<kOnChip>(args, reinterpret_cast<float*>(&shared + 1), shared);
  __syncthreads();
  make_candidates(args, shared);
  __syncthreads();
#pragma unroll 1
  for (int first = 0; first < kScaleCandidates; first += kAtOnce)
    scan<kOnChip, kWeighted>(entries, first, shared);
  __syncthreads();
  const float widest = shared.candidates[kScaleCandidates - 1];
  float scale = best_candidate(shared, widest), best = scale, least = INFINITY;
  for (int pass = 0; pass <= kScaleRefinements && is_usable_scale(scale); ++pass) {
    const LevelSums levels = levels_at<kOnChip, kWeighted>(entries, scale, pass, shared);
    const float error = comparable_error(levels.error, scale, widest);
    if (!(error < least)) break;
    best = scale, least = error;
    scale = fitted_scale(scale, levels);
  }
  if (threadIdx.x == 0) args.scales[blockIdx.x] = best;
}

// --- launcher ------------------------------------------------------------------------------------

template <bool kOnChip>
cudaError_t launch_for(const SearchScalesArgs& args, size_t shared_bytes, const Device& device,
                       cudaStream_t stream) {
  const Grid grid = {dim3(static_cast<unsigned>(args.lanes.rows)), dim3(kThreads), shared_bytes};
  return launch_overlapped(args.weights != nullptr ? search_scales_kernel<kOnChip, true>
                                                   : search_scales_kernel<kOnChip, false>,
                           grid, device, stream, args);
}

}  // namespace

cudaError_t launch_search_scales(const SearchScalesArgs& args, cudaStream_t stream) {
  if (args.lanes.rows == 0) return cudaSuccess;
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const size_t whole = sizeof(Shared) + static_cast<size_t>(args.lanes.cols) * sizeof(float);
  return whole <= static_cast<size_t>(device.shared_bytes)
             ? launch_for<true>(args, whole, device, stream)
             : launch_for<false>(args, sizeof(Shared), device, stream);
}

}  // namespace adamix
