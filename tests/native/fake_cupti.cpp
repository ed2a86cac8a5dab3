// A CUPTI without a GPU: fake_launch(name, duration_ns) leaves the records a kernel launch would leave, each kernel ending
// where the next begins. FAKE_CUPTI_ENABLE is what cuptiActivityEnable answers.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "activity.h"
#include "clock.h"

using namespace torchsurgeon;

namespace {

constexpr int64_t kClockAhead = 1'000'000'000'000;
constexpr size_t kRecordSize = 256;

void (*requested)(uint8_t**, size_t*, size_t*);
void (*completed)(void*, uint32_t, uint8_t*, size_t, size_t);
std::vector<uint64_t> external_ids;
std::vector<std::vector<uint8_t>> records;
uint32_t correlation = 0;

template <typename Record>
void keep(const Record& record) {
  records.emplace_back(kRecordSize);
  std::memcpy(records.back().data(), &record, sizeof(record));
}

} // namespace

extern "C" {
void fake_launch(const char* name, uint64_t duration_ns) {
  ++correlation;
  if (!external_ids.empty()) {
    keep(ExternalCorrelationRecord{static_cast<uint32_t>(ActivityKind::kExternalCorrelation), kExternalKind,
                                   external_ids.back(), correlation, 0});
  }
  KernelRecord kernel{};
  kernel.kind = static_cast<uint32_t>(ActivityKind::kConcurrentKernel);
  kernel.start = static_cast<uint64_t>(monotonic_ns() + kClockAhead);
  kernel.end = kernel.start + duration_ns;
  kernel.stream = 7;
  kernel.grid[0] = 3;
  kernel.block[0] = 128;
  kernel.correlation = correlation;
  kernel.name = name;
  keep(kernel);
}
int cuptiActivityEnable(uint32_t) {
  const char* answer = std::getenv("FAKE_CUPTI_ENABLE");
  return answer != nullptr ? std::atoi(answer) : 0;
}
int cuptiActivityDisable(uint32_t) {
  return 0;
}
int cuptiActivityRegisterCallbacks(decltype(requested) request, decltype(completed) complete) {
  requested = request;
  completed = complete;
  return 0;
}
int cuptiActivityGetNextRecord(uint8_t* buffer, size_t valid_size, void** record) {
  uint8_t* next = *record == nullptr ? buffer : static_cast<uint8_t*>(*record) + kRecordSize;
  if (next >= buffer + valid_size) {
    return 12;
  }
  *record = next;
  return 0;
}
int cuptiActivityGetNumDroppedRecords(void*, uint32_t, size_t* dropped) {
  *dropped = 0;
  return 0;
}
int cuptiActivityFlushAll(uint32_t) {
  uint8_t* buffer = nullptr;
  size_t size = 0;
  size_t max_records = 0;
  requested(&buffer, &size, &max_records);
  size_t used = 0;
  for (const std::vector<uint8_t>& record : records) {
    std::memcpy(buffer + used, record.data(), kRecordSize);
    used += kRecordSize;
  }
  records.clear();
  completed(nullptr, 0, buffer, size, used);
  return 0;
}
int cuptiActivityPushExternalCorrelationId(uint32_t, uint64_t id) {
  external_ids.push_back(id);
  return 0;
}
int cuptiActivityPopExternalCorrelationId(uint32_t, uint64_t* last_id) {
  *last_id = external_ids.back();
  external_ids.pop_back();
  return 0;
}
int cuptiGetTimestamp(uint64_t* timestamp_ns) {
  *timestamp_ns = static_cast<uint64_t>(monotonic_ns() + kClockAhead);
  return 0;
}
int cuptiGetResultString(int code, const char** text) {
  *text = code == 35 ? "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" : "CUPTI_ERROR_FAKE";
  return 0;
}
}
