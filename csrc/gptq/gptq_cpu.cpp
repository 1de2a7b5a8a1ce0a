#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu_clones.h"
#include "gptq/gptq.h"
#include "layout/packed_layout.h"

// Speed: 32 rows at a time, held transposed, so that the arithmetic of a column is a vector over
// rows. Columns go in blocks of 128: inside a block an error is pushed at once, to the columns
// behind the block all errors in one product, with 4 columns x 32 rows of the result in registers.
// hinv, by far the largest operand, is then read once a tile of rows. Blocks of 64 and 32 columns
// were 5 and 10 % slower.
namespace adamix {
namespace {

constexpr int kTileRows =
    32;  // two AVX-512 registers share a broadcast of hinv: 112 GFLOP/s; one: 72
constexpr int kBlockColumns = 128;
constexpr int kPushColumns = 4;  // x 2 accumulators in flight: hides the latency of FMA

// Scale, half of the levels and highest code of the lane that each row of the tile is in.
struct TileLanes {
  float scale[kTileRows];
  float half[kTileRows];
  float top[kTileRows];

  void set(int row, float lane_scale, int bits) {
    scale[row] = lane_scale;
    half[row] = static_cast<float>(1 << (bits - 1));
    top[row] = static_cast<float>(max_code(bits));
  }
};

// Quantizes one column of the tile: codes, and the errors over hinv's diagonal.
ADAMIX_CPU_CLONES void quantize_column(const float* __restrict column, const TileLanes& lanes,
                                       float diagonal, float* __restrict err,
                                       uint8_t* __restrict codes) {
  for (int r = 0; r < kTileRows; ++r) {
    const float scale = lanes.scale[r];
    float q = std::floor(column[r] / (2.0f * scale)) + lanes.half[r];
    q = q > 0.0f ? q : 0.0f;  // this way round, a NaN becomes 0 before it is converted
    q = q < lanes.top[r] ? q : lanes.top[r];
    err[r] = (column[r] - scale * (2.0f * q - lanes.top[r])) / diagonal;
    codes[r] = static_cast<uint8_t>(static_cast<int>(q));
  }
}

// columns[k][:] -= err[:] * hinv_row[k] for `count` columns.
ADAMIX_CPU_CLONES void push_one_error(const float* __restrict err, const float* __restrict hinv_row,
                                      int64_t count, float* __restrict columns) {
  for (int64_t k = 0; k < count; ++k) {
    for (int r = 0; r < kTileRows; ++r) columns[k * kTileRows + r] -= err[r] * hinv_row[k];
  }
}

// columns[k][:] -= sum over j of err[j][:] * hinv[j][k] for `steps` errors and `count` columns.
ADAMIX_CPU_CLONES void push_block_errors(const float* __restrict err, const float* __restrict hinv,
                                         int64_t hinv_stride, int64_t steps, int64_t count,
                                         float* __restrict columns) {
  int64_t k = 0;
  for (; k + kPushColumns <= count; k += kPushColumns) {
    float* tile = columns + k * kTileRows;
    float sum[kPushColumns][kTileRows] = {};
    for (int64_t j = 0; j < steps; ++j) {
      const float* factors = hinv + j * hinv_stride + k;
#pragma GCC unroll 4
      for (int c = 0; c < kPushColumns; ++c) {
        for (int r = 0; r < kTileRows; ++r) sum[c][r] += err[j * kTileRows + r] * factors[c];
      }
    }
    for (int c = 0; c < kPushColumns; ++c) {
      for (int r = 0; r < kTileRows; ++r) tile[c * kTileRows + r] -= sum[c][r];
    }
  }
  for (; k < count; ++k) {
    float sum[kTileRows] = {};
    for (int64_t j = 0; j < steps; ++j) {
      const float factor = hinv[j * hinv_stride + k];
      for (int r = 0; r < kTileRows; ++r) sum[r] += err[j * kTileRows + r] * factor;
    }
    for (int r = 0; r < kTileRows; ++r) columns[k * kTileRows + r] -= sum[r];
  }
}

class TileQuantizer {
 public:
  explicit TileQuantizer(const GptqArgs& args)
      : args_(args), tile_(static_cast<size_t>(args.weight.cols * kTileRows)) {}

  void run(int64_t first_row) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, args_.weight.rows - first_row));
    const int64_t n = args_.weight.cols;
    load(first_row, rows);
    for (int64_t begin = 0; begin < n; begin += kBlockColumns) {
      const int64_t end = std::min<int64_t>(n, begin + kBlockColumns);
      quantize_block(begin, end);
      store_codes(first_row, rows, begin, end);
      push_block_errors(err_[0], args_.hinv.row(begin) + end, args_.hinv.row_stride, end - begin,
                        n - end, column(end));
    }
  }

 private:
  float* column(int64_t j) { return tile_.data() + j * kTileRows; }

  // Rows that are not there hold zeros in a lane of scale 1: they cost time, not meaning.
  void load(int64_t first_row, int rows) {
    for (int64_t j = 0; j < args_.weight.cols; ++j) {
      for (int r = 0; r < kTileRows; ++r) {
        column(j)[r] = r < rows ? args_.weight.row(first_row + r)[j] : 0.0f;
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      const bool has_lane = args_.by_row && r < rows;
      lanes_.set(r, has_lane ? args_.scales[first_row + r] : 1.0f,
                 has_lane ? args_.bits[first_row + r] : 1);
    }
  }

  void quantize_block(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (!args_.by_row) {
        for (int r = 0; r < kTileRows; ++r) lanes_.set(r, args_.scales[j], args_.bits[j]);
      }
      const float* hinv_row = args_.hinv.row(j);
      float* err = err_[j - begin];
      quantize_column(column(j), lanes_, hinv_row[j], err, codes_[j - begin]);
      push_one_error(err, hinv_row + j + 1, end - j - 1, column(j + 1));
    }
  }

  void store_codes(int64_t first_row, int rows, int64_t begin, int64_t end) const {
    for (int r = 0; r < rows; ++r) {
      uint8_t* row = args_.codes.row(first_row + r);
      for (int64_t j = begin; j < end; ++j) row[j] = codes_[j - begin][r];
    }
  }

  const GptqArgs& args_;
  std::vector<float> tile_;  // [n][kTileRows]
  TileLanes lanes_;
  float err_[kBlockColumns][kTileRows];
  uint8_t codes_[kBlockColumns][kTileRows];
};

}  // namespace

void gptq_cpu(const GptqArgs& args, const ParallelFor& parallel) {
  const int64_t tiles = (args.weight.rows + kTileRows - 1) / kTileRows;
  parallel(tiles, 1, [&](int64_t begin, int64_t end) {
    TileQuantizer quantizer(args);
    for (int64_t tile = begin; tile < end; ++tile) quantizer.run(tile * kTileRows);
  });
}

}  // namespace adamix
