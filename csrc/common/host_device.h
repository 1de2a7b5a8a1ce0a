#pragma once

// For functions that kernels on the CPU and on the GPU both call.
#if defined(__CUDACC__)
#define ADAMIX_HD __host__ __device__
#else
#define ADAMIX_HD
#endif

// Before a loop of at most 8 turns, in a function for both, that is to become straight code. nvcc
// makes it of such loops unasked, and its host compiler knows no pragma that nvcc knows too.
#if defined(__CUDACC__)
#define ADAMIX_UNROLL
#else
#define ADAMIX_UNROLL _Pragma("GCC unroll 8")
#endif
