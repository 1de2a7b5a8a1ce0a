#pragma once

#include <cstdint>

#include "common/host_device.h"

// The packed layout: how codes lie in memory and on disk. Its single home; host and device code,
// the Python module and the file format all take it from here. A change of anything below raises
// kLayoutVersion.
//
// LANE. A row of V̂ [rank, in] or a column of Û [out, rank] is a lane: its codes share one width b,
// 1..8 bits. The two lanes of a component may have different widths.
//
// BLOCK. 32 codes make a block of exactly b words of 32 bits. Four codes 4f .. 4f+3 make field f,
// f = 0..7, and lie at the same place of the four bytes of a word: so one shift and one mask turn
// a word into four codes in bytes, or into two pairs of adjacent codes in 16-bit halves:
//
//   byte    3       2       1       0         code 4f + i of a field is in byte 0, 2, 1, 3 for
//         [4f+3]  [4f+1]  [4f+2]  [4f  ]      i = 0, 1, 2, 3
//
// A byte holds floor(8 / b) whole codes, lowest first; word j holds the fields from
// j * floor(8 / b) on. The bits that are left over at the top of the bytes, read from word 0 on,
// lowest bit first, are the fields that remain. The bits 7..0 of every byte of b = 3:
//
//   word 0  [6 6|1 1 1|0 0 0]     field 6 = bits 6, 7 of word 0, then bit 6 of word 1
//   word 1  [7 6|3 3 3|2 2 2]
//   word 2  [7 7|5 5 5|4 4 4]
//
// Blocks start on a word, so work may start at any of them without a prefix scan. The last block of
// a lane is padded with code 0. Code 0 is not a zero value (there is none): kernels mask what it is
// multiplied with.
//
// PANEL. 256 codes of every lane, 8 blocks, make a panel. A factor is stored panel by panel, so
// that the part of it that a tile of a product needs is one run of words; the last panel may be
// narrower. A slice at a multiple of 256 codes is a view of whole panels, one at a multiple of 32
// a copy of whole words.
//
// VALUE. A code q of b bits stands for the level 2q - (2^b - 1), an odd integer: -1, 1 at one bit,
// -7, -5 .. 7 at three. quantize(w) = clamp(floor(w / (2 * scale)) + 2^(b-1), 0, 2^b - 1) with IEEE
// division; dequantized, a code is scale * level.
//
// MATRIX. A delta of one matrix is U_level [out, rank] · diag(scale) · V_level [rank, in].
// Components lie in one order in which the widths of V's lanes do not rise, nor those of U's: of
// two components none has more bits in V and fewer in U than the other. So the number of V's lanes
// at each width, and that of U's, say all:
//
//   V       | panel 0: 8-bit lanes, 7-bit lanes, .. 1-bit lanes | panel 1: .. | ..
//   U       | panel 0: 8-bit lanes, 7-bit lanes, .. 1-bit lanes | panel 1: .. | ..
//   scales  | one fp32 a component, same order |
//
//   component   0 1 2 3 4 5 6 7      V's counts: 2 at 5 bits, 4 at 3, 2 at 2
//   bits of V   5 5 3 3 3 3 2 2      U's counts: 3 at 4 bits, 2 at 3, 3 at 2
//   bits of U   4 4 4 3 3 2 2 2
//
// V's lanes have `in` codes, U's `out`; the words of a lane in a panel are its blocks there.
//
// BANK. Many deltas lie in one arena of 32-bit words (scales as fp32 bit patterns). A layer has a
// table with one row of int64 a slot; where all its counts are zero the slot is empty and adds
// nothing:
//
//   column   0         1         2             3          4     ..  10        11         ..  18
//            V offset  U offset  scale offset  V's lanes  at 7      at 1 bit  U's lanes      at 1
//            (words)   (words)   (words)       at 8 bits                      at 8 bits
namespace adamix {

constexpr int kLayoutVersion = 3;
constexpr int kBlockCodes = 32;
constexpr int kFieldCodes = 4;
constexpr int kBlockFields = kBlockCodes / kFieldCodes;
constexpr int kPanelCodes = 256;
constexpr int kPanelBlocks = kPanelCodes / kBlockCodes;
constexpr int kMaxBits = 8;

constexpr int kTableVOffset = 0;
constexpr int kTableUOffset = 1;
constexpr int kTableScaleOffset = 2;
// Of width kMaxBits; one narrower width a column from there on.
constexpr int kTableFirstVCount = 3;
constexpr int kTableFirstUCount = kTableFirstVCount + kMaxBits;
constexpr int kTableColumns = kTableFirstUCount + kMaxBits;

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

// Where bit j of a field lies in every byte of a block.
struct BitPlace {
  int word;
  int bit;
};

ADAMIX_HD constexpr BitPlace place_of_bit(int field, int j, int bits) {
  const int whole = 8 / bits, left = 8 - whole * bits;
  if (field < whole * bits) return {field / whole, field % whole * bits + j};
  const int rest = (field - whole * bits) * bits + j;  // among the bits left over
  return {rest / left, whole * bits + rest % left};
}

// From four adjacent codes in bytes, the first in byte 0, to a field's order and back: bytes 1 and
// 2 change places.
ADAMIX_HD constexpr uint32_t swap_middle_bytes(uint32_t bytes) {
  return (bytes & 0xff0000ffu) | (bytes & 0x0000ff00u) << 8 | (bytes & 0x00ff0000u) >> 8;
}

constexpr uint32_t kEveryByte = 0x01010101u;

// The four codes of a field, one a byte from bit `at` on, in the order of FIELD. With a constant
// field and width compilers make one shift and one mask of it (where codes lie at that bit, a mask
// alone), for a field of leftover bits a few; that takes a loop whose length is constant.
template <int kBits>
ADAMIX_HD constexpr uint32_t read_field(const uint32_t* block, int field, int at = 0) {
  uint32_t codes = 0;
  ADAMIX_UNROLL
  for (int j = 0; j < kBits; ++j) {
    const BitPlace place = place_of_bit(field, j, kBits);
    const uint32_t word = block[place.word];
    const int up = at + j - place.bit;
    codes |= (up >= 0 ? word << up : word >> -up) & (kEveryByte << (at + j));
  }
  return codes;
}

// ORs a field's codes into a block that holds zeros there.
template <int kBits>
ADAMIX_HD constexpr void or_field(uint32_t* block, int field, uint32_t codes) {
  ADAMIX_UNROLL
  for (int j = 0; j < kBits; ++j) {
    const BitPlace place = place_of_bit(field, j, kBits);
    const uint32_t bit = codes & (kEveryByte << j);
    block[place.word] |= place.bit >= j ? bit << (place.bit - j) : bit >> (j - place.bit);
  }
}

// One code alone, bit by bit: the meaning of the above, for those in no hurry.
ADAMIX_HD constexpr uint32_t read_code(const uint32_t* block, int i, int bits) {
  constexpr int kByteOf[kFieldCodes] = {0, 2, 1, 3};
  uint32_t code = 0;
  for (int j = 0; j < bits; ++j) {
    const BitPlace place = place_of_bit(i / kFieldCodes, j, bits);
    code |= (block[place.word] >> (8 * kByteOf[i % kFieldCodes] + place.bit) & 1u) << j;
  }
  return code;
}

ADAMIX_HD constexpr void write_code(uint32_t* block, int i, int bits, uint32_t code) {
  constexpr int kByteOf[kFieldCodes] = {0, 2, 1, 3};
  for (int j = 0; j < bits; ++j) {
    const BitPlace place = place_of_bit(i / kFieldCodes, j, bits);
    const int shift = 8 * kByteOf[i % kFieldCodes] + place.bit;
    block[place.word] = (block[place.word] & ~(1u << shift)) | (code >> j & 1u) << shift;
  }
}

// counts[i] is the number of a factor's lanes of width kMaxBits - i, as in a row of the table.
ADAMIX_HD inline int64_t component_count(const int64_t* counts) {
  int64_t rank = 0;
  for (int i = 0; i < kMaxBits; ++i) rank += counts[i];
  return rank;
}

// Words of all lanes of one factor for one block of codes.
template <typename Integer>
ADAMIX_HD inline int64_t block_column_words(const Integer* counts) {
  int64_t words = 0;
  for (int i = 0; i < kMaxBits; ++i) words += counts[i] * (kMaxBits - i);
  return words;
}

// Words of all lanes of one factor: of V with codes = in, of U with codes = out.
ADAMIX_HD inline int64_t factor_words(int64_t codes, const int64_t* counts) {
  return block_count(codes) * block_column_words(counts);
}

ADAMIX_HD constexpr int64_t panel_count(int64_t codes) {
  return (codes + kPanelCodes - 1) / kPanelCodes;
}

// Blocks of a lane in one panel: 8, in the last panel what is left.
ADAMIX_HD constexpr int panel_blocks(int64_t codes, int64_t panel) {
  const int64_t left = block_count(codes) - panel * kPanelBlocks;
  return static_cast<int>(left < kPanelBlocks ? left : kPanelBlocks);
}

// Where a factor is found in a row of the table.
struct FactorColumns {
  int offset, first_count;
};
ADAMIX_HD constexpr FactorColumns v_columns() {
  return {kTableVOffset, kTableFirstVCount};
}
ADAMIX_HD constexpr FactorColumns u_columns() {
  return {kTableUOffset, kTableFirstUCount};
}

struct Lane {
  int bits;
  // Words of the lanes before it for one block of codes: in panel p the lane begins at word
  //   p * kPanelBlocks * block_column_words(counts) + panel_blocks(codes, p) * words_before
  // of the factor, and its blocks there follow each other.
  int64_t words_before;
};

// Needs 0 <= component < component_count(counts).
ADAMIX_HD inline Lane locate_lane(const int64_t* counts, int64_t component) {
  int64_t before = 0;
  int i = 0;
  for (; i < kMaxBits - 1 && component >= counts[i]; ++i) {
    component -= counts[i];
    before += counts[i] * (kMaxBits - i);
  }
  const int bits = kMaxBits - i;
  return {bits, before + component * bits};
}

}  // namespace adamix
