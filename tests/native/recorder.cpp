// The recorder, the handle table and the activity log under concurrent use; the tests build this with
// -fsanitize=address,undefined and with -fsanitize=thread.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <thread>

#include "activity.h"
#include "handles.h"
#include "spans.h"

using torchsurgeon::ActivityKind;
using torchsurgeon::ActivityLog;
using torchsurgeon::HandleTable;
using torchsurgeon::Source;
using torchsurgeon::SpanRecorder;

namespace {

void expect(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

void spans_of_many_threads_are_all_there_once() {
  constexpr int64_t kThreads = 4;
  constexpr int64_t kEach = 5'000;
  SpanRecorder recorder(kThreads * kEach);
  std::vector<int64_t> rows(static_cast<size_t>(recorder.capacity() * SpanRecorder::kColumns));
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&recorder, thread] {
      for (int64_t index = 0; index < kEach; ++index) {
        if (index % 2 == 0) {
          recorder.end(recorder.begin(thread * kEach + index));
        } else {
          recorder.add(thread * kEach + index, 1, 2, Source::kCudaEvent);
        }
      }
    });
  }
  for (int reads = 0; reads < 20; ++reads) {
    const int64_t written = recorder.read(recorder.capacity(), rows.data());
    for (int64_t row = 0; row < written; ++row) {
      expect(rows[static_cast<size_t>(row * 5 + 2)] <= rows[static_cast<size_t>(row * 5 + 3)], "a read span is whole");
    }
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  expect(recorder.read(recorder.capacity(), rows.data()) == kThreads * kEach, "every span is finished");
  std::set<int64_t> ids;
  for (int64_t row = 0; row < kThreads * kEach; ++row) {
    ids.insert(rows[static_cast<size_t>(row * 5 + 1)]);
  }
  expect(ids.size() == static_cast<size_t>(kThreads * kEach), "every id appears once");
  expect(recorder.dropped() == 0, "nothing was dropped");
}

void a_full_recorder_counts_what_it_drops() {
  SpanRecorder recorder(2);
  for (int64_t id = 0; id < 5; ++id) {
    recorder.end(recorder.begin(id));
  }
  recorder.end(99);
  recorder.end(SpanRecorder::kFull);
  int64_t rows[2 * SpanRecorder::kColumns];
  expect(recorder.read(2, rows) == 2, "the first two stay");
  expect(recorder.dropped() == 3, "three were dropped");
  recorder.clear();
  expect(recorder.read(2, rows) == 0 && recorder.dropped() == 0, "clear starts anew");
}

void marks_leave_no_gap_between_spans() {
  SpanRecorder recorder(2);
  for (const int64_t id : {4, 5, 6, -1}) {
    recorder.mark(id);
  }
  int64_t rows[2 * SpanRecorder::kColumns];
  expect(recorder.read(2, rows) == 2 && rows[1] == 4 && rows[6] == 5, "two spans found room");
  expect(rows[3] == rows[7], "one ends where the next begins");
  expect(recorder.dropped() == 1, "the third was dropped");
  recorder.mark(-1);
}

void an_open_span_is_not_read() {
  SpanRecorder recorder(3);
  recorder.begin(1);
  recorder.end(recorder.begin(2));
  int64_t rows[3 * SpanRecorder::kColumns];
  expect(recorder.read(3, rows) == 1 && rows[1] == 2, "only the ended span is read");
}

void a_closed_handle_finds_nothing() {
  HandleTable<SpanRecorder, 2> table;
  const int64_t first = table.insert(std::make_unique<SpanRecorder>(1));
  table.insert(std::make_unique<SpanRecorder>(1));
  expect(table.insert(std::make_unique<SpanRecorder>(1)) == table.kNone, "a full table says so");
  table.erase(first);
  table.erase(first);
  table.erase(77);
  expect(table.find(first) == nullptr && table.find(-1) == nullptr && table.find(2) == nullptr, "nothing is found");
}

torchsurgeon::KernelRecord kernel(uint32_t correlation, const char* name) {
  torchsurgeon::KernelRecord record{};
  record.kind = static_cast<uint32_t>(ActivityKind::kConcurrentKernel);
  record.correlation = correlation;
  record.name = name;
  record.start = 10;
  record.end = 20;
  return record;
}

torchsurgeon::ExternalCorrelationRecord correlation(uint32_t correlation, uint64_t id, uint32_t kind) {
  return {static_cast<uint32_t>(ActivityKind::kExternalCorrelation), kind, id, correlation, 0};
}

void activities_find_their_external_id_in_any_order() {
  ActivityLog log(8);
  const auto first = kernel(1, "a");
  const auto theirs = correlation(1, 5, 3);
  const auto ours = correlation(1, 42, torchsurgeon::kExternalKind);
  const auto second = kernel(2, nullptr);
  for (const void* record : {static_cast<const void*>(&first), static_cast<const void*>(&theirs),
                             static_cast<const void*>(&ours), static_cast<const void*>(&second)}) {
    log.add(record);
  }
  const auto rows = log.rows();
  expect(rows[0] == 42, "a kernel has the id pushed for it, not another profiler's");
  expect(rows[ActivityLog::kColumns] == ActivityLog::kNoExternalId, "a kernel launched outside any range has none");
  expect(log.names().size() == 2 && log.names()[0] == "a", "names are kept");
}

void copies_and_fills_are_activities_and_calls_are_not() {
  ActivityLog log(8);
  for (const ActivityKind kind : {ActivityKind::kMemcpy, ActivityKind::kMemset, ActivityKind::kRuntime, ActivityKind::kDriver}) {
    torchsurgeon::TransferRecord record{};
    record.kind = static_cast<uint32_t>(kind);
    record.start = 5;
    record.end = 9;
    record.stream = 3;
    log.add(&record);
  }
  const auto rows = log.rows();
  expect(rows.size() == static_cast<size_t>(2 * ActivityLog::kColumns), "two of them ran on the device");
  expect(rows[1] == 5 && rows[2] == 9 && rows[4] == 3, "times and stream are read");
  expect(log.names()[0] == "memcpy" && log.names()[1] == "memset", "they have names");
}

void an_unaligned_record_is_read() {
  ActivityLog log(8);
  const auto record = kernel(1, "a");
  std::vector<char> bytes(sizeof(record) + 1);
  std::memcpy(bytes.data() + 1, &record, sizeof(record));
  log.add(bytes.data() + 1);
  expect(log.rows().size() == static_cast<size_t>(ActivityLog::kColumns), "it is there");
}

void a_log_is_filled_while_it_is_read() {
  ActivityLog log(1'000);
  std::thread writer([&log] {
    for (uint32_t index = 0; index < 2'000; ++index) {
      const auto record = kernel(index, index % 2 == 0 ? "even" : "odd");
      log.add(&record);
    }
  });
  while (log.rows().size() < static_cast<size_t>(1'000 * ActivityLog::kColumns)) {
    std::this_thread::yield();
  }
  writer.join();
  expect(log.dropped() == 1'000, "what found no room is counted");
}

} // namespace

int main() {
  spans_of_many_threads_are_all_there_once();
  a_full_recorder_counts_what_it_drops();
  marks_leave_no_gap_between_spans();
  an_open_span_is_not_read();
  a_closed_handle_finds_nothing();
  activities_find_their_external_id_in_any_order();
  copies_and_fills_are_activities_and_calls_are_not();
  an_unaligned_record_is_read();
  a_log_is_filled_while_it_is_read();
  std::puts("all passed");
}
