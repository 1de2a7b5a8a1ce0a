#include <algorithm>

#include "common/cuda_launch.cuh"
#include "delta_embedding/delta_embedding_cuda.h"
#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_up_product.cuh"

// y += w V, w = U_level[token, :] · scale. Tokens go in slices of up to 128, and each slice is the
// second half of a delta_gemm of few tokens, with w for z and V for U:
//
//   route    slots, -1 where nothing is added         once for all tokens
//   gather   w, in the places of z                    a warp: a run of components of a token
//   up       y += V w                                 few_tokens_up.cu
//
// gather reads one block of each lane of U, 4 b bytes: sectors that no other token needs, so they
// come straight from memory, all at once. What takes time is V, which up reads once for every two
// tokens of a slot.
//
// Kernels overlap. gather lets the next one start once route is complete: so up may read the slots
// before it waits for gather.
namespace adamix {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Thread blocks of a token: enough for 2048 components at once, which no delta here has; with more
// of them warps take several runs. The most that a slot may have is far above what it has.
constexpr int64_t kMaxBlocks = 16;

bool has_work(const DeltaEmbeddingCudaArgs& args) {
  return args.token_count > 0 && args.hidden > 0 && args.vocab > 0 && args.max_rank > 0;
}

// slots[t] where the token is in the vocabulary and the slot in the table, else -1.
__global__ void __launch_bounds__(kThreads)
    route_kernel(const __grid_constant__ DeltaEmbeddingCudaArgs args, int32_t* slots) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= args.token_count) return;
  const int64_t token = args.tokens[t];
  const int slot = args.slots[t];
  const bool adds = token >= 0 && token < args.vocab && slot >= 0 && slot < args.capacity;
  slots[t] = adds ? slot : -1;
}

// The level at a row of lane `lane` of a run.
__device__ int level_at(const Factor& factor, const Run& run, int lane, int row) {
  const int panel = row / kPanelCodes, block = row % kPanelCodes / kBlockCodes;
  const int bits = run.bits();
  const uint32_t* words = factor.at(panel, run.before + lane * bits) + block * bits;
  int value = 0;
  for_width(bits, [&](auto width) {  // the same in all lanes; a constant, so that loads overlap
    constexpr int kBits = decltype(width)::value;
    value = level(read_code(words, row % kBlockCodes, kBits), kBits);
  });
  return value;
}

// w of a slice, args being those of its up: fp32 [tokens, positions], zeros in the padding behind
// the components of every width of V.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ DeltaGemmCudaArgs args, TokenIds tokens, int64_t vocab) {
  wait_for_previous_kernel();
  let_next_kernel_start();  // only now: up reads the slots early
  const int token = blockIdx.y, slot = args.routes.slots[token];
  if (slot < 0) return;
  const Entry entry = load_entry(args, 0, slot);
  if (entry.rank == 0) return;
  const Factor u = make_factor(args.arena + entry.down.offset, entry.down.counts, vocab);
  const auto* scales = reinterpret_cast<const float*>(args.arena + entry.scale_offset);
  const int row = static_cast<int>(tokens[token]), lane = threadIdx.x % 32;
  float* w = static_cast<float*>(args.scratch) + z_row(args, 0, token);
  const int runs = UpRuns::count(entry.down.counts), step = gridDim.x * kWarps;
  for (int i = blockIdx.x * kWarps + threadIdx.x / 32; i < runs; i += step) {
    const Run run = UpRuns::at(entry.down.counts, i);
    if (lane >= run.lanes()) continue;
    const int component = run.component + lane;
    put_z(w, entry, component, scales[component] * static_cast<float>(level_at(u, run, lane, row)));
  }
}

// --- launcher ----------------------------------------------------------------------------------

// Of `count` tokens from `first` on; slots as route leaves them.
DeltaGemmCudaArgs up_args(const DeltaEmbeddingCudaArgs& args, int64_t first, int64_t count,
                          const int32_t* slots) {
  const int64_t element_bytes = args.element == Element::kFloat ? 4 : 2;
  DeltaGemmCudaArgs up = {};
  up.layers[0] = {static_cast<char*>(args.y) + first * args.y_row_stride * element_bytes,
                  args.y_row_stride, args.hidden, args.table};
  up.layer_count = 1;
  up.element = args.element;
  up.tokens = count;
  up.arena = args.arena;
  up.capacity = args.capacity;
  up.routes.slots = slots + first;
  up.max_rank = args.max_rank;
  up.scratch = args.scratch;
  up.up_by_v = true;
  return up;
}

TokenIds from(const TokenIds& tokens, int64_t first) {
  return {static_cast<const char*>(tokens.data) + first * (tokens.wide ? 8 : 4), tokens.wide};
}

// Behind w of a slice come the slots of all tokens.
size_t w_bytes(const DeltaEmbeddingCudaArgs& args) {
  const int64_t tokens = std::min<int64_t>(args.token_count, kFewTokens);
  return few_tokens_scratch_bytes(up_args(args, 0, tokens, nullptr));
}

}  // namespace

size_t delta_embedding_scratch_bytes(const DeltaEmbeddingCudaArgs& args) {
  return has_work(args) ? w_bytes(args) + static_cast<size_t>(args.token_count) * 4 : 0;
}

cudaError_t launch_delta_embedding(const DeltaEmbeddingCudaArgs& args, cudaStream_t stream) {
  if (!has_work(args)) return cudaSuccess;
  Device device;
  cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  auto* slots = reinterpret_cast<int32_t*>(static_cast<char*>(args.scratch) + w_bytes(args));
  const Grid route = {dim3(static_cast<unsigned>((args.token_count + kThreads - 1) / kThreads)),
                      kThreads};
  status = launch_overlapped(route_kernel, route, device, stream, args, slots);
  const int64_t most_runs = args.max_rank / UpRuns::lanes_of(kMaxBits) + kMaxBits;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>((most_runs + kWarps - 1) / kWarps, kMaxBlocks));
  for (int64_t first = 0; first < args.token_count && status == cudaSuccess; first += kFewTokens) {
    const int64_t count = std::min<int64_t>(args.token_count - first, kFewTokens);
    const DeltaGemmCudaArgs up = up_args(args, first, count, slots);
    const Grid gather = {dim3(blocks, static_cast<unsigned>(count)), kThreads};
    status = launch_overlapped(gather_kernel, gather, device, stream, up, from(args.tokens, first),
                               args.vocab);
    if (status == cudaSuccess) status = launch_few_tokens_up(up, stream);
  }
  return status;
}

}  // namespace adamix
