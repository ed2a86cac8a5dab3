#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda_driver.h"
#include "handles.h"
#include "tensors.h"

namespace torchsurgeon {
namespace {

void check(CudaResult result, const char* what) {
  if (result != kCudaSuccess) {
    const char* name = nullptr;
    cuda_driver()->error_name(result, &name);
    STD_TORCH_CHECK(false, what, " failed with ", name != nullptr ? name : "an unknown CUDA error", " (", result, ")");
  }
}

// CUDA events created once. Recording one is a single driver call: nothing is allocated and nothing synchronised.
// Events belong to the context that was current when they were created.
class EventTape {
 public:
  explicit EventTape(int64_t capacity) {
    CudaContext context = nullptr;
    check(cuda_driver()->context_current(&context), "cuCtxGetCurrent");
    STD_TORCH_CHECK(context != nullptr, "this thread has no CUDA context; move a tensor to the device first");
    events_.reserve(static_cast<size_t>(capacity));
    for (int64_t index = 0; index < capacity; ++index) {
      CudaEvent event = nullptr;
      check(cuda_driver()->event_create(&event, 0), "cuEventCreate");
      events_.push_back(event);
    }
  }

  EventTape(const EventTape&) = delete;
  EventTape& operator=(const EventTape&) = delete;

  ~EventTape() {
    for (CudaEvent event : events_) {
      cuda_driver()->event_destroy(event);
    }
  }

  void record(CudaStream stream) {
    if (used_ < events_.size()) {
      check(cuda_driver()->event_record(events_[used_], stream), "cuEventRecord");
    }
    ++used_;
  }

  // Returns the nanoseconds of every recorded event since the first one, and forgets the events. Waits for the device.
  std::vector<int64_t> rewind() {
    const size_t used = used_;
    used_ = 0;
    STD_TORCH_CHECK(used <= events_.size(), used, " events were recorded on a tape of ", events_.size());
    std::vector<int64_t> elapsed_ns(used);
    for (size_t index = 0; index < used; ++index) {
      check(cuda_driver()->event_synchronize(events_[index]), "cuEventSynchronize");
      float elapsed_ms = 0;
      check(cuda_driver()->event_elapsed_ms(&elapsed_ms, events_[index == 0 ? 0 : index - 1], events_[index]), "cuEventElapsedTime");
      // CUDA gives milliseconds as a float, which over a long run resolves no microseconds. So the time from each event
      // to the next is asked for, and these are added up.
      elapsed_ns[index] = (index == 0 ? 0 : elapsed_ns[index - 1]) + std::llround(double{elapsed_ms} * 1e6);
    }
    return elapsed_ns;
  }

 private:
  std::vector<CudaEvent> events_;
  size_t used_ = 0;
};

HandleTable<EventTape> tapes;

EventTape& tape_of(int64_t handle) {
  EventTape* tape = tapes.find(handle);
  STD_TORCH_CHECK(tape != nullptr, "event tape ", handle, " is closed or was never opened");
  return *tape;
}

int64_t event_tape_open(int64_t capacity) {
  STD_TORCH_CHECK(cuda_driver() != nullptr, "the CUDA driver is not open");
  STD_TORCH_CHECK(capacity > 0, "an event tape needs a capacity of at least 1 event, not ", capacity);
  const int64_t handle = tapes.insert(std::make_unique<EventTape>(capacity));
  STD_TORCH_CHECK(handle >= 0, "256 event tapes are open; close one first");
  return handle;
}

void event_tape_close(int64_t handle) {
  tapes.erase(handle);
}

void event_record(int64_t handle, int64_t stream) {
  tape_of(handle).record(reinterpret_cast<CudaStream>(stream));
}

torch::stable::Tensor event_rewind(int64_t handle) {
  return table(tape_of(handle).rewind(), 1);
}

} // namespace
} // namespace torchsurgeon

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def("event_tape_open(int capacity) -> int");
  m.def("event_tape_close(int tape) -> ()");
  m.def("event_record(int tape, int stream) -> ()");
  m.def("event_rewind(int tape) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CompositeExplicitAutograd, m) {
  m.impl("event_tape_open", TORCH_BOX(&torchsurgeon::event_tape_open));
  m.impl("event_tape_close", TORCH_BOX(&torchsurgeon::event_tape_close));
  m.impl("event_record", TORCH_BOX(&torchsurgeon::event_record));
  m.impl("event_rewind", TORCH_BOX(&torchsurgeon::event_rewind));
}
