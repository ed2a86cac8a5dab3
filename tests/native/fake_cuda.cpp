// A libcuda.so.1 without a GPU: events count up 1.5 ms at each record. FAKE_CUDA_INIT is what cuInit answers, and
// FAKE_CUDA_CONTEXT=0 leaves the thread without a context.
#include <cstdint>
#include <cstdlib>

namespace {

struct Event {
  float milliseconds;
};

float now_ms = 0;

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

} // namespace

extern "C" {
int cuInit(unsigned int) {
  return setting("FAKE_CUDA_INIT", 0);
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_FAKE";
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = setting("FAKE_CUDA_CONTEXT", 1) != 0 ? &now_ms : nullptr;
  return 0;
}
int cuEventCreate(void** event, unsigned int) {
  *event = new Event{0};
  return 0;
}
int cuEventDestroy_v2(void* event) {
  delete static_cast<Event*>(event);
  return 0;
}
int cuEventRecord(void* event, void*) {
  now_ms += 1.5F;
  static_cast<Event*>(event)->milliseconds = now_ms;
  return 0;
}
int cuEventSynchronize(void*) {
  return 0;
}
int cuEventElapsedTime(float* elapsed_ms, void* start, void* end) {
  *elapsed_ms = static_cast<Event*>(end)->milliseconds - static_cast<Event*>(start)->milliseconds;
  return 0;
}
}
