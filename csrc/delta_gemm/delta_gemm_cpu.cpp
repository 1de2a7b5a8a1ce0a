#include <vector>

#include "common/cpu_clones.h"
#include "common/float16.h"
#include "delta_gemm/delta_gemm.h"
#include "delta_gemm/token_groups.h"
#include "layout/packed_layout.h"

// Two phases over groups of tokens (token_groups.h). The first makes z, one (group, component) at a
// time: a lane of V, gathered from its panels, is turned into float levels once and serves the
// whole group. The second adds U's lanes times z to y.
namespace adamix {
namespace {

constexpr int kVector = 32;  // partial sums of a dot product: two AVX-512 registers
static_assert(kBlockCodes % kVector == 0, "a padded row is whole vectors");

// n is a multiple of kVector. One token at a time: tiles of four tokens were no faster, since GCC
// shuffles them.
ADAMIX_CPU_CLONES float dot(const float* __restrict levels, const float* __restrict x, int64_t n) {
  float sum[kVector] = {};
  for (int64_t i = 0; i < n; i += kVector) {
    for (int v = 0; v < kVector; ++v) sum[v] += levels[i + v] * x[i + v];
  }
  float total = 0.0f;
  for (int v = 0; v < kVector; ++v) total += sum[v];
  return total;
}

template <typename T>
class DeltaGemm {
 public:
  explicit DeltaGemm(const DeltaGemmArgs<T>& args)
      : args_(args),
        padded_in_(block_count(args.x.cols) * kBlockCodes),
        groups_(group_tokens(args.table, args.slots, args.x.rows)) {}

  void run(const ParallelFor& parallel) {
    x_.resize(static_cast<size_t>(padded_in_ * groups_.sorted_tokens()));
    z_.resize(static_cast<size_t>(groups_.z_floats));
    parallel(groups_.sorted_tokens(), 8, [&](int64_t begin, int64_t end) { gather_x(begin, end); });
    parallel(groups_.items, 1, [&](int64_t begin, int64_t end) { down(begin, end); });
    add_lanes<T>({args_.y, z_.data(), args_.arena, args_.table, u_columns()}, groups_, parallel);
  }

 private:
  // x in fp32, in sorted order, with zeros behind each row: the padding codes of a lane's last
  // block meet those.
  void gather_x(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* source = args_.x.row(groups_.token_of[i]);
      float* target = x_.data() + i * padded_in_;
      for (int64_t k = 0; k < args_.x.cols; ++k) target[k] = to_float(source[k]);
    }
  }

  // z[token][component] = scale * (V_level[component] . x[token])
  void down(int64_t begin, int64_t end) {
    std::vector<float> levels(static_cast<size_t>(padded_in_));
    for (int64_t item = begin; item < end; ++item) {
      const TokenGroup& group = groups_.group_of_item(item);
      const int64_t component = item - group.first_item;
      const int64_t* entry = args_.table.row(group.slot);
      const PackedFactor v{args_.arena + entry[kTableVOffset], args_.x.cols,
                           entry + kTableFirstVCount};
      levels_of_lane(v, component, 0, panel_count(v.codes), levels.data());
      const float scale = float_from_bits(args_.arena[entry[kTableScaleOffset] + component]);
      float* z = z_.data() + group.z_offset + component;
      for (int64_t t = 0; t < group.tokens; ++t) {
        const float* x = x_.data() + (group.first_token + t) * padded_in_;
        z[t * group.rank] = scale * dot(levels.data(), x, padded_in_);
      }
    }
  }

  const DeltaGemmArgs<T>& args_;
  int64_t padded_in_;
  TokenGroups groups_;
  std::vector<float> x_;  // [sorted tokens, padded_in]
  std::vector<float> z_;
};

}  // namespace

template <typename T>
void delta_gemm_cpu(const DeltaGemmArgs<T>& args, const ParallelFor& parallel) {
  DeltaGemm<T>(args).run(parallel);
}

template void delta_gemm_cpu(const DeltaGemmArgs<float>&, const ParallelFor&);
template void delta_gemm_cpu(const DeltaGemmArgs<Half>&, const ParallelFor&);
template void delta_gemm_cpu(const DeltaGemmArgs<BFloat16>&, const ParallelFor&);

}  // namespace adamix
