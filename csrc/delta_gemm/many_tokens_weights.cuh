#pragma once

#include "delta_gemm/elements.cuh"
#include "delta_gemm/tile_product.cuh"
#include "delta_gemm/word_stream.cuh"

// Packed words -> a tile of 16-bit levels, the second operand of a tile product. A thread makes one
// line of the tile (tile_product.cuh): the 64 codes of two adjacent blocks of a lane.
//
//   V   line l   component exchanged(l) of the tile       its 64 inputs of the step
//   U   line l   component l % 64 of the step             64 outputs, the tile's first or last
//
// Words are loaded a turn ahead, and stay packed in registers until then.
namespace adamix {

// What one product is of. `tokens` are rows of x or z.
struct Product {
  Factor factor;
  Counts counts;
  int rank;
  int first_row;   // of the tile: component or output
  int first_step;  // of 64 k
  int last_step;
  int first_token;  // sorted
  int tokens;
  int layer, part;
  int64_t scale_offset;
};

constexpr int kStepBlocks = kStepCodes / kBlockCodes;

// Where in a byte a field's codes are wanted: where they lie, if that is at a bit from 1 on and
// within the mantissa of T, else at bit 1, or at 0 if there is no room.
template <typename T, int kBits>
ADAMIX_HD constexpr int wanted_bit(int field) {
  constexpr int kRoom = std::is_same_v<T, __half> ? 8 : 7;
  const int whole = 8 / kBits;
  const int bit = field < whole * kBits ? field % whole * kBits : 0;
  if (bit >= 1 && bit + kBits <= kRoom) return bit;
  return kBits < kRoom ? 1 : 0;
}

// A number's M = 1024 or 128, whose last mantissa bit counts one: put behind its exponent, a code q
// from bit a on reads M + 2^a q.
template <typename T>
struct Exponent {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr uint32_t kBits = kHalf ? 10 : 7;  // of the mantissa
  static constexpr uint32_t kOne = kHalf ? 0x3c00u : 0x3f80u, kTwo = 0x4000u, kMinus = 0x8000u;
  static constexpr uint32_t kM = kOne + (kBits << kBits);

  ADAMIX_HD static constexpr uint32_t number(uint32_t whole) {
    return kHalf ? half_bits(whole) : bfloat16_bits(whole);
  }
};

ADAMIX_HD constexpr uint32_t both(uint32_t one) {
  return one << 16 | one;
}

// Two codes q, from bit kAt of the low bytes of the halves of a word on -> two levels
// 2q - (2^b - 1), exact. m: both(M).
template <typename T, int kBits, int kAt>
__device__ __forceinline__ uint32_t levels(uint32_t codes, uint32_t m) {
  using E = Exponent<T>;
  if constexpr (kAt >= 1) {
    constexpr uint32_t kFactor = E::kTwo - (kAt << E::kBits);  // 2^(1 - kAt)
    constexpr uint32_t kTop = E::number((2u << (E::kBits - kAt)) + max_code(kBits)) | E::kMinus;
    return fma_pair<T>(codes | m, both(kFactor), both(kTop));
  } else if constexpr (E::kHalf || kBits < 8) {
    const uint32_t q = fma_pair<T>(codes | m, both(E::kOne), both(E::kM | E::kMinus));
    return fma_pair<T>(q, both(E::kTwo), both(E::number(max_code(kBits)) | E::kMinus));
  } else {
    // A bf16 has room for 128 + 7 bits: 4 (q / 2) - 255, then 2 more where q is odd.
    const uint32_t half = codes >> 1 & 0x007f007fu;
    const uint32_t q = fma_pair<T>(half | m, both(E::kOne), both(E::kM | E::kMinus));
    const uint32_t even = fma_pair<T>(q, both(E::number(4)), both(E::number(255) | E::kMinus));
    return fma_pair<T>((codes & 0x00010001u) << 14, both(E::kOne), even);
  }
}

// The levels of a block, in pairs of adjacent codes.
template <typename T, int kBits, int... kFields>
__device__ __forceinline__ void decode_fields(const uint32_t* block, uint32_t m,
                                              uint32_t (&pairs)[kBlockCodes / 2],
                                              std::integer_sequence<int, kFields...>) {
  uint32_t behind[kBits];  // bytes 1 and 3 where 0 and 2 were
#pragma unroll
  for (int i = 0; i < kBits; ++i) behind[i] = block[i] >> 8;
  const auto decode = [&](auto field) {
    constexpr int kField = decltype(field)::value, kAt = wanted_bit<T, kBits>(kField);
    constexpr bool kWhole = kField < 8 / kBits * kBits;  // else put together of leftover bits, once
    constexpr uint32_t kMask = both(max_code(kBits)) << kAt;
    const uint32_t first = read_field<kBits>(block, kField, kAt);
    const uint32_t second = kWhole ? read_field<kBits>(behind, kField, kAt) : first >> 8;
    pairs[2 * kField] = levels<T, kBits, kAt>(first & kMask, m);
    pairs[2 * kField + 1] = levels<T, kBits, kAt>(second & kMask, m);
  };
  (decode(std::integral_constant<int, kFields>{}), ...);
}

// Components of one width: which ones, and where the words of their lanes begin.
struct WidthRange {
  int bits = kMaxBits + 1;
  int end = 0;     // the first component behind
  int origin = 0;  // words before component c for one block of codes: origin + c * bits

  // To the range of a component in this one or behind it. Needs component < rank.
  __device__ void seek(const Counts& counts, int component) {
    while (component >= end) {
      --bits;
      origin += end;  // the lanes before have a bit less now
      end += counts.at[kMaxBits - bits];
    }
  }
};

// kUp: of U, else of V.
template <typename T, bool kUp>
class Weights {
 public:
  static constexpr uint32_t kM = both(Exponent<T>::kM);

  // counts: of the product, in shared memory. m: kM, but the compiler must not know it, or it takes
  // two instructions to mask codes and put m over them: one has room for one constant only.
  __device__ void begin(const Product& product, const Counts& counts, uint32_t m, int thread) {
    m_ = m;
    line_ = thread;
    whole_words_ = reinterpret_cast<uintptr_t>(product.factor.words) % 16 == 0;
    range_ = WidthRange{};
    if constexpr (kUp) {
      place(product.factor, product.first_row / kBlockCodes + line_ / kStepCodes * kStepBlocks);
    } else {
      component_ = min(product.first_row + exchanged(line_), product.rank - 1);
      range_.seek(counts, component_);
    }
  }

  // Where the words of a step are. Behind the last component or input stand any codes: z, or x, is
  // zero there.
  __device__ void aim(const Product& product, const Counts& counts, int step) {
    if constexpr (kUp) {
      component_ = min(step * kStepCodes + line_ % kStepCodes, product.rank - 1);
      range_.seek(counts, component_);
    } else {
      place(product.factor, step * kStepBlocks);
    }
    const int before = range_.origin + component_ * range_.bits;
    source_ = panel_ + (before * panel_blocks_ + first_block_ * range_.bits);
  }

  __device__ void load() {
    if (whole_words_ && panel_blocks_ == kPanelBlocks) {
      for_width(range_.bits, [&](auto width) {
        constexpr int kCount = kStepBlocks * decltype(width)::value;
        uint32_t loaded[kCount];
        load_words(source_, loaded);
#pragma unroll
        for (int i = 0; i < kCount; ++i) words_[i] = loaded[i];
      });
      return;
    }
    const int count = max(0, min(kStepBlocks, panel_blocks_ - first_block_)) * range_.bits;
#pragma unroll
    for (int i = 0; i < kStepBlocks * kMaxBits; ++i) words_[i] = i < count ? source_[i] : 0u;
  }

  // Into the tile at a shared address.
  __device__ void store(uint32_t tile) const {
    const uint32_t line = tile + 16 * chunk_of(line_, 0);
    for_width(range_.bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
#pragma unroll
      for (int block = 0; block < kStepBlocks; ++block) {
        uint32_t pairs[kBlockCodes / 2];
        decode_fields<T, kBits>(words_ + block * kBits, m_, pairs,
                                std::make_integer_sequence<int, kBlockFields>{});
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          constexpr int kFrom = kUp ? 1 : 4, kStep = kUp ? 4 : 1;  // U's rows are exchanged here
          const uint32_t* chunk = pairs + i * kFrom;
          store_shared(line ^ 16 * (block * 4 + i),
                       make_uint4(chunk[0], chunk[kStep], chunk[2 * kStep], chunk[3 * kStep]));
        }
      }
    });
  }

 private:
  __device__ void place(const Factor& factor, int block) {
    const int panel = block / kPanelBlocks;
    panel_ = factor.words + panel * factor.panel_words;
    panel_blocks_ = factor.blocks(panel);
    first_block_ = block % kPanelBlocks;
  }

  uint32_t m_ = 0;
  int line_ = 0;
  int component_ = 0;
  WidthRange range_;
  bool whole_words_ = false;  // whether several may be loaded at a time
  const uint32_t* panel_ = nullptr;
  int panel_blocks_ = 0;  // of a lane
  int first_block_ = 0;   // of the panel
  const uint32_t* source_ = nullptr;
  uint32_t words_[kStepBlocks * kMaxBits];
};

}  // namespace adamix
