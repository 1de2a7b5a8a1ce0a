#pragma once

// Put before a leaf loop: compiled for AVX-512, for AVX2 with FMA and for the baseline; the loader
// picks once. Write such loops over plain arrays with constant bounds: GPTQ's update then runs at
// 112, 60 and 31 GFLOP/s a core (Zen 4). With GCC's vector types it ran at 109 and, with AVX2,
// at 12. Only GCC from 12 on: older ones do not know x86-64-v3 and -v4. The dispatch (ifunc) needs
// Linux.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__CUDACC__)
#if __GNUC__ >= 12
#define ADAMIX_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#if !defined(ADAMIX_CPU_CLONES)
#define ADAMIX_CPU_CLONES
#endif
