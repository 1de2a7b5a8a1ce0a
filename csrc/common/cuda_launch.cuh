#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <vector>

// How kernels are launched, and what they must know of the device for it.
namespace adamix {

struct Device {
  int id = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;  // that one thread block may have
};

// An error that is told here must not be told again to whoever asks CUDA next.
inline cudaError_t told(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

inline cudaError_t current_device(Device& device) {
  cudaError_t status = cudaGetDevice(&device.id);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device.id);
  };
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return told(status);
}

constexpr int kReservedBytes = 1024;  // what the system keeps of a thread block's shared memory

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // dynamic
};

// What is found out once for every kernel on every device.
struct KernelFacts {
  const void* kernel;
  int device;
  bool overlaps;  // compiled for sm_90 or later, so that wait_for_previous_kernel() waits
};

// Lets a kernel have all the shared memory there is: a limit that a launch on another thread cannot
// lower again. And all kernels the same division of a multiprocessor's memory, the one with most of
// it shared: those that overlap could not be on one multiprocessor else.
inline cudaError_t prepare_kernel(const void* kernel, const Device& device, KernelFacts& facts) {
  static std::mutex mutex;
  static std::vector<KernelFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const KernelFacts& one : known) {
    if (one.kernel == kernel && one.device == device.id) return facts = one, cudaSuccess;
  }
  cudaFuncAttributes attributes = {};
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return told(status);
  const int fixed = static_cast<int>(attributes.sharedSizeBytes);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                device.shared_bytes - fixed);
  if (status != cudaSuccess) return told(status);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return told(status);
  known.push_back(facts = {kernel, device.id, attributes.ptxVersion >= 90});
  return cudaSuccess;
}

template <typename... Args>
cudaError_t launch_configured(void (*kernel)(Args...), const Grid& grid, cudaLaunchConfig_t config,
                              const Args&... args) {
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  return told(cudaLaunchKernelEx(&config, kernel, args...));
}

// kernel<<<grid>>>(args...).
template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), const Grid& grid, cudaStream_t stream,
                   const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  return launch_configured(kernel, grid, config, args...);
}

// The same, with any shared memory, and the kernel may start while the one before it on the stream
// still runs, where the device can do that. Only for kernels that call wait_for_previous_kernel()
// before they read what others wrote or write what others read.
template <typename... Args>
cudaError_t launch_overlapped(void (*kernel)(Args...), const Grid& grid, const Device& device,
                              cudaStream_t stream, const Args&... args) {
  KernelFacts facts = {};
  const cudaError_t status = prepare_kernel(reinterpret_cast<const void*>(kernel), device, facts);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = facts.overlaps ? 1 : 0;
  return launch_configured(kernel, grid, config, args...);
}

}  // namespace adamix
