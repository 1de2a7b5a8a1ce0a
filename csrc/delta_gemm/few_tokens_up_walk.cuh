#pragma once

#include "delta_gemm/few_tokens.cuh"
#include "delta_gemm/few_tokens_up_product.cuh"
#include "delta_gemm/word_stream.cuh"

// What lies in shared memory for y += U z, U in tiles, and a warp's way through them.
namespace adamix {

constexpr int kUpPositions = 1536;  // components whose z is in shared memory at a time
constexpr int kUpRuns = kUpPositions / 16;
constexpr int kMaxUpWarps = 12;  // of 168 registers: 64 of them hold sums
constexpr int kUpDepth = 3;
constexpr int kUpRingWords = kUpDepth * kUpStageWords;  // a warp

// Rows of a panel in shared memory: thread g holds outputs 32g ..; 9 and 296 keep both the adding
// and the reading free of bank conflicts.
constexpr int kUpRowStride = 9;
constexpr int kUpColumnStride = 296;
constexpr int kZPlaneBytes = kUpPositions + 16;
static_assert(kColumns * kUpColumnStride <= kUpRingWords, "a ring has room for a panel's sums");

// Tiles are panels; see routes.cuh.
struct UpTiles {
  const DeltaLayer* layers;

  __device__ int tiles(int layer, const Entry&) const {
    return static_cast<int>(panel_count(layers[layer].out));
  }
  __device__ int64_t cost(int layer, const Entry& entry) const {
    return int64_t{tiles(layer, entry)} * UpRuns::cost(entry.up.counts);
  }
  __device__ int tile_at(int layer, const Entry& entry, int part, int parts) const {
    int rest;
    return divide(tiles(layer, entry) * part, parts, rest);
  }
  __device__ int tile_from(int, const Entry& entry, int64_t cost) const {
    const int each = UpRuns::cost(entry.up.counts);
    return static_cast<int>((cost + each - 1) / each);
  }
};

// Warps have shares of equal cost: stages of (panel, run), panels outside.
struct UpShare {
  int panel, run, stages;
};

// A warp's way through its part of (panels of a batch) x (runs of a chunk): where a chunk has all
// runs, words that follow each other.
class UpWalk : public Cursor {
 public:
  __device__ UpWalk(const Run* runs, int run_count, const Factor& factor, int panel, int run,
                    int stages)
      : Cursor(factor, stages), runs_(runs), run_count_(run_count), panel_(panel), run_(run) {
    if (left_ > 0) place(runs_[run_], panel_);
  }

  __device__ __forceinline__ void next() {
    if (--left_ == 0) return;
    if (++run_ < run_count_ && even_) {
      source_ += block_words_ * kPanelBlocks;
      set_run(runs_[run_]);
      return;
    }
    if (run_ == run_count_) run_ = 0, ++panel_;
    place(runs_[run_], panel_);
  }

 private:
  const Run* runs_;
  const int run_count_;
  int panel_, run_;
};

}  // namespace adamix
