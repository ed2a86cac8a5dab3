#include "cuda_driver.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <mutex>
#include <string>

#include "library.h"

namespace torchsurgeon {
namespace {

struct OpenedDriver {
  DynamicLibrary library;
  CudaDriver functions{};
};

OpenedDriver driver;
std::mutex opening;
std::atomic<bool> opened{false};

bool find_functions(const DynamicLibrary& library, CudaDriver& functions) {
  return library.find("cuInit", functions.init) && library.find("cuDriverGetVersion", functions.driver_version) &&
      library.find("cuGetErrorName", functions.error_name) &&
      library.find("cuCtxGetCurrent", functions.context_current) &&
      library.find("cuEventCreate", functions.event_create) &&
      library.find("cuEventDestroy_v2", functions.event_destroy) &&
      library.find("cuEventRecord", functions.event_record) &&
      library.find("cuEventSynchronize", functions.event_synchronize) &&
      library.find("cuEventElapsedTime", functions.event_elapsed_ms);
}

int64_t driver_version() {
  int version = 0;
  return cuda_driver() != nullptr && cuda_driver()->driver_version(&version) == kCudaSuccess ? version : 0;
}

// Returns CUDA's name of a result code, such as CUDA_ERROR_NO_DEVICE; "" without a driver.
std::string error_name(int64_t code) {
  const char* name = nullptr;
  if (!driver.library.is_open() || driver.functions.error_name == nullptr ||
      driver.functions.error_name(static_cast<CudaResult>(code), &name) != kCudaSuccess) {
    return "";
  }
  return name;
}

} // namespace

int64_t open_cuda_driver() {
  const std::lock_guard<std::mutex> guard(opening);
  if (opened) {
    return kOpened;
  }
  if (!driver.library.is_open() && !driver.library.open("libcuda.so.1")) {
    return kNotFound;
  }
  if (!find_functions(driver.library, driver.functions)) {
    return kTooOld;
  }
  const CudaResult result = driver.functions.init(0);
  if (result != kCudaSuccess) {
    return result;
  }
  opened = true;
  return kOpened;
}

const CudaDriver* cuda_driver() {
  return opened ? &driver.functions : nullptr;
}

} // namespace torchsurgeon

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def("cuda_driver_open() -> int");
  m.def("cuda_driver_version() -> int");
  m.def("cuda_error_name(int code) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CompositeExplicitAutograd, m) {
  m.impl("cuda_driver_open", TORCH_BOX(&torchsurgeon::open_cuda_driver));
  m.impl("cuda_driver_version", TORCH_BOX(&torchsurgeon::driver_version));
  m.impl("cuda_error_name", TORCH_BOX(&torchsurgeon::error_name));
}
