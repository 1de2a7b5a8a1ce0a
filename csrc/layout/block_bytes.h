#pragma once

#include <cstdint>

#include "layout/packed_layout.h"

// A block as 32 codes in bytes, one after the other, and back: what kernels that move whole blocks
// share. The bytes come as eight words of four, the first code in the lowest byte, as a
// little-endian machine loads them.
//
// The bits of a field lie at the same place of every byte, so the order of the bytes of a field
// is that of the words' bytes: it is put right once a word and not once a field.
namespace adamix {

// Bits above kBits of a byte are dropped.
template <int kBits>
ADAMIX_HD inline void pack_block(const uint32_t (&bytes)[kBlockFields], uint32_t (&words)[kBits]) {
  ADAMIX_UNROLL
  for (int word = 0; word < kBits; ++word) words[word] = 0;
  ADAMIX_UNROLL
  for (int field = 0; field < kBlockFields; ++field) or_field<kBits>(words, field, bytes[field]);
  ADAMIX_UNROLL
  for (int word = 0; word < kBits; ++word) words[word] = swap_middle_bytes(words[word]);
}

template <int kBits>
ADAMIX_HD inline void unpack_block(const uint32_t (&words)[kBits],
                                   uint32_t (&bytes)[kBlockFields]) {
  uint32_t in_order[kBits];
  ADAMIX_UNROLL
  for (int word = 0; word < kBits; ++word) in_order[word] = swap_middle_bytes(words[word]);
  ADAMIX_UNROLL
  for (int field = 0; field < kBlockFields; ++field) {
    bytes[field] = read_field<kBits>(in_order, field);
  }
}

}  // namespace adamix
