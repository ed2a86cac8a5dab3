#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace torchsurgeon {

// The part of CUPTI's activity records that this extension reads. CUPTI only ever appends to a record, so these prefixes
// hold from CUDA 9 on; tests/native/cuda_abi.cpp compares them with the real headers.
enum class ActivityKind : uint32_t {
  kMemcpy = 1,
  kMemset = 2,
  kKernel = 3,
  kDriver = 4,
  kRuntime = 5,
  kConcurrentKernel = 10,
  kExternalCorrelation = 39,
};

// CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM2; PyTorch's profiler uses the two before it.
constexpr uint32_t kExternalKind = 5;

struct KernelRecord {
  uint32_t kind;
  uint8_t cache[4];
  int32_t shared_memory[2];
  uint64_t start;
  uint64_t end;
  uint64_t completed;
  uint32_t device;
  uint32_t context;
  uint32_t stream;
  int32_t grid[3];
  int32_t block[3];
  uint32_t memory[4];
  uint32_t correlation;
  int64_t grid_id;
  const char* name;
};

struct TransferRecord {
  uint32_t kind;
  uint32_t detail;
  uint64_t bytes;
  uint64_t start;
  uint64_t end;
  uint32_t device;
  uint32_t context;
  uint32_t stream;
  uint32_t correlation;
};

struct ExternalCorrelationRecord {
  uint32_t kind;
  uint32_t external_kind;
  uint64_t external_id;
  uint32_t correlation;
  uint32_t reserved;
};

// Collects device activities as CUPTI delivers them, each with the external id that was pushed when it was launched.
// CUPTI calls from a thread of its own, and the record that names the external id may come after the activity's record.
class ActivityLog {
 public:
  static constexpr int64_t kColumns = 12;
  static constexpr int64_t kNoExternalId = -1;

  explicit ActivityLog(size_t capacity) : capacity_(capacity) {}

  // Reads one record; records of other kinds are skipped.
  void add(const void* record) {
    uint32_t kind = 0;
    std::memcpy(&kind, record, sizeof(kind));
    const std::lock_guard<std::mutex> guard(mutex_);
    switch (static_cast<ActivityKind>(kind)) {
      case ActivityKind::kKernel:
      case ActivityKind::kConcurrentKernel:
        add_kernel(copy_of<KernelRecord>(record));
        break;
      case ActivityKind::kMemcpy:
        add_transfer(copy_of<TransferRecord>(record), "memcpy");
        break;
      case ActivityKind::kMemset:
        add_transfer(copy_of<TransferRecord>(record), "memset");
        break;
      case ActivityKind::kExternalCorrelation:
        add_correlation(copy_of<ExternalCorrelationRecord>(record));
        break;
      default:
        break;
    }
  }

  void drop(size_t count) {
    const std::lock_guard<std::mutex> guard(mutex_);
    dropped_ += count;
  }

  size_t dropped() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return dropped_;
  }

  // Rows of (external id, start, end, device, stream, grid x y z, block x y z, name), times in CUPTI's clock.
  std::vector<int64_t> rows() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    std::vector<int64_t> rows;
    rows.reserve(activities_.size() * static_cast<size_t>(kColumns));
    for (const Activity& activity : activities_) {
      const auto found = external_ids_.find(activity.correlation);
      rows.push_back(found == external_ids_.end() ? kNoExternalId : static_cast<int64_t>(found->second));
      rows.insert(rows.end(), activity.values, activity.values + kColumns - 1);
    }
    return rows;
  }

  // The kernels' names; the rows' name column holds indices into these.
  std::vector<std::string> names() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return names_;
  }

  void clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    activities_.clear();
    external_ids_.clear();
    names_.clear();
    name_indices_.clear();
    dropped_ = 0;
  }

 private:
  struct Activity {
    uint32_t correlation;
    int64_t values[kColumns - 1];
  };

  // CUPTI's buffers are aligned to 8 bytes, records that tests read from a file are not.
  template <typename Record>
  static Record copy_of(const void* bytes) {
    Record record;
    std::memcpy(&record, bytes, sizeof(record));
    return record;
  }

  static int64_t time(uint64_t nanoseconds) {
    return static_cast<int64_t>(nanoseconds);
  }

  void add_kernel(const KernelRecord& record) {
    add_activity({record.correlation,
                  {time(record.start), time(record.end), record.device, record.stream, record.grid[0], record.grid[1],
                   record.grid[2], record.block[0], record.block[1], record.block[2],
                   index_of(record.name != nullptr ? record.name : "unnamed kernel")}});
  }

  void add_transfer(const TransferRecord& record, const char* name) {
    add_activity({record.correlation,
                  {time(record.start), time(record.end), record.device, record.stream, 0, 0, 0, 0, 0, 0,
                   index_of(name)}});
  }

  void add_correlation(const ExternalCorrelationRecord& record) {
    if (record.external_kind == kExternalKind && external_ids_.size() < capacity_) {
      external_ids_[record.correlation] = record.external_id;
    }
  }

  void add_activity(const Activity& activity) {
    if (activities_.size() < capacity_) {
      activities_.push_back(activity);
    } else {
      ++dropped_;
    }
  }

  // The name is copied at once, because CUPTI frees it with the module that holds the kernel.
  int64_t index_of(const char* name) {
    const auto [entry, is_new] = name_indices_.try_emplace(name, static_cast<int64_t>(names_.size()));
    if (is_new) {
      names_.push_back(entry->first);
    }
    return entry->second;
  }

  const size_t capacity_;
  mutable std::mutex mutex_;
  std::vector<Activity> activities_;
  std::unordered_map<uint32_t, uint64_t> external_ids_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, int64_t> name_indices_;
  size_t dropped_ = 0;
};

} // namespace torchsurgeon
