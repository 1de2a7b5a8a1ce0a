#include <algorithm>
#include <cstring>

#include "bitpack/bitpack.h"
#include "common/for_bits.h"
#include "layout/block_bytes.h"
#include "layout/packed_layout.h"

namespace adamix {
namespace {

constexpr int64_t kCodesPerRange = 1 << 15;  // a few tens of microseconds: worth a thread

template <int kBits>
void pack_lane(const uint8_t* codes, int64_t n, uint32_t* words) {
  for (int64_t first = 0; first < n; first += kBlockCodes, words += kBits) {
    uint32_t bytes[kBlockFields] = {}, block[kBits];
    const int64_t valid = std::min<int64_t>(kBlockCodes, n - first);
    if (valid == kBlockCodes) {
      std::memcpy(bytes, codes + first, sizeof bytes);  // a constant size: no call
    } else {
      std::memcpy(bytes, codes + first, static_cast<size_t>(valid));
    }
    pack_block<kBits>(bytes, block);
    std::memcpy(words, block, sizeof block);
  }
}

template <int kBits>
void unpack_lane(const uint32_t* words, int64_t n, uint8_t* codes) {
  for (int64_t first = 0; first < n; first += kBlockCodes, words += kBits) {
    uint32_t bytes[kBlockFields], block[kBits];
    std::memcpy(block, words, sizeof block);
    unpack_block<kBits>(block, bytes);
    const int64_t valid = std::min<int64_t>(kBlockCodes, n - first);
    if (valid == kBlockCodes) {
      std::memcpy(codes + first, bytes, sizeof bytes);
    } else {
      std::memcpy(codes + first, bytes, static_cast<size_t>(valid));
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
