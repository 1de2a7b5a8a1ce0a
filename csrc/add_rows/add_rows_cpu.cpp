#include <algorithm>

#include "add_rows/add_rows.h"
#include "common/cpu_clones.h"
#include "common/float16.h"

namespace adamix {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

template <typename T>
ADAMIX_CPU_CLONES void add_row(T* __restrict y, const float* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_float<T>(to_float(y[i]) + values[i]);
}

}  // namespace

template <typename T>
void add_rows_cpu(const AddRowsArgs<T>& args, const ParallelFor& parallel) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.values.cols));
  parallel(args.ys[0].rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = args.slots[t];
      if (slot < 0 || slot >= args.values.rows) continue;
      const float* values = args.values.row(slot);
      for (int i = 0; i < args.y_count; ++i) {
        add_row(args.ys[i].row(t), values, args.ys[i].cols);
        values += args.ys[i].cols;
      }
    }
  });
}

template void add_rows_cpu(const AddRowsArgs<float>&, const ParallelFor&);
template void add_rows_cpu(const AddRowsArgs<Half>&, const ParallelFor&);
template void add_rows_cpu(const AddRowsArgs<BFloat16>&, const ParallelFor&);

}  // namespace adamix
