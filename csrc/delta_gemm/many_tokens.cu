#include <algorithm>
#include <limits>

#include "common/cuda_launch.cuh"
#include "delta_gemm/many_tokens.cuh"
#include "delta_gemm/many_tokens_results.cuh"

// delta_gemm where many tokens share a delta: arithmetic bounds the time, so codes are turned into
// 16-bit levels once a tile and multiplied on the tensor cores. Four kernels:
//
//   sort   tokens by slot, cut into tiles of 256 (128) of one slot
//   down   z = scale · V x     256 tokens times 128 components, a part of the inputs each
//   join   z = scale · sum over the parts                    (where there is more than one part)
//   up     y += U z            256 tokens times 128 outputs, all components
//
// down and up are persistent: a thread block goes from product to product, its producer warps ahead
// of its consumers (many_tokens_pipeline.cuh). Products of the last round have half of the tokens
// if that keeps more thread blocks at work: where tokens share one slot, up has few products. z is
// rounded once to bf16: it is an operand of the second product, and lies in memory as up's tiles
// will in shared memory (tile_product.cuh):
//
//   z   [layers, z_width / 64, sorted tokens, 64], the chunks of line l of a tile exchanged by l
//
// Kernels overlap. down lets the next one start once the sort is complete: so join and up may read
// what the sort wrote before they wait for the kernel before them.
namespace adamix {
namespace {

constexpr int kJoinThreads = 256;
constexpr int kJoinTokens = 2;  // of a tile, a thread block at a time

struct ManyTokensArgs {
  DeltaGemmCudaArgs call;
  SortedTokens sorted;
  int shared_bytes;  // of the pipelines
  int parts;         // of the inputs
  int row_tiles;     // of the layer with most outputs
  int64_t z_width;   // a multiple of kTileRows
  uint16_t* z;       // bf16, see above
  float* z_parts;    // [parts, layers, tokens, z_width]; only if parts > 1

  // Numbers from 64 components of z to the next 64.
  __device__ int64_t z_step() const { return call.tokens * kStepCodes; }
  // Where the 64 components around one begin, of a tile whose first token is this one.
  __device__ uint16_t* tile_of_z(int layer, int component, int first_token) const {
    const int64_t step = layer * (z_width / kStepCodes) + component / kStepCodes;
    return z + step * z_step() + int64_t{first_token} * kStepCodes;
  }
  // Where a sorted token's row begins in every part.
  __device__ int64_t row_of_part(int layer, int sorted_token) const {
    return (layer * call.tokens + sorted_token) * z_width;
  }
  __device__ int64_t part_size() const { return call.layer_count * call.tokens * z_width; }
};

// Works, one for each thread block in a round. Where the last round would leave half of the thread
// blocks idle, its works are cut: each thread block has the tokens of one consumer group.
class Rounds {
 public:
  __device__ explicit Rounds(unsigned works) {
    const unsigned last = works % gridDim.x;
    whole_ = last * kConsumers <= gridDim.x ? works - last : works;
    count_ = whole_ + (works - whole_) * kConsumers;
  }

  __device__ unsigned count() const { return count_; }
  __device__ unsigned work(unsigned i) const {
    return i < whole_ ? i : whole_ + (i - whole_) / kConsumers;
  }
  // First of its tokens in the tile, and how many there are at most.
  __device__ int first_token(unsigned i) const {
    return i < whole_ ? 0 : (i - whole_) % kConsumers * kProductTokens;
  }
  __device__ int tokens(unsigned i) const { return i < whole_ ? kTileTokens : kProductTokens; }

 private:
  unsigned whole_, count_;
};

// The products of one thread block, in an order in which those that share weights are neighbours.
// each(product) for all.
template <bool kUp, typename Each>
__device__ void for_products(const ManyTokensArgs& args, Each each) {
  const DeltaGemmCudaArgs& call = args.call;
  const unsigned tiles = *args.sorted.tile_count, layers = call.layer_count;
  const unsigned parts = kUp ? 1 : args.parts;
  const unsigned row_tiles = kUp ? args.row_tiles : static_cast<unsigned>(args.z_width / kTileRows);
  const Rounds rounds(row_tiles * parts * layers * tiles);
  for (unsigned i = blockIdx.x; i < rounds.count(); i += gridDim.x) {
    const unsigned work = rounds.work(i), above = work / tiles;
    const TokenTile tile = args.sorted.tiles[work % tiles];
    const int layer = above % layers, part = above / layers % parts;
    const DeltaLayer& matrix = call.layers[layer];
    const Entry entry = load_entry(call, layer, tile.slot);
    Product product;
    product.first_token = tile.first + rounds.first_token(i);
    product.tokens = min(tile.count - rounds.first_token(i), rounds.tokens(i));
    if (product.tokens <= 0) continue;
    product.first_row = above / layers / parts * kTileRows;
    if (product.first_row >= (kUp && entry.rank > 0 ? matrix.out : entry.rank)) continue;
    const EntryFactor& factor = kUp ? entry.up : entry.down;
    product.counts = factor.counts;
    product.rank = entry.rank;
    const int k = kUp ? entry.rank : static_cast<int>(call.in);
    const unsigned steps = (k + kStepCodes - 1) / kStepCodes;
    product.first_step = steps * part / parts;
    product.last_step = steps * (part + 1) / parts;
    product.factor =
        make_factor(call.arena + factor.offset, factor.counts, kUp ? matrix.out : call.in);
    product.layer = layer;
    product.part = part;
    product.scale_offset = entry.scale_offset;
    each(product);
  }
}

// Consumers have most of the registers: their sums.
constexpr int kProducerRegisters = 88, kConsumerRegisters = 168;
static_assert((kProducers * kProducerRegisters + kConsumers * kConsumerRegisters) * kGroupThreads <=
                  65536,
              "there are no more");

// Not before all is prepared that can be: meanwhile the code and the arguments come.
__device__ void wait_for_sort() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

template <typename T>
__device__ void produce_down(const ManyTokensArgs& args, const Stages& stages, int group) {
  const DeltaGemmCudaArgs& call = args.call;
  const int64_t bytes = call.x_row_stride * 2;
  const bool aligned = reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && bytes % 16 == 0 &&
                       call.tokens * (bytes / 16) < int64_t{1} << 32;
  const XRows x = {static_cast<const char*>(call.x),
                   bytes,
                   static_cast<int>(call.in),
                   args.sorted.order,
                   call.tokens,
                   aligned};
  Producer<T, false> producer(stages, group);
  wait_for_sort();
  for_products<false>(args, [&](const Product& product) { producer.run(product, x); });
  producer.finish();
}

template <typename T>
__device__ void consume_down(const ManyTokensArgs& args, const Stages& stages, int group) {
  using Down = Consumer<T, false>;
  wait_for_sort();
  Down(stages, group).run([&](const Task& task) {
    const int64_t at = args.row_of_part(task.layer, task.first_token) + task.first_row;
    const float* scales = reinterpret_cast<const float*>(args.call.arena + task.scale_offset);
    return StoreZ<typename Down::Sums>{
        args.parts == 1 ? args.tile_of_z(task.layer, task.first_row, task.first_token) : nullptr,
        args.z_parts + task.part * args.part_size() + at,
        args.z_step(),
        static_cast<int>(args.z_width),
        task.tokens,
        scales + task.first_row,
        task.rank - task.first_row,
        stages.behind().scales[group],
        group};
  });
}

// The same in all lanes, and by the shuffle the compiler knows it.
__device__ int group_of_warp() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / kGroupThreads), 0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ ManyTokensArgs args) {
  const Stages stages(args.shared_bytes);
  stages.begin();
  const int group = group_of_warp();
  if (group < kProducers) {
    give_registers<kProducerRegisters>();
    produce_down<T>(args, stages, group);
  } else {
    take_registers<kConsumerRegisters>();
    consume_down<T>(args, stages, group - kProducers);
  }
}

// z of eight components of a token, which begin there in every part.
__device__ uint4 join_parts(const ManyTokensArgs& args, int64_t at, const float (&scales)[8]) {
  EightSums sums = {};
#pragma unroll 8
  for (int part = 0; part < args.parts; ++part) {
    const float* z = args.z_parts + part * args.part_size() + at;
    const auto low = *reinterpret_cast<const float4*>(z);
    const auto high = *reinterpret_cast<const float4*>(z + kPartHalf);
    sums.at[0] += low.x, sums.at[1] += low.y, sums.at[2] += low.z, sums.at[3] += low.w;
    sums.at[4] += high.x, sums.at[5] += high.y, sums.at[6] += high.z, sums.at[7] += high.w;
  }
  return scale_eight(sums, scales);
}

// z = scale · sum of the parts, in their order. A thread has eight components of a token.
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(const __grid_constant__ ManyTokensArgs args) {
  let_next_kernel_start();
  const DeltaGemmCudaArgs& call = args.call;
  constexpr unsigned kRuns = kTileTokens / kJoinTokens;  // of tokens of a tile
  const unsigned tiles = *args.sorted.tile_count;
  for (unsigned work = blockIdx.x; work < tiles * kRuns * call.layer_count; work += gridDim.x) {
    const TokenTile tile = args.sorted.tiles[work / kRuns % tiles];
    const int layer = work / kRuns / tiles, first = work % kRuns * kJoinTokens;
    if (first >= tile.count) continue;
    const Entry entry = load_entry(call, layer, tile.slot);
    const auto* all_scales = reinterpret_cast<const float*>(call.arena + entry.scale_offset);
    const int eights = (entry.rank + kStepCodes - 1) / kStepCodes * (kStepCodes / 8);
    const int tokens = min(kJoinTokens, tile.count - first);
    const int64_t row = args.row_of_part(layer, tile.first + first);
    for (int i = threadIdx.x; i < eights * tokens; i += kJoinThreads) {
      const int component = i % eights * 8;
      float scales[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        scales[j] = component + j < entry.rank ? all_scales[component + j] : 0.0f;
      }
      wait_for_previous_kernel();
      const int64_t at = row + i / eights * args.z_width + at_in_part(component);
      uint16_t* z = args.tile_of_z(layer, component, tile.first) +
                    8 * chunk_of(first + i / eights, component % kStepCodes / 8);
      *reinterpret_cast<uint4*>(z) = join_parts(args, at, scales);
    }
  }
  wait_for_previous_kernel();
}

__device__ void produce_up(const ManyTokensArgs& args, const Stages& stages, int group) {
  Producer<__nv_bfloat16, true> producer(stages, group);
  for_products<true>(args, [&](const Product& product) {
    const auto* z = reinterpret_cast<const char*>(args.tile_of_z(product.layer, 0, 0));
    producer.run(product, {z, args.z_step() * 2});
  });
  producer.finish();
}

template <typename T>
__device__ void consume_up(const ManyTokensArgs& args, const Stages& stages, int group) {
  using Up = Consumer<__nv_bfloat16, true>;
  Up(stages, group).run([&](const Task& task) {
    return AddToY<T, typename Up::Sums>{args.call.layers[task.layer],
                                        args.sorted.order + task.first_token,
                                        args.call.tokens,
                                        task.tokens,
                                        task.first_row,
                                        group};
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    up_kernel(const __grid_constant__ ManyTokensArgs args) {
  let_next_kernel_start();
  const Stages stages(args.shared_bytes);
  stages.begin();
  const int group = group_of_warp();
  if (group < kProducers) {
    give_registers<kProducerRegisters>();
    produce_up(args, stages, group);
  } else {
    take_registers<kConsumerRegisters>();
    consume_up<T>(args, stages, group - kProducers);
  }
}

__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                const __grid_constant__ SortTarget target) {
  __shared__ int2 warp_sums[kSortThreads / 32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  auto* counters = static_cast<int*>(dynamic_shared());
  if (args.routes.slots == nullptr) {
    cut_segments(args, target, warp_sums);
  } else if (args.tokens <= kSortThreads) {
    sort_by_slots<true>(args, target, counters, warp_sums);
  } else {
    sort_by_slots<false>(args, target, counters, warp_sums);
  }
}

// --- launcher ----------------------------------------------------------------------------------

// Scratch, piece by piece, each aligned to 256 bytes.
struct Scratch {
  size_t order, tile_count, z, z_parts, bytes;
  int max_tiles, parts;
  int64_t z_width;
};

// Into how many parts down cuts the inputs, so that its products fill the multiprocessors and end
// together. What a part costs the join is counted in steps of a product as well; all of it is an
// estimate, of tokens that share few slots.
int choose_parts(const DeltaGemmCudaArgs& args, int64_t z_width, int multiprocessors) {
  constexpr int64_t kJoinSteps = 5, kBytesOfStep = 2 << 20, kLeastSteps = 8, kMostProducts = 4;
  // 1024 components are what a 7B model's matrices have at one bit a weight.
  const int64_t tiles = (args.tokens + 2 * kLeastTileTokens - 1) / (2 * kLeastTileTokens) *
                        args.layer_count * std::min<int64_t>(z_width / kTileRows, 8);
  const int64_t steps = (args.in + kStepCodes - 1) / kStepCodes;
  const int64_t part_bytes = args.layer_count * args.tokens * std::min<int64_t>(z_width, 1024) * 4;
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t parts = 1; parts == 1 || parts <= steps / kLeastSteps; ++parts) {
    if (parts > 1 && tiles * parts > kMostProducts * multiprocessors) break;
    const int64_t waves = (tiles * parts + multiprocessors - 1) / multiprocessors;
    const int64_t join = parts > 1 ? kJoinSteps + parts * part_bytes / kBytesOfStep : 0;
    const int64_t cost = waves * ((steps + parts - 1) / parts) + join;
    if (cost < least) best = parts, least = cost;
  }
  return static_cast<int>(best);
}

Scratch divide_scratch(const DeltaGemmCudaArgs& args, int multiprocessors) {
  Scratch scratch = {};
  const auto take = [&](int64_t bytes) {
    const size_t at = scratch.bytes;
    scratch.bytes += static_cast<size_t>((bytes + 255) / 256 * 256);
    return at;
  };
  const int64_t slots = args.routes.slots != nullptr ? args.capacity : args.routes.segments;
  scratch.max_tiles =
      static_cast<int>(args.tokens / kLeastTileTokens + std::min(args.tokens, slots) + 1);
  scratch.z_width = (args.max_rank + kTileRows - 1) / kTileRows * kTileRows;
  scratch.parts = choose_parts(args, scratch.z_width, multiprocessors);
  scratch.order = take(args.tokens * 4);
  // The first tiles come with their number.
  scratch.tile_count = take(4 + int64_t{scratch.max_tiles} * int64_t{sizeof(TokenTile)});
  const int64_t z = args.layer_count * args.tokens * scratch.z_width;
  scratch.z = take(z * 2);
  scratch.z_parts = take(scratch.parts > 1 ? z * 4 * scratch.parts : 0);
  return scratch;
}

}  // namespace

size_t many_tokens_scratch_bytes(const DeltaGemmCudaArgs& args) {
  Device device;
  if (current_device(device) != cudaSuccess) return 0;  // the launch will say so
  return divide_scratch(args, device.multiprocessors).bytes;
}

cudaError_t launch_many_tokens(const DeltaGemmCudaArgs& call, cudaStream_t stream) {
  Device device;
  cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  const Scratch scratch = divide_scratch(call, device.multiprocessors);
  auto* base = static_cast<char*>(call.scratch);
  const SortTarget target = {reinterpret_cast<int*>(base + scratch.order),
                             reinterpret_cast<TokenTile*>(base + scratch.tile_count + 4),
                             reinterpret_cast<int*>(base + scratch.tile_count), scratch.max_tiles};
  ManyTokensArgs args = {};
  args.call = call;
  args.sorted = {call.routes.slots != nullptr ? target.order : call.routes.token_indices,
                 target.tiles, target.tile_count};
  args.shared_bytes = device.shared_bytes;
  args.parts = scratch.parts;
  for (int i = 0; i < call.layer_count; ++i) {
    args.row_tiles = std::max(args.row_tiles,
                              static_cast<int>((call.layers[i].out + kTileRows - 1) / kTileRows));
  }
  args.z_width = scratch.z_width;
  args.z = reinterpret_cast<uint16_t*>(base + scratch.z);
  args.z_parts = reinterpret_cast<float*>(base + scratch.z_parts);

  const Grid sort = {dim3(1), kSortThreads,
                     call.routes.slots != nullptr ? static_cast<size_t>(call.capacity) * 4 : 0};
  status = launch_overlapped(sort_kernel, sort, device, stream, call, target);
  if (status != cudaSuccess) return status;
  const Grid products = {dim3(static_cast<unsigned>(device.multiprocessors)), kThreads,
                         static_cast<size_t>(args.shared_bytes)};
  status = call.element == Element::kHalf
               ? launch_overlapped(down_kernel<__half>, products, device, stream, args)
               : launch_overlapped(down_kernel<__nv_bfloat16>, products, device, stream, args);
  if (status != cudaSuccess) return status;
  if (args.parts > 1) {
    const Grid join = {dim3(static_cast<unsigned>(2 * device.multiprocessors)), kJoinThreads, 0};
    status = launch_overlapped(join_kernel, join, device, stream, args);
    if (status != cudaSuccess) return status;
  }
  return call.element == Element::kHalf
             ? launch_overlapped(up_kernel<__half>, products, device, stream, args)
             : launch_overlapped(up_kernel<__nv_bfloat16>, products, device, stream, args);
}

}  // namespace adamix
