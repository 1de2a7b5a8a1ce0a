#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

// The part of CUDA C++ that the kernels use, on the emulator.

#define __global__
#define __device__
#define __host__
#define __shared__ EMULATED_SHARED
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __CUDA_ARCH__ 900

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct int2 {
  int x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

inline emulator::Index3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = emulator::kWarpLanes;

using std::max;
using std::min;

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline unsigned __float_as_uint(float value) {
  return emulated_bits<unsigned>(value);
}
inline int __float_as_int(float value) {
  return emulated_bits<int>(value);
}
inline float __uint_as_float(unsigned bits) {
  return emulated_bits<float>(bits);
}
inline float __int_as_float(int bits) {
  return emulated_bits<float>(bits);
}

// As the hardware: NaN is 0, the rest is clamped, ties go to even.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value <= -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyint(value));
}

inline int __float2int_ru(float value) {
  return static_cast<int>(std::ceil(value));
}

inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}

inline unsigned __vmaxu2(unsigned a, unsigned b) {
  const unsigned low = std::max(a & 0xffffu, b & 0xffffu), high = std::max(a >> 16, b >> 16);
  return high << 16 | low;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  }
  return sum;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  }
  return result;
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}

template <typename T>
T atomicAdd(T* pointer, T value) {
  const T before = *pointer;
  *pointer += value;
  return before;
}

inline void __syncthreads() {
  emulator::Block::current().barrier();
}

struct EmulatedNothing {};

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) emulator::fail("__syncwarp of a part of a warp");
  emulator::Block::current().together<EmulatedNothing>("__syncwarp", EmulatedNothing{},
                                                       [](const auto&, const auto&) {});
}

// Every lane reads the value of the lane that source(lane) names, or keeps its own if that is none.
template <typename T, typename Source>
T emulated_shuffle(const char* what, unsigned mask, T value, Source source) {
  if (mask != 0xffffffffu) emulator::fail("%s of a part of a warp", what);
  struct In {
    T value;
    int source;
  };
  const int lane = emulator::Block::current().lane();
  const int from = source(lane);
  const bool inside = from >= 0 && from < emulator::kWarpLanes;
  return emulator::Block::current().together<T>(what, In{value, inside ? from : lane},
                                                [](const auto& ins, const auto& outs) {
                                                  for (int i = 0; i < emulator::kWarpLanes; ++i)
                                                    *outs[i] = ins[ins[i]->source]->value;
                                                });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulated_shuffle("__shfl_sync", mask, value,
                          [=](int lane) { return lane / width * width + source % width; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulated_shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return lane ^ with; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32) {
  return emulated_shuffle("__shfl_up_sync", mask, value, [=](int lane) {
    return lane % width < distance ? lane : lane - distance;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return emulated_shuffle("__shfl_down_sync", mask, value,
                          [=](int lane) { return lane + distance; });
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  return emulator::Block::current().together<unsigned>(
      "__ballot_sync", predicate, [](const auto& ins, const auto& outs) {
        unsigned ballot = 0;
        for (int i = 0; i < emulator::kWarpLanes; ++i) ballot |= unsigned{*ins[i]} << i;
        for (int i = 0; i < emulator::kWarpLanes; ++i) *outs[i] = ballot;
      });
}

inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

inline unsigned __match_any_sync(unsigned, int value) {
  return emulator::Block::current().together<unsigned>(
      "__match_any_sync", value, [](const auto& ins, const auto& outs) {
        for (int i = 0; i < emulator::kWarpLanes; ++i) {
          *outs[i] = 0;
          for (int j = 0; j < emulator::kWarpLanes; ++j)
            *outs[i] |= unsigned{*ins[j] == *ins[i]} << j;
        }
      });
}

template <typename T, typename Join>
T emulated_reduce(const char* name, T value, Join join) {
  return emulator::Block::current().together<T>(name, value,
                                                [join](const auto& ins, const auto& outs) {
                                                  T all = *ins[0];
                                                  for (int i = 1; i < emulator::kWarpLanes; ++i)
                                                    all = join(all, *ins[i]);
                                                  for (int i = 0; i < emulator::kWarpLanes; ++i)
                                                    *outs[i] = all;
                                                });
}

inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return emulated_reduce("__reduce_or_sync", value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulated_reduce("__reduce_max_sync", value,
                         [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int __reduce_add_sync(unsigned, int value) {
  return emulated_reduce("__reduce_add_sync", value, [](int a, int b) { return a + b; });
}

// ---------------------------------------------------------------------------------------------
// the runtime

using cudaError_t = int;
using cudaStream_t = void*;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum : int { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  return *count = 1, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* id) {
  return *id = emulator::device.id(), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::device.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::device.shared_bytes; break;
  }
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  void* memory =
      nullptr;  // not a byte more than asked for: so AddressSanitizer sees reads behind it
  if (posix_memalign(&memory, 256, bytes) != 0) return cudaErrorInvalidValue;
  *pointer = static_cast<T*>(memory);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  return std::free(pointer), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(target, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return std::memset(target, value, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return *attributes = {0, 90}, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int bytes) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (bytes > emulator::device.shared_bytes) return cudaErrorInvalidValue;
  return emulator::allow_dynamic_shared(kernel, bytes), cudaSuccess;
}

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  const emulator::Index3 grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const emulator::Index3 block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  if (!emulator::can_launch(reinterpret_cast<const void*>(kernel), grid, block,
                            config->dynamicSmemBytes)) {
    return cudaErrorInvalidValue;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        emulator::Block::run({x, y, z}, grid, block, config->dynamicSmemBytes, config->numAttrs > 0,
                             [&] { kernel(args...); });
      }
    }
  }
  return cudaSuccess;
}
