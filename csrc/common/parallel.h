#pragma once

#include <cstdint>
#include <functional>

namespace adamix {

using RangeBody = std::function<void(int64_t begin, int64_t end)>;

// Runs body over [0, n) in ranges of any size, in any order, on any threads; a range is at least
// `grain` long where n allows. Kernels receive one, so that the caller's thread pool rules; what
// they compute for an index may not depend on the range it came in. That is why results do not
// depend on the number of threads.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const RangeBody& body)>;

inline void serial_for(int64_t n, int64_t /*grain*/, const RangeBody& body) {
  if (n > 0) body(0, n);
}

}  // namespace adamix
