#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "bindings/tensor_args.h"
#include "delta_gemm/delta_gemm_cuda.h"

// Where a CUDA binding launches: torch's current stream on the tensor's device, with CUDA's errors
// in words.
namespace adamix::bindings {

inline void check_cuda(const char* op, cudaError_t status) {
  ADAMIX_CHECK(status == cudaSuccess, op, ": CUDA says: ", cudaGetErrorString(status));
}

// torch's current stream. The function is no global symbol and is missing where torch has no CUDA,
// where this library must load all the same: so it is looked up in the library that torch has
// loaded.
inline cudaStream_t current_stream(const char* op, int32_t device) {
  using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
  static const auto get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  void* stream = nullptr;
  ADAMIX_CHECK(get != nullptr && get(device, &stream) == 0, op,
               ": torch does not tell its current CUDA stream; is this torch built with CUDA?");
  return static_cast<cudaStream_t>(stream);
}

// Launches go to the tensor's device, whichever is current; the caller's device comes back
// afterwards.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, const Tensor& tensor) {
    check_cuda(op, cudaGetDevice(&previous_));
    differs_ = previous_ != tensor.get_device_index();
    if (differs_) check_cuda(op, cudaSetDevice(tensor.get_device_index()));
  }
  ~DeviceGuard() {
    if (differs_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool differs_ = false;  // to set a device again would wake one that nobody uses
};

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default: return Element::kFloat;
  }
}

inline const int32_t* ints(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

}  // namespace adamix::bindings
