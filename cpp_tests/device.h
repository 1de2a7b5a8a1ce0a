#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <vector>

// What the tests of the CUDA kernels share. Built twice: by nvcc, where they skip by name without a
// GPU, and on the emulator (emulated_cuda), with ADAMIX_EMULATED.
namespace adamix::testing {

#if defined(ADAMIX_EMULATED)
constexpr bool kEmulated = true;  // and slow: tests with sizes that matter for speed take fewer
#else
constexpr bool kEmulated = false;
#endif

inline bool has_device() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

// Kernels' results are the CPU's, bit by bit, if that one multiplies and adds in one rounding, too.
// Without it a value on a boundary may fall to the other side, and all behind it feel it.
inline bool cpu_rounds_once() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
    EXPECT_EQ(cudaMalloc(&data_, size_ * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::vector<T> to_host() const {
    std::vector<T> host(size_);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

}  // namespace adamix::testing
