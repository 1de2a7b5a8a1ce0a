// Both back ends on the same inputs: pack there, unpack here, and the other way. Skipped by name
// without a GPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "bitpack/bitpack.h"
#include "bitpack/bitpack_cuda.h"
#include "layout/packed_layout.h"

namespace adamix {
namespace {

class CudaMatchesCpu : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device";
  }
};

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

template <typename T>
MatrixView<T> view(T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols};
}

std::vector<uint8_t> random_codes(int64_t count, int bits) {
  std::mt19937 random(7);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (auto& code : codes) code = static_cast<uint8_t>(random() & max_code(bits));
  return codes;
}

const int64_t kSizes[] = {1, 31, 32, 33, 255, 256, 257, 1000};
constexpr int64_t kLanes = 5;

TEST_P(CudaMatchesCpu, PackWritesTheSameWords) {
  const int bits = GetParam();
  for (const int64_t n : kSizes) {
    const auto codes = random_codes(kLanes * n, bits);
    std::vector<uint32_t> expected(static_cast<size_t>(kLanes * lane_words(n, bits)), 0xdeadbeefu);
    const DeviceArray<uint8_t> device_codes(codes);
    const DeviceArray<uint32_t> device_words(expected);
    const int64_t words = lane_words(n, bits);
    pack_cpu({view(expected.data(), kLanes, words), view(codes.data(), kLanes, n), bits},
             serial_for);
    const uint8_t* source = device_codes.data();
    ASSERT_EQ(launch_pack({view(device_words.data(), kLanes, words), view(source, kLanes, n), bits},
                          nullptr),
              cudaSuccess);
    EXPECT_EQ(device_words.to_host(), expected) << n << " codes";
  }
}

TEST_P(CudaMatchesCpu, UnpackReadsWhatTheCpuPacked) {
  const int bits = GetParam();
  for (const int64_t n : kSizes) {
    const auto codes = random_codes(kLanes * n, bits);
    const int64_t words = lane_words(n, bits);
    std::vector<uint32_t> packed(static_cast<size_t>(kLanes * words));
    pack_cpu({view(packed.data(), kLanes, words), view(codes.data(), kLanes, n), bits}, serial_for);
    const DeviceArray<uint32_t> device_words(packed);
    const DeviceArray<uint8_t> device_codes(std::vector<uint8_t>(codes.size(), 0xaa));
    const uint32_t* source = device_words.data();
    ASSERT_EQ(
        launch_unpack({view(device_codes.data(), kLanes, n), view(source, kLanes, words), bits},
                      nullptr),
        cudaSuccess);
    EXPECT_EQ(device_codes.to_host(), codes) << n << " codes";
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, CudaMatchesCpu, ::testing::Range(1, kMaxBits + 1));

}  // namespace
}  // namespace adamix
