#pragma once

#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_down_product.cuh"
#include "delta_gemm/word_stream.cuh"

// V in tiles, and a warp's way through them.
namespace adamix {

// Tiles are runs; see routes.cuh.
struct DownTiles {
  int panels;

  __device__ int tiles(int, const Entry& entry) const { return DownRuns::count(entry.down.counts); }
  __device__ int64_t cost(int, const Entry& entry) const {
    return int64_t{panels} * DownRuns::cost(entry.down.counts);
  }
  __device__ int tile_at(int, const Entry& entry, int part, int parts) const {
    int rest;
    const int cost = divide(DownRuns::cost(entry.down.counts) * part, parts, rest);
    return DownRuns::begin_before(entry.down.counts, cost);
  }
  __device__ int tile_from(int, const Entry& entry, int64_t cost) const {
    return DownRuns::begin_before(entry.down.counts,
                                  static_cast<int>((cost + panels - 1) / panels));
  }
};

// A warp's way through its part of (tiles of a batch) x (panels of a chunk).
class DownWalk : public Cursor {
 public:
  __device__ DownWalk(const Run* tiles, const Factor& factor, int first_panel, int last_panel,
                      int tile, int panel, int stages)
      : Cursor(factor, stages),
        tiles_(tiles),
        first_panel_(first_panel),
        last_panel_(last_panel),
        tile_(tile),
        panel_(panel) {
    if (left_ > 0) place(tiles_[tile_], panel_);
  }

  __device__ __forceinline__ void next() {
    if (--left_ == 0) return;
    source_ += factor_.panel_words;
    if (++panel_ < last_panel_ && panel_ < factor_.even_panels) return;
    if (panel_ == last_panel_) panel_ = first_panel_, ++tile_;
    place(tiles_[tile_], panel_);
  }

 private:
  const Run* tiles_;
  const int first_panel_, last_panel_;
  int tile_, panel_;
};

}  // namespace adamix
