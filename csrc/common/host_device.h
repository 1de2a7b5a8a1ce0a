#pragma once

// For functions that kernels on the CPU and on the GPU both call.
#if defined(__CUDACC__)
#define ADAMIX_HD __host__ __device__
#else
#define ADAMIX_HD
#endif
