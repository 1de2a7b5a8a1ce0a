#pragma once

#include <cstdint>
#include <vector>

#include "common/matrix_view.h"
#include "common/parallel.h"
#include "layout/packed_layout.h"

// What delta_gemm and delta_embedding share on the CPU: tokens gathered by slot into groups of at
// most 64, so that a lane is turned into float levels once for all of them, and the product that
// ends both,
//
//   y[token] += sum over components k of z[token, k] · level[k, :]
//
// with one factor's lanes: U's in delta_gemm, V's in delta_embedding.
namespace adamix {

struct TokenGroup {
  int64_t slot;
  int64_t first_token;  // in the sorted order
  int64_t tokens;
  int64_t rank;
  int64_t first_item;  // items are (group, component)
  int64_t z_offset;    // z [tokens, rank] of this group
};

struct TokenGroups {
  std::vector<int64_t> token_of;  // sorted position -> token
  std::vector<TokenGroup> groups;
  int64_t items = 0;
  int64_t z_floats = 0;

  int64_t sorted_tokens() const { return static_cast<int64_t>(token_of.size()); }
  const TokenGroup& group_of_item(int64_t item) const;
};

// Tokens of the base and of empty slots take no part. slots [tokens]; table as in packed_layout.h,
// BANK.
TokenGroups group_tokens(const MatrixView<const int64_t>& table, const int32_t* slots,
                         int64_t tokens);

// One factor of one delta.
struct PackedFactor {
  const uint32_t* words;
  int64_t codes;  // of a lane
  const int64_t* counts;
};

// The levels of a component's lane in the panels [first, end), block after block.
void levels_of_lane(const PackedFactor& factor, int64_t component, int64_t first, int64_t end,
                    float* levels);

template <typename T>  // float, Half or BFloat16
struct AddLanesArgs {
  // Outputs
  MatrixView<T> y;  // [tokens, codes of a lane]
  // Inputs
  const float* z;  // of all groups, scales folded in
  const uint32_t* arena;
  MatrixView<const int64_t> table;
  FactorColumns factor;  // whose lanes are added
};

// Sums in fp32, added to y and rounded once. A token's result depends neither on the number of
// threads nor on the other tokens.
template <typename T>
void add_lanes(const AddLanesArgs<T>& args, const TokenGroups& groups, const ParallelFor& parallel);

}  // namespace adamix
