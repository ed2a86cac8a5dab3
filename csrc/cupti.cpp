#include "cupti.h"

#include <cxxabi.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>

#include "clock.h"
#include "cuda_driver.h"
#include "library.h"
#include "tensors.h"

namespace torchsurgeon {
namespace {

// CUPTI records a launch as a runtime or driver call, and gives external ids only with records of these kinds.
constexpr std::array kKinds = {
    ActivityKind::kConcurrentKernel,
    ActivityKind::kMemcpy,
    ActivityKind::kMemset,
    ActivityKind::kRuntime,
    ActivityKind::kDriver,
    ActivityKind::kExternalCorrelation,
};
constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr size_t kBufferAlignment = 8;
constexpr size_t kMaxActivities = size_t{1} << 22;

DynamicLibrary library;
Cupti cupti;
bool is_complete = false;
std::atomic<bool> is_tracing{false};
// Never destroyed: CUPTI may deliver a last buffer from its own thread while the process exits.
ActivityLog& activities = *new ActivityLog(kMaxActivities);

bool find_functions() {
  return library.find("cuptiActivityEnable", cupti.enable) && library.find("cuptiActivityDisable", cupti.disable) &&
      library.find("cuptiActivityRegisterCallbacks", cupti.register_callbacks) &&
      library.find("cuptiActivityGetNextRecord", cupti.next_record) &&
      library.find("cuptiActivityGetNumDroppedRecords", cupti.dropped_records) &&
      library.find("cuptiActivityFlushAll", cupti.flush_all) &&
      library.find("cuptiActivityPushExternalCorrelationId", cupti.push_external_id) &&
      library.find("cuptiActivityPopExternalCorrelationId", cupti.pop_external_id) &&
      library.find("cuptiGetTimestamp", cupti.timestamp) &&
      library.find("cuptiGetResultString", cupti.result_string);
}

void buffer_requested(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(kBufferAlignment, kBufferBytes));
  *size = *buffer != nullptr ? kBufferBytes : 0;
  *max_records = 0;
}

void buffer_completed(void* context, uint32_t stream, uint8_t* buffer, size_t, size_t valid_size) {
  void* record = nullptr;
  while (valid_size > 0 && cupti.next_record(buffer, valid_size, &record) == kCuptiSuccess) {
    activities.add(record);
  }
  size_t dropped = 0;
  if (cupti.dropped_records(context, stream, &dropped) == kCuptiSuccess) {
    activities.drop(dropped);
  }
  std::free(buffer);
}

// Opens CUPTI from `path`, once. The driver must be open: without one, some versions of CUPTI recurse until they crash.
int64_t cupti_open(std::string path, bool loaded_only) {
  if (cuda_driver() == nullptr) {
    return kNoDriver;
  }
  if (!library.is_open() && !library.open(path, loaded_only)) {
    return kNotFound;
  }
  is_complete = is_complete || find_functions();
  return is_complete ? kOpened : kTooOld;
}

std::string cupti_error_text(int64_t code) {
  const char* text = nullptr;
  return is_complete && cupti.result_string(static_cast<CuptiResult>(code), &text) == kCuptiSuccess ? text : "";
}

void disable_all() {
  for (const ActivityKind kind : kKinds) {
    cupti.disable(kind);
  }
}

// Starts collecting. Returns 0, or CUPTI's error with everything switched off again.
int64_t cupti_start() {
  STD_TORCH_CHECK(is_complete, "CUPTI is not open");
  STD_TORCH_CHECK(!is_tracing, "a kernel trace is running already");
  activities.clear();
  CuptiResult result = cupti.register_callbacks(buffer_requested, buffer_completed);
  for (const ActivityKind kind : kKinds) {
    if (result == kCuptiSuccess) {
      result = cupti.enable(kind);
    }
  }
  if (result != kCuptiSuccess) {
    disable_all();
  }
  is_tracing = result == kCuptiSuccess;
  return result;
}

// Stops collecting and waits for what was collected; call it once the device is synchronised. Returns 0 or an error.
int64_t cupti_stop() {
  if (!is_tracing.exchange(false)) {
    return kCuptiSuccess;
  }
  const CuptiResult result = cupti.flush_all(kCuptiFlushForced);
  disable_all();
  return result;
}

void cupti_push(int64_t id) {
  if (is_tracing) {
    cupti.push_external_id(kExternalKind, static_cast<uint64_t>(id));
  }
}

void cupti_pop() {
  if (is_tracing) {
    uint64_t last_id = 0;
    cupti.pop_external_id(kExternalKind, &last_id);
  }
}

// Returns what to add to a time of CUPTI's clock to get one of clock_ns. CUPTI's clock is read between two readings of
// clock_ns, a few times; the closest two readings bound the offset, and their middle is taken.
int64_t cupti_clock_offset() {
  STD_TORCH_CHECK(is_complete, "CUPTI is not open");
  int64_t tightest = INT64_MAX;
  int64_t offset = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    uint64_t theirs = 0;
    const int64_t before = monotonic_ns();
    STD_TORCH_CHECK(cupti.timestamp(&theirs) == kCuptiSuccess, "CUPTI's clock cannot be read; end other profilers and trace again");
    const int64_t after = monotonic_ns();
    if (after - before < tightest) {
      tightest = after - before;
      offset = before + (after - before) / 2 - static_cast<int64_t>(theirs);
    }
  }
  return offset;
}

torch::stable::Tensor cupti_activities() {
  return table(activities.rows(), ActivityLog::kColumns);
}

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
  return status == 0 && text ? text.get() : name;
}

// Returns the demangled names, one a line.
std::string cupti_names() {
  std::string lines;
  for (const std::string& name : activities.names()) {
    lines += demangled(name) + '\n';
  }
  return lines;
}

int64_t cupti_dropped() {
  return static_cast<int64_t>(activities.dropped());
}

} // namespace
} // namespace torchsurgeon

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def("cupti_open(str path, bool loaded_only) -> int");
  m.def("cupti_error_text(int code) -> str");
  m.def("cupti_start() -> int");
  m.def("cupti_stop() -> int");
  m.def("cupti_push(int id) -> ()");
  m.def("cupti_pop() -> ()");
  m.def("cupti_clock_offset() -> int");
  m.def("cupti_activities() -> Tensor");
  m.def("cupti_names() -> str");
  m.def("cupti_dropped() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CompositeExplicitAutograd, m) {
  m.impl("cupti_open", TORCH_BOX(&torchsurgeon::cupti_open));
  m.impl("cupti_error_text", TORCH_BOX(&torchsurgeon::cupti_error_text));
  m.impl("cupti_start", TORCH_BOX(&torchsurgeon::cupti_start));
  m.impl("cupti_stop", TORCH_BOX(&torchsurgeon::cupti_stop));
  m.impl("cupti_push", TORCH_BOX(&torchsurgeon::cupti_push));
  m.impl("cupti_pop", TORCH_BOX(&torchsurgeon::cupti_pop));
  m.impl("cupti_clock_offset", TORCH_BOX(&torchsurgeon::cupti_clock_offset));
  m.impl("cupti_activities", TORCH_BOX(&torchsurgeon::cupti_activities));
  m.impl("cupti_names", TORCH_BOX(&torchsurgeon::cupti_names));
  m.impl("cupti_dropped", TORCH_BOX(&torchsurgeon::cupti_dropped));
}
