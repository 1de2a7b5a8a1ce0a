#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// The instructions that C++ has no words for.
namespace adamix {

// c[16, 8] += a[16, 32] · b[32, 8], a unsigned and b signed bytes, sums of 32 bits. With lane
// = 4g + t, a byte being one of four adjacent k:
//
//   a0: row g,     k 4t ..         b0: k 4t ..,      column g
//   a1: row g + 8, k 4t ..         b1: k 16 + 4t ..
//   a2: row g,     k 16 + 4t ..    c0, c1: row g,     columns 2t, 2t + 1
//   a3: row g + 8, k 16 + 4t ..    c2, c3: row g + 8
__device__ __forceinline__ void mma_u8s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c[16, 8] += a[16, 16] · b[16, 8] in pairs of 16-bit numbers T, sums in fp32:
//
//   a0: row g,     k 2t ..         b0: k 2t ..,     column g
//   a1: row g + 8, k 2t ..         b1: k 8 + 2t ..
//   a2: row g,     k 8 + 2t ..     c0, c1: row g,     columns 2t, 2t + 1
//   a3: row g + 8, k 8 + 2t ..     c2, c3: row g + 8
template <typename T>
__device__ __forceinline__ void mma_pairs(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8i + j names row j of matrix i;
// out[i] is the pair in columns 2t, 2t + 1 of its row g.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_row)
               : "memory");
}

// The same, each matrix transposed: out[i] is column g of rows 2t and 2t + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], uint32_t shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_row)
               : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define ADAMIX_8_REGISTERS(d, i)                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ADAMIX_WGMMA(type, d, a, b, add, transposed)                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "%64, %65, %67, 1, 1, 0, %66;"                                                      \
               : ADAMIX_8_REGISTERS(d, 0), ADAMIX_8_REGISTERS(d, 8), ADAMIX_8_REGISTERS(d, 16),    \
                 ADAMIX_8_REGISTERS(d, 24), ADAMIX_8_REGISTERS(d, 32), ADAMIX_8_REGISTERS(d, 40),  \
                 ADAMIX_8_REGISTERS(d, 48), ADAMIX_8_REGISTERS(d, 56)                              \
               : "l"(a), "l"(b), "n"(transposed), "n"(add))

// Hopper's products of a group of 4 warps, d[64, 128] += a[64, 16] · b[16, 128], both in shared
// memory (descriptors as in tile_product.cuh), sums in fp32. a's k lie side by side; b's do if
// kAlongK, else its columns do. Warp w has rows 16w ..: as mma_pairs' c, d[4n ..] being columns
// 8n ... If not kAdd, d is set instead: zeros put there by hand would have to be waited for.
template <typename T, bool kAlongK, bool kAdd>
__device__ __forceinline__ void wgmma_pairs(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    ADAMIX_WGMMA("f16", d, a, b, kAdd ? 1 : 0, kAlongK ? 0 : 1);
  } else {
    ADAMIX_WGMMA("bf16", d, a, b, kAdd ? 1 : 0, kAlongK ? 0 : 1);
  }
}

#undef ADAMIX_WGMMA
#undef ADAMIX_8_REGISTERS

// Before the first of a run of products: what threads wrote to d is seen.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending committed runs are under way; behind the last, d may be read.
template <int kPending, int kBlocks>
__device__ __forceinline__ void wgmma_wait(float (&d)[kBlocks][64]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) {
#pragma unroll
    for (int i = 0; i < 64 * kBlocks; ++i) asm volatile("" : "+f"(d[i / 64][i % 64])::"memory");
  }
}

#endif

// How many registers the threads of a group of 4 warps have from here on: fewer at once, more as
// soon as others have given theirs. Multiples of 8; only Hopper's kernels are written for it.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// a * b + c on both numbers of a pair, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

// Named barriers of `threads` threads in all, some of which only arrive and go on.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Barriers in 8 bytes of shared memory: a phase ends with its count-th arrival, and the next one
// begins. Phases have parities 0, 1, 0 ..; arrivals release, waits acquire. What is initialised is
// seen by others behind __syncthreads.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier)
               : "memory");
}

// Arrives, once, when all of the thread's copies so far are there; the thread goes on at once. That
// is said of copies alone: ordinary writes need an arrival of their own.
__device__ __forceinline__ void copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of this parity has ended: at once if the phase under way has the other one. So
// the phase before the first has ended, with parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred ended; again: mbarrier.try_wait.parity.shared.b64 ended, [%0], %1; "
      "@!ended bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{.reg .pred ended; again: mbarrier.test_wait.parity.shared.b64 ended, [%0], %1; "
      "@!ended bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Ordinary writes to shared memory before it are seen by wgmma behind the next barrier; behind a
// barrier, those before the barrier by wgmma from here on.
__device__ __forceinline__ void fence_shared_for_wgmma() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The shared memory whose size the launch says.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(1024) uint4 words[];
  return words;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared(uint32_t shared, const uint4& chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(chunk.x), "r"(chunk.y),
               "r"(chunk.z), "r"(chunk.w)
               : "memory");
}

// Copies to shared memory that the thread does not wait for. 16 bytes pass by L1: read once.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Brings what will be read later into L2.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Programmatic dependent launch (sm_90 on): a kernel that was launched so may start while the one
// before it still runs; what that one wrote may be read only behind wait_for_previous_kernel().
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace adamix
