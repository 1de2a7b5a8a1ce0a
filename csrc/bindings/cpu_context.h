#pragma once

#include <string>
#include <vector>

#include "bindings/tensor_args.h"
#include "common/parallel.h"

// What CPU bindings share: torch's own thread pool, and the look at a bank's values that a kernel
// could not survive, for which devices have no time.
namespace adamix::bindings {

// torch.set_num_threads rules.
inline void torch_for(int64_t n, int64_t grain, const RangeBody& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

// `count` runs of `words` words from `offset` on lie inside an arena; written so that nothing
// overflows.
inline bool fits(int64_t offset, int64_t words, int64_t count, int64_t arena_words) {
  return offset >= 0 && offset <= arena_words && count >= 0 &&
         (words == 0 || count <= (arena_words - offset) / words);
}

// Whether both factors and the scales of a slot lie inside the arena.
inline bool slot_fits(const int64_t* entry, int64_t v_codes, int64_t u_codes, int64_t arena_words) {
  int64_t v = entry[kTableVOffset], u = entry[kTableUOffset], scale = entry[kTableScaleOffset];
  for (int bits = kMaxBits; bits >= 1; --bits) {
    const int64_t v_count = entry[kTableFirstVCount + kMaxBits - bits];
    const int64_t u_count = entry[kTableFirstUCount + kMaxBits - bits];
    const int64_t v_lane = lane_words(v_codes, bits), u_lane = lane_words(u_codes, bits);
    if (!fits(v, v_lane, v_count, arena_words) || !fits(u, u_lane, u_count, arena_words) ||
        !fits(scale, 1, v_count, arena_words)) {
      return false;
    }
    v += v_lane * v_count;
    u += u_lane * u_count;
    scale += v_count;
  }
  return true;
}

// One slot a token, with values that can be looked at.
struct Routes {
  const int32_t* slots;
  int64_t tokens;
};

// The deltas of one matrix, with the words for its sizes in sentences.
struct CheckedBank {
  const char* op;
  std::string table_name;
  Tensor table;  // contiguous
  int64_t arena_words;
  int64_t v_codes, u_codes;
  std::string sizes;    // "45 inputs and 40 outputs"
  const char* largest;  // of what max_rank is the larger where none is given: "in and out"
};

inline void check_slots_in_use(const CheckedBank& bank, Routes routes, int64_t max_rank) {
  const auto table = const_view<int64_t>(bank.table);
  std::vector<bool> checked(static_cast<size_t>(table.rows), false);
  for (int64_t token = 0; token < routes.tokens; ++token) {
    const int64_t slot = routes.slots[token];
    if (slot < 0 || slot >= table.rows || checked[slot]) continue;
    checked[slot] = true;
    ADAMIX_CHECK(slot_fits(table.row(slot), bank.v_codes, bank.u_codes, bank.arena_words), bank.op,
                 ": ", bank.table_name, " row ", slot,
                 " does not fit: its offsets and counts, for ", bank.sizes,
                 ", lead out of the arena of ", bank.arena_words, " words");
    const int64_t rank = component_count(table.row(slot) + kTableFirstVCount);
    const int64_t u_rank = component_count(table.row(slot) + kTableFirstUCount);
    ADAMIX_CHECK(rank == u_rank, bank.op, ": ", bank.table_name, " row ", slot, " has ", rank,
                 " lanes of V and ", u_rank, " of U, expected as many of each");
    ADAMIX_CHECK(rank <= max_rank, bank.op, ": ", bank.table_name, " row ", slot, " has ", rank,
                 " components, more than max_rank, ", max_rank,
                 " (where none is given: the larger of ", bank.largest, ")");
  }
}

}  // namespace adamix::bindings
