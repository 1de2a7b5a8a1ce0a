#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/matrix_view.h"
#include "common/parallel.h"

// y[t] += row tokens[t] of U_level · diag(scale) · V_level, with the delta in slot slots[t] of the
// bank (layout/packed_layout.h, BANK): U's lanes have `vocab` codes, V's `hidden`, so one delta
// serves an embedding and, by delta_gemm, an output head tied to it. Any mix of slots, ranks and
// widths. Nothing is added where the slot is below 0 or >= capacity (the base), nor where the token
// is below 0 or >= vocab: rows of a vocabulary that grew are stored whole, beside the delta.
// w = U_level · scale is rounded to fp32, products with V are accumulated in fp32;
// y = round(fp32(y) + delta), one rounding. A token's result does not depend on the number of
// threads.
namespace adamix {

constexpr int64_t kMaxVocab = (int64_t{1} << 31) - 1;

// Token ids of either type.
struct TokenIds {
  const void* data;  // int32 or int64
  bool wide;         // int64

  ADAMIX_HD int64_t operator[](int64_t token) const {
    return wide ? static_cast<const int64_t*>(data)[token]
                : static_cast<const int32_t*>(data)[token];
  }
};

template <typename T>  // float, Half or BFloat16
struct DeltaEmbeddingArgs {
  // Outputs
  MatrixView<T> y;  // [tokens, hidden], rows do not overlap
  // Inputs
  TokenIds tokens;
  int64_t vocab;
  const uint32_t* arena;  // every delta's words and scales
  MatrixView<const int64_t>
      table;             // [capacity, kTableColumns]; rows of slots in use lie inside the arena
  const int32_t* slots;  // [tokens]
};

template <typename T>
void delta_embedding_cpu(const DeltaEmbeddingArgs<T>& args, const ParallelFor& parallel);

}  // namespace adamix
