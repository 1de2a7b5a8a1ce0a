#pragma once

#include <cuda_runtime_api.h>

#include "bitpack/bitpack.h"

// Launchers: pointers in args are the device's; asynchronous on the stream, no allocation, no
// synchronisation.
namespace adamix {

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream);
cudaError_t launch_unpack(const UnpackArgs& args, cudaStream_t stream);

}  // namespace adamix
