#include <vector>

#include "common/float16.h"
#include "delta_embedding/delta_embedding.h"
#include "delta_gemm/token_groups.h"
#include "layout/packed_layout.h"

// Two phases over groups of tokens (token_groups.h). The first gathers w, a component's scale times
// one code of its lane of U for each token of a group. The second adds V's lanes times w to y.
namespace adamix {
namespace {

// Tokens outside the vocabulary are the base.
template <typename T>
std::vector<int32_t> slots_in_vocabulary(const DeltaEmbeddingArgs<T>& args) {
  std::vector<int32_t> slots(args.slots, args.slots + args.y.rows);
  for (int64_t t = 0; t < args.y.rows; ++t) {
    if (args.tokens[t] < 0 || args.tokens[t] >= args.vocab) slots[t] = -1;
  }
  return slots;
}

// One code of a lane, wherever its block lies.
int level_at(const PackedFactor& factor, const Lane& lane, int64_t row) {
  const int64_t panel = row / kPanelCodes;
  const int64_t words = panel * kPanelBlocks * block_column_words(factor.counts) +
                        panel_blocks(factor.codes, panel) * lane.words_before +
                        row % kPanelCodes / kBlockCodes * lane.bits;
  const auto code = read_code(factor.words + words, static_cast<int>(row % kBlockCodes), lane.bits);
  return level(code, lane.bits);
}

// w[token][component] = scale * U_level[row of the token][component], of items [begin, end).
template <typename T>
void gather(const DeltaEmbeddingArgs<T>& args, const TokenGroups& groups, int64_t begin,
            int64_t end, float* w) {
  for (int64_t item = begin; item < end; ++item) {
    const TokenGroup& group = groups.group_of_item(item);
    const int64_t component = item - group.first_item;
    const int64_t* entry = args.table.row(group.slot);
    const PackedFactor u{args.arena + entry[kTableUOffset], args.vocab, entry + kTableFirstUCount};
    const Lane lane = locate_lane(u.counts, component);
    const float scale = float_from_bits(args.arena[entry[kTableScaleOffset] + component]);
    for (int64_t t = 0; t < group.tokens; ++t) {
      const int64_t row = args.tokens[groups.token_of[group.first_token + t]];
      w[group.z_offset + t * group.rank + component] =
          scale * static_cast<float>(level_at(u, lane, row));
    }
  }
}

}  // namespace

template <typename T>
void delta_embedding_cpu(const DeltaEmbeddingArgs<T>& args, const ParallelFor& parallel) {
  const std::vector<int32_t> slots = slots_in_vocabulary(args);
  const TokenGroups groups = group_tokens(args.table, slots.data(), args.y.rows);
  std::vector<float> w(static_cast<size_t>(groups.z_floats));
  parallel(groups.items, 64,
           [&](int64_t begin, int64_t end) { gather(args, groups, begin, end, w.data()); });
  add_lanes<T>({args.y, w.data(), args.arena, args.table, v_columns()}, groups, parallel);
}

template void delta_embedding_cpu(const DeltaEmbeddingArgs<float>&, const ParallelFor&);
template void delta_embedding_cpu(const DeltaEmbeddingArgs<Half>&, const ParallelFor&);
template void delta_embedding_cpu(const DeltaEmbeddingArgs<BFloat16>&, const ParallelFor&);

}  // namespace adamix
