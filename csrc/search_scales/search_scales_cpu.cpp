#include <algorithm>
#include <limits>

#include "common/cpu_clones.h"
#include "search_scales/search_scales.h"

// A vector is 16 strands side by side. It walks a lane's every 16th vector, as its strands have
// their entries, with the sums of 4 candidates in registers: the lane stays in the cache.
namespace adamix {
namespace {

constexpr int kVector = 16;
constexpr int kAtOnce = 4;           // x 16 strands: 4 AVX-512 registers, 8 of AVX2's 16
constexpr int64_t kGrain = 1 << 12;  // entries worth a thread
static_assert(kScaleCandidates % kAtOnce == 0 && kScaleStrands % kVector == 0);

using Strands = float[kScaleStrands];

// A lane. What its last vector lacks is made up by entries without weight: a loop of its own, over
// fewer, would not surely be compiled to the same roundings.
struct Entries {
  const float* values;
  const float* weights;  // null for ones
  int64_t n;
  float last;  // last_sum of the lane's top level
  float tail[kVector] = {}, tail_weights[kVector] = {};

  Entries(const float* values, const float* weights, int64_t n, float top)
      : values(values), weights(weights), n(n), last(last_sum(top)) {
    for (int64_t i = n - n % kVector; i < n; ++i) {
      tail[i % kVector] = values[i];
      tail_weights[i % kVector] = weights != nullptr ? weights[i] : 1.0f;
    }
  }
};

struct Rounded {
  float level, residual;
};

inline Rounded round_to_level(float value, float inverse, float last) {
  const float magnitude = std::fabs(value);
  float sum = magnitude * inverse + kLevelShift;
  sum = sum > kFirstSum ? sum : kFirstSum;
  sum = sum < last ? sum : last;
  const float level = sum - kLevelShift;
  return {level, magnitude * inverse - level};
}

// Adds a vector of entries to its strands' sums for each candidate. No weights: ones.
template <bool kWeighted>
inline void add_errors(const float* values, const float* weights, float last, const float* inverses,
                       float (*sums)[kVector]) {
  for (int c = 0; c < kAtOnce; ++c) {
    for (int r = 0; r < kVector; ++r) {
      const float residual = round_to_level(values[r], inverses[c], last).residual;
      const float weighted = kWeighted ? residual * weights[r] : residual;
      sums[c][r] += weighted * residual;
    }
  }
}

// errors[c]: strands' sums at kAtOnce candidates.
template <bool kWeighted>
ADAMIX_CPU_CLONES void sum_errors(const Entries& entries, const float* inverses, Strands* errors) {
  const float* weights = entries.weights;
  for (int strand = 0; strand < kScaleStrands; strand += kVector) {
    float sums[kAtOnce][kVector] = {};
    int64_t i = strand;
    for (; i + kVector <= entries.n; i += kScaleStrands) {
      add_errors<kWeighted>(entries.values + i, kWeighted ? weights + i : nullptr, entries.last,
                            inverses, sums);
    }
    if (i < entries.n)
      add_errors<true>(entries.tail, entries.tail_weights, entries.last, inverses, sums);
    for (int c = 0; c < kAtOnce; ++c) std::copy_n(sums[c], kVector, errors[c] + strand);
  }
}

template <bool kWeighted>
inline void add_levels(const float* values, const float* weights, float last, float inverse,
                       float (*sums)[kVector]) {
  for (int r = 0; r < kVector; ++r) {
    const Rounded rounded = round_to_level(values[r], inverse, last);
    const float weighted = kWeighted ? rounded.residual * weights[r] : rounded.residual;
    const float power = kWeighted ? rounded.level * weights[r] : rounded.level;
    sums[0][r] += weighted * rounded.residual;
    sums[1][r] += weighted * rounded.level;
    sums[2][r] += power * rounded.level;
  }
}

// error, drift, power: strands' sums at one scale.
template <bool kWeighted>
ADAMIX_CPU_CLONES void sum_levels(const Entries& entries, float inverse, Strands* levels) {
  const float* weights = entries.weights;
  for (int strand = 0; strand < kScaleStrands; strand += kVector) {
    float sums[3][kVector] = {};
    int64_t i = strand;
    for (; i + kVector <= entries.n; i += kScaleStrands) {
      add_levels<kWeighted>(entries.values + i, kWeighted ? weights + i : nullptr, entries.last,
                            inverse, sums);
    }
    if (i < entries.n)
      add_levels<true>(entries.tail, entries.tail_weights, entries.last, inverse, sums);
    for (int c = 0; c < 3; ++c) std::copy_n(sums[c], kVector, levels[c] + strand);
  }
}

ADAMIX_CPU_CLONES void sum_magnitudes(const Entries& entries, float* sums, float* largest) {
  for (int64_t first = 0; first < entries.n; first += kScaleStrands) {
    const int count = static_cast<int>(std::min<int64_t>(kScaleStrands, entries.n - first));
    for (int strand = 0; strand < count; ++strand) {
      const float magnitude = std::fabs(entries.values[first + strand]);
      sums[strand] += magnitude;
      largest[strand] = magnitude > largest[strand] ? magnitude : largest[strand];
    }
  }
}

// As ORDER in search_scales.h says.
float total(Strands& sums) {
  float all = 0.0f;
  for (int run = 0; run < kScaleStrands; run += kScaleRun) {
    for (int apart = kScaleRun / 2; apart > 0; apart /= 2) {
      for (int i = 0; i < apart; ++i) sums[run + i] += sums[run + i + apart];
    }
    all += sums[run];
  }
  return all;
}

LevelSums levels_at(const Entries& entries, float scale) {
  Strands sums[3];
  const float inverse = 1.0f / scale;
  if (entries.weights != nullptr) {
    sum_levels<true>(entries, inverse, sums);
  } else {
    sum_levels<false>(entries, inverse, sums);
  }
  return {total(sums[0]), total(sums[1]), total(sums[2])};
}

// The first of the best candidates; the widest where none has an error.
float best_candidate(const Entries& entries, const float* candidates) {
  const float widest = candidates[kScaleCandidates - 1];
  float best = widest, least = std::numeric_limits<float>::infinity();
  for (int first = 0; first < kScaleCandidates; first += kAtOnce) {
    float inverses[kAtOnce];
    Strands errors[kAtOnce];
    for (int c = 0; c < kAtOnce; ++c) inverses[c] = 1.0f / candidates[first + c];
    if (entries.weights != nullptr) {
      sum_errors<true>(entries, inverses, errors);
    } else {
      sum_errors<false>(entries, inverses, errors);
    }
    for (int c = 0; c < kAtOnce; ++c) {
      const float scale = candidates[first + c];
      const float error = comparable_error(total(errors[c]), scale, widest);
      if (error < least) best = scale, least = error;
    }
  }
  return best;
}

float search(const Entries& entries, float top) {
  Strands sums = {}, largest = {};
  sum_magnitudes(entries, sums, largest);
  const float most = *std::max_element(largest, largest + kScaleStrands), sum = total(sums);
  float candidates[kScaleCandidates];
  for (int i = 0; i < kScaleCandidates; ++i) {
    candidates[i] = candidate_scale(most, sum, entries.n, top, i);
  }
  const float widest = candidates[kScaleCandidates - 1];
  float scale = best_candidate(entries, candidates), best = scale;
  float least = std::numeric_limits<float>::infinity();
  for (int pass = 0; pass <= kScaleRefinements && is_usable_scale(scale); ++pass) {
    const LevelSums levels = levels_at(entries, scale);
    const float error = comparable_error(levels.error, scale, widest);
    if (!(error < least)) break;
    best = scale, least = error;
    scale = fitted_scale(scale, levels);
  }
  return best;
}

}  // namespace

void search_scales_cpu(const SearchScalesArgs& args, const ParallelFor& parallel) {
  const int64_t n = args.lanes.cols, grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n));
  parallel(args.lanes.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      const float top = top_level(args.bits[lane]);
      args.scales[lane] = search({args.lanes.row(lane), args.weights, n, top}, top);
    }
  });
}

}  // namespace adamix
