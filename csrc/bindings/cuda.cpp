#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include "bindings/tensor_args.h"
#include "bitpack/bitpack_cuda.h"

// The CUDA kernels behind the operators: check, allocate, launch on torch's current stream. Plain
// C++, so nvcc never reads a torch header. Values on the device are not looked at: that would
// synchronise.
namespace adamix::bindings {
namespace {

using torch::stable::contiguous;

void check_cuda(const char* op, cudaError_t status) {
  ADAMIX_CHECK(status == cudaSuccess, op, ": CUDA says: ", cudaGetErrorString(status));
}

// torch's current stream. The function is no global symbol and is missing where torch has no CUDA,
// where this library must load all the same: so it is looked up in the library that torch has
// loaded.
cudaStream_t current_stream(const char* op, int32_t device) {
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
    check_cuda(op, cudaSetDevice(tensor.get_device_index()));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

Tensor pack(const Tensor& codes, int64_t bits) {
  check_pack(codes, bits);
  const DeviceGuard guard("pack", codes);
  const Tensor source = contiguous(codes);
  const int width = static_cast<int>(bits);
  const Tensor words =
      new_matrix(codes, codes.size(0), lane_words(codes.size(1), width), ScalarType::Int);
  check_cuda("pack",
             launch_pack({mutable_view<uint32_t>(words), const_view<uint8_t>(source), width},
                         current_stream("pack", codes.get_device_index())));
  return words;
}

Tensor unpack(const Tensor& words, int64_t bits, int64_t count) {
  check_unpack(words, bits, count);
  const DeviceGuard guard("unpack", words);
  const Tensor source = contiguous(words);
  const Tensor codes = new_matrix(words, words.size(0), count, ScalarType::Byte);
  check_cuda("unpack", launch_unpack({mutable_view<uint8_t>(codes), const_view<uint32_t>(source),
                                      static_cast<int>(bits)},
                                     current_stream("unpack", words.get_device_index())));
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamix, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace adamix::bindings
