#include <algorithm>

#include "common/cuda_launch.cuh"
#include "delta_gemm/many_tokens.cuh"
#include "delta_gemm/many_tokens_pipeline.cuh"

// delta_gemm where many tokens share a delta: arithmetic bounds the time, so codes are turned into
// 16-bit levels once a tile and multiplied on the tensor cores. Four kernels:
//
//   sort   tokens by slot, cut into tiles of 128 of one slot
//   down   z = scale · V x     128 tokens times 128 components, a part of the inputs each
//   join   z = sum over the parts, rounded to bf16           (where there is more than one part)
//   up     y += U z            128 tokens times 128 outputs, all components
//
// down and up are persistent: a thread block goes from product to product, its producer warps ahead
// of its consumers (many_tokens_pipeline.cuh). z is rounded once to bf16: it is an operand of the
// second product.
namespace adamix {
namespace {

struct ManyTokensArgs {
  DeltaGemmCudaArgs call;
  SortedTokens sorted;
  int stages;       // of the pipelines
  int parts;        // of the inputs
  int64_t z_width;  // a multiple of kTileRows
  uint16_t* z;      // bf16 [layers, tokens, z_width], tokens sorted
  float* z_parts;   // [parts, layers, tokens, z_width]; only if parts > 1

  // Where a sorted token's row begins in z, and in every part.
  __device__ int64_t row_of_z(int layer, int sorted_token) const {
    return (layer * call.tokens + sorted_token) * z_width;
  }
  __device__ int64_t part_size() const { return call.layer_count * call.tokens * z_width; }
};

// The products of one thread block, in an order in which those that share weights are neighbours.
// each(product, layer, part) for all.
template <typename Each>
__device__ void for_products(const ManyTokensArgs& args, bool down, Each each) {
  const DeltaGemmCudaArgs& call = args.call;
  const int tiles = *args.sorted.tile_count;
  int64_t most_rows = args.z_width;
  if (!down) {
    most_rows = 0;
    for (int i = 0; i < call.layer_count; ++i) most_rows = max(most_rows, call.layers[i].out);
  }
  const int parts = down ? args.parts : 1;
  const int64_t each_row = int64_t{parts} * call.layer_count * tiles;
  const int64_t works = (most_rows + kTileRows - 1) / kTileRows * each_row;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int rest = static_cast<int>(work % each_row);
    const int layer = rest / tiles % call.layer_count, part = rest / tiles / call.layer_count;
    const TokenTile tile = args.sorted.tiles[rest % tiles];
    const DeltaLayer& matrix = call.layers[layer];
    const Entry entry = load_entry(matrix.table, tile.slot, call.max_rank);
    if (entry.rank == 0) continue;
    Product product;
    product.counts = entry.counts;
    product.pairs = pair_count(entry.counts);
    product.first_row = static_cast<int>(work / each_row * kTileRows);
    const int64_t rows = down ? 2 * product.pairs : matrix.out;
    if (product.first_row >= rows) continue;
    const int64_t k = down ? call.in : 2 * product.pairs;
    const int steps = static_cast<int>((k + kStepCodes - 1) / kStepCodes);
    product.first_step = static_cast<int>(int64_t{steps} * part / parts);
    product.last_step = static_cast<int>(int64_t{steps} * (part + 1) / parts);
    product.factor = down ? make_factor(call.arena + entry.v_offset, entry.counts, call.in)
                          : make_factor(call.arena + entry.u_offset, entry.counts, matrix.out);
    product.first_token = tile.first;
    product.tokens = tile.count;
    each(product, layer, part, entry);
  }
}

__device__ bool is_producer(int& group) {
  group = threadIdx.x / kGroupThreads;
  if (group < kProducers) return true;
  group -= kProducers;
  return false;
}

// The scales of a tile's components into shared memory, by all consumers; 0 where there is none.
__device__ void load_scales(const float* scales, const Product& product, float* tile) {
  barrier_sync(kConsumerBarrier, kConsumerThreads);  // those of the product before are read
  const int i = threadIdx.x % kConsumerThreads;
  if (i < kTileRows) {
    const int position = product.first_row + i;
    float scale = 0.0f;
    if (position / 2 < product.pairs) {
      Pair pair;
      pair.seek(product.counts, position / 2);
      if (position % 2 < pair.lanes()) scale = scales[pair.component + position % 2];
    }
    tile[i] = scale;
  }
  barrier_sync(kConsumerBarrier, kConsumerThreads);
}

template <typename Sums>
__device__ void store_z(const ManyTokensArgs& args, const Product& product, int layer, int part,
                        const float* scales, const Sums& sums, int first_row) {
#pragma unroll
  for (int i = 0; i < Sums::kTokens; ++i) {
    const int row = first_row + sums.token(i);
    if (row >= product.tokens) continue;
    const int64_t first = args.row_of_z(layer, product.first_token + row);
#pragma unroll
    for (int n = 0; n < Sums::kPairs; ++n) {
      // A component that is not there has the codes of another: its sum must not count, even if
      // NaN.
      const float2 scale = *reinterpret_cast<const float2*>(scales + sums.row(n));
      const float2 sum = sums.sum(i, n);
      const float z0 = scale.x != 0.0f ? scale.x * sum.x : 0.0f;
      const float z1 = scale.y != 0.0f ? scale.y * sum.y : 0.0f;
      const int64_t at = first + product.first_row + sums.row(n);
      if (args.parts == 1) {
        *reinterpret_cast<uint32_t*>(args.z + at) = round_pair<__nv_bfloat16>(z0, z1);
      } else {
        *reinterpret_cast<float2*>(args.z_parts + part * args.part_size() + at) =
            make_float2(z0, z1);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ ManyTokensArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const DeltaGemmCudaArgs& call = args.call;
  int group;
  if (is_producer(group)) {
    const auto address = reinterpret_cast<uintptr_t>(call.x);
    const XRows rows = {static_cast<const char*>(call.x),
                        call.x_row_stride * 2,
                        call.in,
                        args.sorted.order,
                        call.tokens,
                        address % 16 == 0 && call.x_row_stride % 8 == 0};
    Producer<T, DownWeights> producer({args.stages}, group);
    for_products(args, true, [&](const Product& product, int, int, const Entry&) {
      producer.run(product, rows);
    });
    producer.finish();
    return;
  }
  Consumer<T> consumer({args.stages}, group);
  float* scales = Stages{args.stages}.behind();
  for_products(args, true, [&](const Product& product, int layer, int part, const Entry& entry) {
    load_scales(reinterpret_cast<const float*>(call.arena + entry.scale_offset), product, scales);
    consumer.run(product, [&](const TileProduct<T>& sums, int first_row) {
      store_z(args, product, layer, part, scales, sums, first_row);
    });
  });
}

// z = sum of the parts, in their order.
__global__ void __launch_bounds__(256) join_kernel(const __grid_constant__ ManyTokensArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const DeltaGemmCudaArgs& call = args.call;
  const int64_t part_size = args.part_size();
  const int tiles = *args.sorted.tile_count;
  for (int work = blockIdx.x; work < tiles * call.layer_count; work += gridDim.x) {
    const TokenTile tile = args.sorted.tiles[work % tiles];
    const int layer = work / tiles;
    const Entry entry = load_entry(call.layers[layer].table, tile.slot, call.max_rank);
    if (entry.rank == 0) continue;
    const int pairs = (2 * pair_count(entry.counts) + kStepCodes - 1) / kStepCodes * kStepPairs;
    for (int row = blockIdx.y; row < tile.count; row += gridDim.y) {
      const int64_t at = args.row_of_z(layer, tile.first + row);
      for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        float2 sum = {0.0f, 0.0f};
        for (int part = 0; part < args.parts; ++part) {
          const float2 z =
              *reinterpret_cast<const float2*>(args.z_parts + part * part_size + at + 2 * i);
          sum.x += z.x, sum.y += z.y;
        }
        *reinterpret_cast<uint32_t*>(args.z + at + 2 * i) = round_pair<__nv_bfloat16>(sum.x, sum.y);
      }
    }
  }
}

// A token's y is all on its way before the first of it is needed.
template <typename T, typename Sums>
__device__ void add_to_y(const ManyTokensArgs& args, const DeltaLayer& matrix,
                         const Product& product, const Sums& sums, int first_row) {
  constexpr int kAtOnce = Sums::kTokensAtOnce;
  auto* y = static_cast<uint16_t*>(matrix.y);
  const bool aligned = reinterpret_cast<uintptr_t>(y) % 4 == 0 && matrix.y_row_stride % 2 == 0;
  const int left = static_cast<int>(min(matrix.out - product.first_row, int64_t{kTileRows}));
#pragma unroll
  for (int first = 0; first < Sums::kTokens; first += kAtOnce) {
    uint16_t* rows[kAtOnce];
    uint32_t before[kAtOnce][Sums::kPairs];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first_row + sums.token(first + i);
      const int token = row < product.tokens ? args.sorted.order[product.first_token + row] : -1;
      const bool inside = token >= 0 && token < args.call.tokens;
      rows[i] = inside ? y + token * matrix.y_row_stride + product.first_row : nullptr;
#pragma unroll
      for (int n = 0; n < Sums::kPairs; ++n) {
        before[i][n] = inside ? load_pair(rows[i], sums.row(n), left, aligned) : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (rows[i] == nullptr) continue;
#pragma unroll
      for (int n = 0; n < Sums::kPairs; ++n) {
        const float2 sum = sums.sum(first + i, n);
        const uint32_t pair = round_pair<T>(widen(from_bits<T>(before[i][n])) + sum.x,
                                            widen(from_bits<T>(before[i][n] >> 16)) + sum.y);
        store_pair(rows[i], sums.row(n), left, aligned, pair);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    up_kernel(const __grid_constant__ ManyTokensArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const DeltaGemmCudaArgs& call = args.call;
  int group;
  if (is_producer(group)) {
    Producer<__nv_bfloat16, UpWeights> producer({args.stages}, group);
    for_products(args, false, [&](const Product& product, int layer, int, const Entry&) {
      const auto* z = reinterpret_cast<const char*>(args.z + args.row_of_z(layer, 0));
      producer.run(product, ZRows{z, args.z_width * 2, args.z_width});
    });
    producer.finish();
    return;
  }
  Consumer<__nv_bfloat16> consumer({args.stages}, group);
  for_products(args, false, [&](const Product& product, int layer, int, const Entry&) {
    const DeltaLayer& matrix = call.layers[layer];
    consumer.run(product, [&](const TileProduct<__nv_bfloat16>& sums, int first_row) {
      if (call.element == Element::kHalf) {
        add_to_y<__half>(args, matrix, product, sums, first_row);
      } else {
        add_to_y<__nv_bfloat16>(args, matrix, product, sums, first_row);
      }
    });
  });
}

__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const __grid_constant__ DeltaGemmCudaArgs args,
                const __grid_constant__ SortTarget target) {
  __shared__ int2 warp_sums[kSortThreads / 32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (args.routes.slots != nullptr) {
    sort_by_slots(args, target, static_cast<int*>(dynamic_shared()), warp_sums);
  } else {
    cut_segments(args, target, warp_sums);
  }
}

// --- launcher ----------------------------------------------------------------------------------

// Scratch, piece by piece, each aligned to 256 bytes.
struct Scratch {
  size_t order, tiles, tile_count, z, z_parts, bytes;
  int max_tiles, parts;
  int64_t z_width;
};

Scratch divide_scratch(const DeltaGemmCudaArgs& args, int multiprocessors) {
  Scratch scratch = {};
  const auto take = [&](int64_t bytes) {
    const size_t at = scratch.bytes;
    scratch.bytes += static_cast<size_t>((bytes + 255) / 256 * 256);
    return at;
  };
  const int64_t slots = args.routes.slots != nullptr ? args.capacity : args.routes.segments;
  scratch.max_tiles =
      static_cast<int>(args.tokens / kTileTokens + std::min(args.tokens, slots) + 1);
  scratch.z_width = (args.max_rank + kMaxBits + kTileRows - 1) / kTileRows * kTileRows;
  // Where few tiles of few components would leave multiprocessors idle, each takes a part of the
  // inputs; 1024 components are what a 7B model's matrices have at one bit a weight.
  const int64_t tiles = (args.tokens + kTileTokens - 1) / kTileTokens * args.layer_count *
                        std::min<int64_t>(scratch.z_width / kTileRows, 8);
  const int64_t steps = (args.in + kStepCodes - 1) / kStepCodes;
  scratch.parts = static_cast<int>(std::clamp<int64_t>(
      multiprocessors / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(1, steps / 8)));
  scratch.order = take(args.tokens * 4);
  scratch.tiles = take(int64_t{scratch.max_tiles} * static_cast<int64_t>(sizeof(TokenTile)));
  scratch.tile_count = take(4);
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
                             reinterpret_cast<TokenTile*>(base + scratch.tiles),
                             reinterpret_cast<int*>(base + scratch.tile_count), scratch.max_tiles};
  ManyTokensArgs args = {};
  args.call = call;
  args.sorted = {call.routes.slots != nullptr ? target.order : call.routes.token_indices,
                 target.tiles, target.tile_count};
  const int stages = (device.shared_bytes - kReservedBytes) / kStageBytes;
  args.stages = std::clamp(stages / kProducers * kProducers, kProducers, kMaxStages);
  args.parts = scratch.parts;
  args.z_width = scratch.z_width;
  args.z = reinterpret_cast<uint16_t*>(base + scratch.z);
  args.z_parts = reinterpret_cast<float*>(base + scratch.z_parts);

  const Grid sort = {dim3(1), kSortThreads,
                     call.routes.slots != nullptr ? static_cast<size_t>(call.capacity) * 4 : 0};
  status = launch_overlapped(sort_kernel, sort, device, stream, call, target);
  if (status != cudaSuccess) return status;
  const Grid products = {
      dim3(static_cast<unsigned>(device.multiprocessors)), kThreads,
      static_cast<size_t>(args.stages * kStageBytes) + kTileRows * sizeof(float)};
  status = call.element == Element::kHalf
               ? launch_overlapped(down_kernel<__half>, products, device, stream, args)
               : launch_overlapped(down_kernel<__nv_bfloat16>, products, device, stream, args);
  if (status != cudaSuccess) return status;
  if (args.parts > 1) {
    const Grid join = {dim3(static_cast<unsigned>(device.multiprocessors), 8), 256, 0};
    status = launch_overlapped(join_kernel, join, device, stream, args);
    if (status != cudaSuccess) return status;
  }
  return launch_overlapped(up_kernel, products, device, stream, args);
}

}  // namespace adamix
