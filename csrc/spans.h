#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "clock.h"

namespace torchsurgeon {

// The clock from which a span's two times were read; Python's hooks.Source has the same numbers.
enum class Source : int64_t { kCpu = 0, kCudaEvent = 1, kCupti = 2 };

// Records spans (id, start, end, source) in storage that is allocated and touched once, so that recording one neither
// allocates nor faults a page. Any thread may begin, end and add spans at any time, and read the finished ones. While
// one thread calls clear(), no other may do any of that.
class SpanRecorder {
 public:
  static constexpr int64_t kColumns = 5;
  static constexpr int64_t kFull = -1;

  explicit SpanRecorder(int64_t capacity) : capacity_(capacity), slots_(new Slot[static_cast<size_t>(capacity)]()) {
    clear();
  }

  // Begins a span, and returns the slot for end(); kFull when there is no room, which end() accepts too.
  int64_t begin(int64_t id) noexcept {
    const int64_t index = take();
    if (index != kFull) {
      open(index, id, monotonic_ns());
    }
    return index;
  }

  void end(int64_t index) noexcept {
    close(index, monotonic_ns());
  }

  // Ends the span that the last mark began and begins the next at the same moment; a negative id only ends. Only one
  // thread may make the marks of one recorder.
  void mark(int64_t id) noexcept {
    const int64_t now = monotonic_ns();
    close(marked_, now);
    marked_ = id < 0 ? kFull : take();
    if (marked_ != kFull) {
      open(marked_, id, now);
    }
  }

  void add(int64_t id, int64_t start_ns, int64_t end_ns, Source source) noexcept {
    const int64_t index = take();
    if (index != kFull) {
      Slot& slot = slots_[static_cast<size_t>(index)];
      slot.id = id;
      slot.source = source;
      slot.start_ns = start_ns;
      slot.end_ns.store(end_ns, std::memory_order_release);
    }
  }

  int64_t capacity() const noexcept {
    return capacity_;
  }

  // Returns how many spans were begun, whether they have ended or not.
  int64_t taken() const noexcept {
    return std::min(next_.load(std::memory_order_relaxed), capacity_);
  }

  // Returns how many spans were not recorded for lack of room.
  int64_t dropped() const noexcept {
    return std::max<int64_t>(next_.load(std::memory_order_relaxed) - capacity_, 0);
  }

  // Writes (slot, id, start, end, source) of each finished span among the first `count` slots; returns how many.
  int64_t read(int64_t count, int64_t* rows) const noexcept {
    int64_t written = 0;
    for (int64_t index = 0; index < std::min(count, taken()); ++index) {
      const Slot& slot = slots_[static_cast<size_t>(index)];
      const int64_t end_ns = slot.end_ns.load(std::memory_order_acquire);
      if (end_ns != kOpen) {
        int64_t* row = rows + written++ * kColumns;
        row[0] = index;
        row[1] = slot.id;
        row[2] = slot.start_ns;
        row[3] = end_ns;
        row[4] = static_cast<int64_t>(slot.source);
      }
    }
    return written;
  }

  void clear() noexcept {
    for (int64_t index = 0; index < capacity_; ++index) {
      slots_[static_cast<size_t>(index)].end_ns.store(kOpen, std::memory_order_relaxed);
    }
    marked_ = kFull;
    next_.store(0, std::memory_order_release);
  }

 private:
  static constexpr int64_t kOpen = INT64_MIN;

  struct Slot {
    int64_t id;
    int64_t start_ns;
    std::atomic<int64_t> end_ns;
    Source source;
  };

  void open(int64_t index, int64_t id, int64_t start_ns) noexcept {
    Slot& slot = slots_[static_cast<size_t>(index)];
    slot.id = id;
    slot.source = Source::kCpu;
    slot.start_ns = start_ns;
  }

  void close(int64_t index, int64_t end_ns) noexcept {
    if (index >= 0 && index < capacity_) {
      slots_[static_cast<size_t>(index)].end_ns.store(end_ns, std::memory_order_release);
    }
  }

  int64_t take() noexcept {
    const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
    return index < capacity_ ? index : kFull;
  }

  int64_t capacity_;
  std::unique_ptr<Slot[]> slots_;
  std::atomic<int64_t> next_{0};
  int64_t marked_ = kFull;
};

} // namespace torchsurgeon
