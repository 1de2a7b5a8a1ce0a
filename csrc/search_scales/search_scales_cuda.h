#pragma once

#include <cuda_runtime_api.h>

#include "search_scales/search_scales.h"

// search_scales on the device: pointers are the device's; asynchronous on the stream, no
// allocation, no synchronisation. The scales of search_scales_cpu on a machine with FMA, bit by
// bit. Widths are not looked at; what is outside 1..8 counts as 1 or 8.
namespace adamix {

cudaError_t launch_search_scales(const SearchScalesArgs& args, cudaStream_t stream);

}  // namespace adamix
