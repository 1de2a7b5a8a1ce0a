#include <algorithm>
#include <cstring>

#include "common/cpu_clones.h"
#include "common/float16.h"
#include "common/for_bits.h"
#include "delta_gemm/token_groups.h"
#include "layout/block_bytes.h"

namespace adamix {
namespace {

constexpr int64_t kGroupTokens = 64;  // bounds the fp32 copies; unpacking is long paid for by then
constexpr int64_t kChunkCodes = 2 * kPanelCodes;  // of a lane: a strip's levels take 16 KiB
constexpr int kStripLanes = 8;                    // lanes that share a load and a store of y

// The codes of blocks that follow each other.
template <int kBits>
void codes_of_blocks(const uint32_t* words, int blocks, uint8_t* codes) {
  for (; blocks > 0; --blocks, words += kBits, codes += kBlockCodes) {
    uint32_t block[kBits], bytes[kBlockFields];
    std::memcpy(block, words, sizeof block);
    unpack_block<kBits>(block, bytes);
    std::memcpy(codes, bytes, sizeof bytes);
  }
}

ADAMIX_CPU_CLONES void levels_of_codes(const uint8_t* __restrict codes, int n, int32_t max,
                                       float* __restrict levels) {
  for (int i = 0; i < n; ++i) levels[i] = static_cast<float>(2 * int32_t{codes[i]} - max);
}

// y[:] += sum over the strip's lanes of z[lane] * levels[lane][:].
ADAMIX_CPU_CLONES void add_strip(const float* __restrict levels, const float* __restrict z,
                                 int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = y[i];
#pragma GCC unroll 8
    for (int lane = 0; lane < kStripLanes; ++lane) sum += z[lane] * levels[lane * kChunkCodes + i];
    y[i] = sum;
  }
}

// The levels of up to kStripLanes lanes in a chunk. Lanes that are not there keep the finite levels
// of an earlier strip, or zeros; their z is 0.
void unpack_strip(const PackedFactor& factor, int64_t first, int64_t lanes, int64_t first_code,
                  int64_t codes, float* levels) {
  const int64_t panel = first_code / kPanelCodes;
  for (int64_t i = 0; i < lanes; ++i) {
    levels_of_lane(factor, first + i, panel, panel + panel_count(codes), levels + i * kChunkCodes);
  }
}

}  // namespace

const TokenGroup& TokenGroups::group_of_item(int64_t item) const {
  return *(std::upper_bound(groups.begin(), groups.end(), item,
                            [](int64_t i, const TokenGroup& g) { return i < g.first_item; }) -
           1);
}

TokenGroups group_tokens(const MatrixView<const int64_t>& table, const int32_t* slots,
                         int64_t tokens) {
  TokenGroups result;
  const auto rank_of = [&](int64_t slot) {
    return component_count(table.row(slot) + kTableFirstVCount);
  };
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = slots[token];
    if (slot >= 0 && slot < table.rows && rank_of(slot) > 0) result.token_of.push_back(token);
  }
  std::stable_sort(result.token_of.begin(), result.token_of.end(),
                   [&](int64_t a, int64_t b) { return slots[a] < slots[b]; });
  for (int64_t token = 0; token < result.sorted_tokens();) {
    const int64_t slot = slots[result.token_of[token]];
    int64_t end = token;
    while (end < result.sorted_tokens() && end - token < kGroupTokens &&
           slots[result.token_of[end]] == slot) {
      ++end;
    }
    const int64_t rank = rank_of(slot);
    result.groups.push_back({slot, token, end - token, rank, result.items, result.z_floats});
    result.items += rank;
    result.z_floats += (end - token) * rank;
    token = end;
  }
  return result;
}

// A panel's codes are all written before the first is read: a wide load right behind narrow stores
// stalls.
void levels_of_lane(const PackedFactor& factor, int64_t component, int64_t first, int64_t end,
                    float* levels) {
  const Lane lane = locate_lane(factor.counts, component);
  const int64_t panel_words = kPanelBlocks * block_column_words(factor.counts);
  for_bits(lane.bits, [&](auto bits) {
    uint8_t codes[kPanelCodes];
    for (int64_t panel = first; panel < end; ++panel) {
      const int blocks = panel_blocks(factor.codes, panel);
      codes_of_blocks<bits.value>(factor.words + panel * panel_words + blocks * lane.words_before,
                                  blocks, codes);
      levels_of_codes(codes, blocks * kBlockCodes, static_cast<int32_t>(max_code(bits.value)),
                      levels + (panel - first) * kPanelCodes);
    }
  });
}

// One (group, two panels of the factor) at a time.
template <typename T>
void add_lanes(const AddLanesArgs<T>& args, const TokenGroups& groups,
               const ParallelFor& parallel) {
  const int64_t chunks = (args.y.cols + kChunkCodes - 1) / kChunkCodes;
  const auto count = static_cast<int64_t>(groups.groups.size());
  parallel(count * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> levels(kStripLanes * kChunkCodes);
    std::vector<float> sums(kGroupTokens * kChunkCodes);
    for (int64_t item = begin; item < end; ++item) {
      const TokenGroup& group = groups.groups[item / chunks];
      const int64_t first_code = item % chunks * kChunkCodes;
      const int64_t codes = std::min(kChunkCodes, args.y.cols - first_code);
      const int64_t* entry = args.table.row(group.slot);
      const PackedFactor factor{args.arena + entry[args.factor.offset], args.y.cols,
                                entry + args.factor.first_count};
      std::fill_n(sums.begin(), group.tokens * kChunkCodes, 0.0f);
      for (int64_t first = 0; first < group.rank; first += kStripLanes) {
        const int64_t lanes = std::min<int64_t>(kStripLanes, group.rank - first);
        unpack_strip(factor, first, lanes, first_code, codes, levels.data());
        for (int64_t t = 0; t < group.tokens; ++t) {
          float z[kStripLanes] = {};
          std::copy_n(args.z + group.z_offset + t * group.rank + first, lanes, z);
          add_strip(levels.data(), z, codes, sums.data() + t * kChunkCodes);
        }
      }
      for (int64_t t = 0; t < group.tokens; ++t) {
        T* y = args.y.row(groups.token_of[group.first_token + t]) + first_code;
        for (int64_t i = 0; i < codes; ++i) {
          y[i] = from_float<T>(to_float(y[i]) + sums[t * kChunkCodes + i]);
        }
      }
    }
  });
}

template void add_lanes(const AddLanesArgs<float>&, const TokenGroups&, const ParallelFor&);
template void add_lanes(const AddLanesArgs<Half>&, const TokenGroups&, const ParallelFor&);
template void add_lanes(const AddLanesArgs<BFloat16>&, const TokenGroups&, const ParallelFor&);

}  // namespace adamix
