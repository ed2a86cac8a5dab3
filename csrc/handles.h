#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

namespace torchsurgeon {

// Operators pass objects as ints. A handle is an index into a fixed table, so looking one up takes no lock; a thread must
// not use a handle while another closes it.
template <typename Object, int64_t kSize = 256>
class HandleTable {
 public:
  static constexpr int64_t kNone = -1;

  ~HandleTable() {
    for (auto& entry : entries_) {
      delete entry.load();
    }
  }

  // Returns the handle, or kNone when the table is full.
  int64_t insert(std::unique_ptr<Object> object) {
    for (int64_t handle = 0; handle < kSize; ++handle) {
      Object* expected = nullptr;
      if (entries_[static_cast<size_t>(handle)].compare_exchange_strong(expected, object.get())) {
        object.release();
        return handle;
      }
    }
    return kNone;
  }

  // Returns the object, or nullptr for a handle that was never returned or is closed.
  Object* find(int64_t handle) const noexcept {
    return handle >= 0 && handle < kSize ? entries_[static_cast<size_t>(handle)].load(std::memory_order_acquire) : nullptr;
  }

  void erase(int64_t handle) {
    if (handle >= 0 && handle < kSize) {
      delete entries_[static_cast<size_t>(handle)].exchange(nullptr);
    }
  }

 private:
  std::array<std::atomic<Object*>, static_cast<size_t>(kSize)> entries_{};
};

} // namespace torchsurgeon
