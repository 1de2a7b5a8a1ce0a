#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/matrix_view.h"
#include "common/parallel.h"

// For every lane the scale with the least (weighted) squared error when each entry is rounded to
// the nearest of scale * level, levels being the odd whole numbers -top .. top, top = 2^bits - 1
// (packed_layout.h, VALUE):
//
//   widest      the largest magnitude / top: the scale that just reaches it
//   narrowest   the mean magnitude / top: the best there is at 1 bit, below the best at any other
//   candidates  32 scales in geometric steps from narrowest to widest, the best of them taken
//   refined     up to 5 times the least-squares scale of its nearest levels, while that is better
//
// Levels are symmetric, so magnitudes do. They are measured in scales, x = |w| * (1 / scale): a
// product in place of the codes' IEEE division, so an entry at a tie, or an ulp from it, may take
// the other of two levels that are equally near. The error is summed as (x - level)^2, which
// cancels nothing, where the largest squares of a lane would hide what its smallest errors differ
// by; and it neither over- nor underflows, whatever the lane's own unit.
//
// ORDER. Strand j of a lane sums its entries j, j + 256, .. one after the other; runs of 32 strands
// are summed pairwise, strands 16 apart first, then 8 .. 1; the 8 runs one after the other. CUDA
// and CPUs with FMA do the same operations in this order: the same scale, bit by bit, that depends
// on no other lane and no number of threads.
namespace adamix {

constexpr int kScaleCandidates = 32;
constexpr int kScaleRefinements = 5;
constexpr int kScaleStrands = 256;
constexpr int kScaleRun = 32;

struct SearchScalesArgs {
  // Outputs
  float* scales;  // [lanes], positive and finite, whatever the lane holds
  // Inputs
  MatrixView<const float> lanes;  // [lanes, n]
  const int32_t* bits;            // [lanes]; outside 1..8: counts as 1 or 8
  const float* weights;           // [n], what an entry's squared error costs; null for ones
};

void search_scales_cpu(const SearchScalesArgs& args, const ParallelFor& parallel);

// --- one entry -----------------------------------------------------------------------------------

// From 2^24 on, fp32 are 2 apart. A sum with 2^24 - 1 so rounds x - 1 to a multiple of 2, x to an
// odd number; what is below 2^24 or above last_sum is off the levels. Faster than floor, which few
// units of a GPU can do.
constexpr float kFirstSum = 0x1p24f;
constexpr float kLevelShift = kFirstSum - 1.0f;

ADAMIX_HD inline float top_level(int32_t bits) {
  const int width = bits < 1 ? 1 : bits > 8 ? 8 : bits;
  return static_cast<float>((1 << width) - 1);
}

ADAMIX_HD inline float last_sum(float top) {
  return kLevelShift + top;
}

// --- one lane: on both devices the same bits -----------------------------------------------------

// What is smaller has no error worth a scale.
constexpr float kLeastMagnitude = 0x1p-86f;
constexpr float kMostMagnitude = 3.40282347e38f;

// A NaN takes the least.
ADAMIX_HD inline float usable_magnitude(float magnitude) {
  const float raised = magnitude > kLeastMagnitude ? magnitude : kLeastMagnitude;
  return raised < kMostMagnitude ? raised : kMostMagnitude;
}

// Candidate i of a lane with this largest magnitude and this sum of them.
ADAMIX_HD inline float candidate_scale(float largest, float sum, int64_t n, float top, int i) {
  const double widest = usable_magnitude(largest) / top;
  const double mean = usable_magnitude(sum / static_cast<float>(n)) / top;
  const double narrowest = mean < widest ? mean : widest;
  const double share = i / (kScaleCandidates - 1.0);
  return static_cast<float>(narrowest * std::pow(widest / narrowest, share));
}

// Errors of one lane at several scales, made comparable: they are summed in squared scales.
ADAMIX_HD inline float comparable_error(float error, float scale, float widest) {
  const float ratio = scale / widest;
  return error * (ratio * ratio);
}

// Sums over a lane's entries at one scale, x - level being the residual.
struct LevelSums {
  float error = 0.0f;  // residual^2
  float drift = 0.0f;  // residual * level
  float power = 0.0f;  // level^2
};

// The least-squares scale of the levels that are nearest at `scale`.
ADAMIX_HD inline float fitted_scale(float scale, const LevelSums& sums) {
  return scale * (1.0f + sums.drift / sums.power);
}

// Whether it is a normal number and so has a finite reciprocal.
ADAMIX_HD inline bool is_usable_scale(float scale) {
  return scale >= 0x1p-126f && scale <= kMostMagnitude;
}

}  // namespace adamix
