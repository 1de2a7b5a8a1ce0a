#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu_clones.h"
#include "common/float16.h"
#include "common/for_bits.h"
#include "delta_gemm/delta_gemm.h"
#include "layout/block_bytes.h"
#include "layout/packed_layout.h"

// Tokens are gathered by slot into groups of at most 64. Phase 1 makes z, one (group, component) at
// a time: a lane of V, gathered from its panels, is turned into float levels once and serves the
// whole group. Phase 2 makes y, one (group, two panels of U) at a time.
namespace adamix {
namespace {

constexpr int64_t kGroupTokens = 64;  // bounds the fp32 copies; unpacking is long paid for by then
constexpr int64_t kChunkRows = 2 * kPanelCodes;  // of U: a strip's levels take 16 KiB
constexpr int kVector = 32;  // partial sums of a dot product: two AVX-512 registers
static_assert(kBlockCodes % kVector == 0, "a padded row is whole vectors");
constexpr int kStripLanes = 8;  // lanes of U that share a load and a store of y

struct Group {
  int64_t slot;
  int64_t first_token;  // in the sorted order
  int64_t tokens;
  int64_t rank;
  int64_t first_item;  // of phase 1: items are (group, component)
  int64_t z_offset;    // z [tokens, rank] of this group
};

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

struct Factor {
  const uint32_t* words;
  int64_t codes;  // of a lane
  const int64_t* counts;
};

// The levels of a component's lane in the panels [first, end), block after block. A panel's codes
// are all written before the first is read: a wide load right behind narrow stores stalls.
void levels_of_lane(const Factor& factor, int64_t component, int64_t first, int64_t end,
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

// n is a multiple of kVector. One token at a time: tiles of four tokens were no faster, since GCC
// shuffles them.
ADAMIX_CPU_CLONES float dot(const float* __restrict levels, const float* __restrict x, int64_t n) {
  float sum[kVector] = {};
  for (int64_t i = 0; i < n; i += kVector) {
    for (int v = 0; v < kVector; ++v) sum[v] += levels[i + v] * x[i + v];
  }
  float total = 0.0f;
  for (int v = 0; v < kVector; ++v) total += sum[v];
  return total;
}

// y[:] += sum over the strip's lanes of z[lane] * levels[lane][:].
ADAMIX_CPU_CLONES void add_strip(const float* __restrict levels, const float* __restrict z,
                                 int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = y[i];
#pragma GCC unroll 8
    for (int lane = 0; lane < kStripLanes; ++lane) sum += z[lane] * levels[lane * kChunkRows + i];
    y[i] = sum;
  }
}

template <typename T>
class DeltaGemm {
 public:
  explicit DeltaGemm(const DeltaGemmArgs<T>& args)
      : args_(args), padded_in_(block_count(args.x.cols) * kBlockCodes) {
    sort_tokens_by_slot();
    make_groups();
  }

  void run(const ParallelFor& parallel) {
    x_.resize(static_cast<size_t>(padded_in_ * sorted_tokens()));
    z_.resize(static_cast<size_t>(z_floats_));
    parallel(sorted_tokens(), 8, [&](int64_t begin, int64_t end) { gather_x(begin, end); });
    parallel(down_items_, 1, [&](int64_t begin, int64_t end) { down(begin, end); });
    const int64_t chunks = (args_.y.cols + kChunkRows - 1) / kChunkRows;
    parallel(group_count() * chunks, 1,
             [&](int64_t begin, int64_t end) { up(begin, end, chunks); });
  }

 private:
  int64_t group_count() const { return static_cast<int64_t>(groups_.size()); }
  int64_t sorted_tokens() const { return static_cast<int64_t>(token_of_.size()); }
  const int64_t* counts(int64_t slot) const { return args_.table.row(slot) + kTableFirstCount; }

  // Tokens of the base and of empty slots take no part.
  void sort_tokens_by_slot() {
    const auto routed = [&](int64_t token) {
      const int64_t slot = args_.slots[token];
      return slot >= 0 && slot < args_.table.rows && component_count(counts(slot)) > 0;
    };
    for (int64_t token = 0; token < args_.x.rows; ++token) {
      if (routed(token)) token_of_.push_back(token);
    }
    std::stable_sort(token_of_.begin(), token_of_.end(),
                     [&](int64_t a, int64_t b) { return args_.slots[a] < args_.slots[b]; });
  }

  void make_groups() {
    for (int64_t token = 0; token < sorted_tokens();) {
      const int64_t slot = args_.slots[token_of_[token]];
      int64_t end = token;
      while (end < sorted_tokens() && end - token < kGroupTokens &&
             args_.slots[token_of_[end]] == slot) {
        ++end;
      }
      const int64_t rank = component_count(counts(slot));
      groups_.push_back({slot, token, end - token, rank, down_items_, z_floats_});
      down_items_ += rank;
      z_floats_ += (end - token) * rank;
      token = end;
    }
  }

  // x in fp32, in sorted order, with zeros behind each row: the padding codes of a lane's last
  // block meet those.
  void gather_x(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* source = args_.x.row(token_of_[i]);
      float* target = x_.data() + i * padded_in_;
      for (int64_t k = 0; k < args_.x.cols; ++k) target[k] = to_float(source[k]);
    }
  }

  // z[token][component] = scale * (V_level[component] . x[token])
  void down(int64_t begin, int64_t end) {
    std::vector<float> levels(static_cast<size_t>(padded_in_));
    for (int64_t item = begin; item < end; ++item) {
      const Group& group =
          *(std::upper_bound(groups_.begin(), groups_.end(), item,
                             [](int64_t i, const Group& g) { return i < g.first_item; }) -
            1);
      const int64_t component = item - group.first_item;
      const int64_t* entry = args_.table.row(group.slot);
      const Factor v{args_.arena + entry[kTableVOffset], args_.x.cols, counts(group.slot)};
      levels_of_lane(v, component, 0, panel_count(v.codes), levels.data());
      const float scale = float_from_bits(args_.arena[entry[kTableScaleOffset] + component]);
      float* z = z_.data() + group.z_offset + component;
      for (int64_t t = 0; t < group.tokens; ++t) {
        const float* x = x_.data() + (group.first_token + t) * padded_in_;
        z[t * group.rank] = scale * dot(levels.data(), x, padded_in_);
      }
    }
  }

  // y[token][rows of the chunk] += sum over components of z * U_level
  void up(int64_t begin, int64_t end, int64_t chunks) {
    std::vector<float> levels(kStripLanes * kChunkRows);
    std::vector<float> sums(kGroupTokens * kChunkRows);
    for (int64_t item = begin; item < end; ++item) {
      const Group& group = groups_[item / chunks];
      const int64_t first_row = item % chunks * kChunkRows;
      const int64_t rows = std::min(kChunkRows, args_.y.cols - first_row);
      std::fill_n(sums.begin(), group.tokens * kChunkRows, 0.0f);
      for (int64_t first = 0; first < group.rank; first += kStripLanes) {
        const int64_t lanes = std::min<int64_t>(kStripLanes, group.rank - first);
        unpack_strip(group, first, lanes, first_row, rows, levels.data());
        for (int64_t t = 0; t < group.tokens; ++t) {
          float z[kStripLanes] = {};
          std::copy_n(z_.data() + group.z_offset + t * group.rank + first, lanes, z);
          add_strip(levels.data(), z, rows, sums.data() + t * kChunkRows);
        }
      }
      add_to_y(group, first_row, rows, sums.data());
    }
  }

  // Lanes that are not there keep the finite levels of an earlier strip, or zeros; their z is 0.
  void unpack_strip(const Group& group, int64_t first, int64_t lanes, int64_t first_row,
                    int64_t rows, float* levels) const {
    const Factor u{args_.arena + args_.table.row(group.slot)[kTableUOffset], args_.y.cols,
                   counts(group.slot)};
    const int64_t panel = first_row / kPanelCodes;
    for (int64_t i = 0; i < lanes; ++i) {
      levels_of_lane(u, first + i, panel, panel + panel_count(rows), levels + i * kChunkRows);
    }
  }

  void add_to_y(const Group& group, int64_t first_row, int64_t rows, const float* sums) {
    for (int64_t t = 0; t < group.tokens; ++t) {
      T* y = args_.y.row(token_of_[group.first_token + t]) + first_row;
      for (int64_t i = 0; i < rows; ++i) {
        y[i] = from_float<T>(to_float(y[i]) + sums[t * kChunkRows + i]);
      }
    }
  }

  const DeltaGemmArgs<T>& args_;
  int64_t padded_in_;
  std::vector<int64_t> token_of_;  // sorted position -> token
  std::vector<Group> groups_;
  int64_t down_items_ = 0;
  int64_t z_floats_ = 0;
  std::vector<float> x_;  // [sorted tokens, padded_in]
  std::vector<float> z_;
};

}  // namespace

template <typename T>
void delta_gemm_cpu(const DeltaGemmArgs<T>& args, const ParallelFor& parallel) {
  DeltaGemm<T>(args).run(parallel);
}

template void delta_gemm_cpu(const DeltaGemmArgs<float>&, const ParallelFor&);
template void delta_gemm_cpu(const DeltaGemmArgs<Half>&, const ParallelFor&);
template void delta_gemm_cpu(const DeltaGemmArgs<BFloat16>&, const ParallelFor&);

}  // namespace adamix
