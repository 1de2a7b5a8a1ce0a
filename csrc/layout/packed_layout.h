#pragma once

#include <cstdint>

#include "common/host_device.h"

// The packed layout: how codes lie in memory and on disk. Its single home; host and device code,
// the Python module and the file format all take it from here. A change of anything below raises
// kLayoutVersion.
//
// LANE. A row of V̂ [rank, in] or a column of Û [out, rank] is a lane: its codes share one width b,
// 1..8 bits.
//
// BLOCK. 32 codes make a block of exactly b words of 32 bits, low bit first. b = 3:
//
//   word 0  bits 0..31   [c0 c1 .. c9 |c10 low]            code i begins at bit 3i of the block
//   word 1               [c10 high |c11 .. c20 |c21 low]
//   word 2               [c21 high |c22 .. c31]
//
// Blocks start on a word, so work may start at any of them without a prefix scan. The last block of
// a lane is padded with code 0. Code 0 is not a zero value (there is none): kernels mask what it is
// multiplied with.
//
// VALUE. A code q of b bits stands for the level 2q - (2^b - 1), an odd integer: -1, 1 at one bit,
// -7, -5 .. 7 at three. quantize(w) = clamp(floor(w / (2 * scale)) + 2^(b-1), 0, 2^b - 1) with IEEE
// division; dequantized, a code is scale * level.
//
// MATRIX. A delta of one matrix is U_level [out, rank] · diag(scale) · V_level [rank, in].
// Components are sorted by width descending, then by original index, so that the number of
// components at each width says all:
//
//   V       | 8-bit lanes | 7-bit lanes | .. | 1-bit lanes |    each lane lane_words(in, b) words
//   U       | 8-bit lanes | 7-bit lanes | .. | 1-bit lanes |    each lane lane_words(out, b) words
//   scales  | one fp32 a component, same order             |
//
// BANK. Many deltas lie in one arena of 32-bit words (scales as fp32 bit patterns). A layer has a
// table with one row of int64 a slot; where all its counts are zero the slot is empty and adds
// nothing:
//
//   column   0         1         2             3           4        ..  10
//            V offset  U offset  scale offset  components  at 7         at 1 bit
//            (words)   (words)   (words)       at 8 bits
namespace adamix {

constexpr int kLayoutVersion = 1;
constexpr int kBlockCodes = 32;
constexpr int kMaxBits = 8;

constexpr int kTableVOffset = 0;
constexpr int kTableUOffset = 1;
constexpr int kTableScaleOffset = 2;
constexpr int kTableFirstCount = 3;  // of width kMaxBits; one narrower width a column from there on
constexpr int kTableColumns = kTableFirstCount + kMaxBits;

ADAMIX_HD constexpr int64_t block_count(int64_t codes) {
  return (codes + kBlockCodes - 1) / kBlockCodes;
}

ADAMIX_HD constexpr int64_t lane_words(int64_t codes, int bits) {
  return block_count(codes) * bits;
}

ADAMIX_HD constexpr uint32_t max_code(int bits) {
  return (1u << bits) - 1u;
}

ADAMIX_HD constexpr int level(uint32_t code, int bits) {
  return 2 * static_cast<int>(code) - static_cast<int>(max_code(bits));
}

ADAMIX_HD inline uint32_t read_code(const uint32_t* block, int i, int bits) {
  const int bit = i * bits, word = bit / 32, shift = bit % 32;
  uint32_t window = block[word] >> shift;
  if (shift + bits > 32) window |= block[word + 1] << (32 - shift);  // the code straddles
  return window & max_code(bits);
}

// The bits that code i of a block puts into one of the block's words; a word is the OR of them over
// the block.
ADAMIX_HD inline uint32_t code_in_word(uint32_t code, int i, int bits, int word) {
  const int shift = i * bits - word * 32;
  if (shift >= 32 || shift <= -bits) return 0;
  return shift >= 0 ? code << shift : code >> -shift;
}

ADAMIX_HD inline void write_code(uint32_t* block, int i, int bits, uint32_t code) {
  const int first = i * bits / 32, last = (i * bits + bits - 1) / 32;
  for (int word = first; word <= last; ++word) {
    block[word] &= ~code_in_word(max_code(bits), i, bits, word);
    block[word] |= code_in_word(code, i, bits, word);
  }
}

// counts[i] is the number of components of width kMaxBits - i, as in a row of the table.
ADAMIX_HD inline int64_t component_count(const int64_t* counts) {
  int64_t rank = 0;
  for (int i = 0; i < kMaxBits; ++i) rank += counts[i];
  return rank;
}

// Words of all lanes of one factor: of V with codes = in, of U with codes = out.
ADAMIX_HD inline int64_t factor_words(int64_t codes, const int64_t* counts) {
  int64_t words = 0;
  for (int i = 0; i < kMaxBits; ++i) words += counts[i] * lane_words(codes, kMaxBits - i);
  return words;
}

struct Lane {
  int bits;
  int64_t offset;  // words from the first word of the factor
};

// Where a component's lane begins: needs 0 <= component < component_count(counts).
ADAMIX_HD inline Lane locate_lane(int64_t codes, const int64_t* counts, int64_t component) {
  int64_t offset = 0;
  int i = 0;
  for (; i < kMaxBits - 1 && component >= counts[i]; ++i) {
    component -= counts[i];
    offset += counts[i] * lane_words(codes, kMaxBits - i);
  }
  const int bits = kMaxBits - i;
  return {bits, offset + component * lane_words(codes, bits)};
}

}  // namespace adamix
