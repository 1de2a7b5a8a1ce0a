#include <algorithm>

#include "bitpack/bitpack.h"
#include "common/for_bits.h"
#include "layout/packed_layout.h"

namespace adamix {
namespace {

constexpr int64_t kCodesPerRange = 1 << 15;  // a few tens of microseconds: worth a thread

template <int kBits>
void pack_lane(const uint8_t* codes, int64_t n, uint32_t* words) {
  for (int64_t first = 0; first < n; first += kBlockCodes, words += kBits) {
    const int valid = static_cast<int>(std::min<int64_t>(kBlockCodes, n - first));
    std::fill_n(words, kBits, 0u);
    for (int i = 0; i < valid; ++i) write_code(words, i, kBits, codes[first + i]);
  }
}

template <int kBits>
void unpack_lane(const uint32_t* words, int64_t n, uint8_t* codes) {
  for (int64_t first = 0; first < n; first += kBlockCodes, words += kBits) {
    const int valid = static_cast<int>(std::min<int64_t>(kBlockCodes, n - first));
    for (int i = 0; i < valid; ++i) {
      codes[first + i] = static_cast<uint8_t>(read_code(words, i, kBits));
    }
  }
}

int64_t lanes_per_range(int64_t codes) {
  return std::max<int64_t>(1, kCodesPerRange / std::max<int64_t>(1, codes));
}

}  // namespace

void pack_cpu(const PackArgs& args, const ParallelFor& parallel) {
  const int64_t n = args.codes.cols;
  for_bits(args.bits, [&](auto bits) {
    parallel(args.codes.rows, lanes_per_range(n), [&](int64_t begin, int64_t end) {
      for (int64_t lane = begin; lane < end; ++lane) {
        pack_lane<bits.value>(args.codes.row(lane), n, args.words.row(lane));
      }
    });
  });
}

void unpack_cpu(const UnpackArgs& args, const ParallelFor& parallel) {
  const int64_t n = args.codes.cols;
  for_bits(args.bits, [&](auto bits) {
    parallel(args.codes.rows, lanes_per_range(n), [&](int64_t begin, int64_t end) {
      for (int64_t lane = begin; lane < end; ++lane) {
        unpack_lane<bits.value>(args.words.row(lane), n, args.codes.row(lane));
      }
    });
  });
}

}  // namespace adamix
