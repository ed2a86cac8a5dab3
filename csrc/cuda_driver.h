#pragma once

#include <cstdint>

namespace torchsurgeon {

// The part of the CUDA driver API that this extension calls, declared by hand so that building needs no CUDA. Handles
// are opaque pointers and CUresult is an int; tests/native/cuda_abi.cpp compares this with the real headers.
using CudaResult = int;
using CudaEvent = void*;
using CudaStream = void*;
using CudaContext = void*;

constexpr CudaResult kCudaSuccess = 0;

struct CudaDriver {
  CudaResult (*init)(unsigned int flags);
  CudaResult (*driver_version)(int* version);
  CudaResult (*error_name)(CudaResult error, const char** name);
  CudaResult (*context_current)(CudaContext* context);
  CudaResult (*event_create)(CudaEvent* event, unsigned int flags);
  CudaResult (*event_destroy)(CudaEvent event);
  CudaResult (*event_record)(CudaEvent event, CudaStream stream);
  CudaResult (*event_synchronize)(CudaEvent event);
  CudaResult (*event_elapsed_ms)(float* elapsed_ms, CudaEvent start, CudaEvent end);
};

// Opens libcuda.so.1 and initialises it, once. Returns kOpened, kNotFound, kTooOld, or cuInit's error.
int64_t open_cuda_driver();

// Returns the opened driver, or nullptr.
const CudaDriver* cuda_driver();

} // namespace torchsurgeon
