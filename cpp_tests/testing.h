#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "common/matrix_view.h"
#include "common/parallel.h"

// What the kernels' tests share: views over vectors, random numbers, and threads without torch.
namespace adamix::testing {

template <typename T>
MatrixView<T> view(std::vector<T>& data, int64_t rows, int64_t cols) {
  return {data.data(), rows, cols, cols};
}

template <typename T>
MatrixView<const T> const_view(const std::vector<T>& data, int64_t rows, int64_t cols) {
  return {data.data(), rows, cols, cols};
}

inline std::vector<uint8_t> random_codes(int64_t count, int bits, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (auto& code : codes) code = static_cast<uint8_t>(random() & ((1u << bits) - 1u));
  return codes;
}

inline std::vector<float> random_normal(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (auto& value : values) value = normal(random);
  return values;
}

// Every index in a range of its own, ranges dealt to the threads in turn: the least like
// serial_for.
inline ParallelFor threads_for(int threads) {
  return [threads](int64_t n, int64_t /*grain*/, const RangeBody& body) {
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread) {
      pool.emplace_back([&, thread] {
        for (int64_t i = thread; i < n; i += threads) body(i, i + 1);
      });
    }
    for (auto& thread : pool) thread.join();
  };
}

}  // namespace adamix::testing
