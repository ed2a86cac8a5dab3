#include "spans.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "handles.h"
#include "tensors.h"

namespace torchsurgeon {
namespace {

HandleTable<SpanRecorder> recorders;

SpanRecorder& recorder_of(int64_t handle) {
  SpanRecorder* recorder = recorders.find(handle);
  STD_TORCH_CHECK(recorder != nullptr, "span recorder ", handle, " is closed or was never opened");
  return *recorder;
}

int64_t span_recorder_open(int64_t capacity) {
  STD_TORCH_CHECK(capacity > 0, "a span recorder needs a capacity of at least 1 span, not ", capacity);
  const int64_t handle = recorders.insert(std::make_unique<SpanRecorder>(capacity));
  STD_TORCH_CHECK(handle >= 0, "256 span recorders are open; close one first");
  return handle;
}

void span_recorder_close(int64_t handle) {
  recorders.erase(handle);
}

int64_t span_begin(int64_t handle, int64_t id) {
  return recorder_of(handle).begin(id);
}

void span_end(int64_t handle, int64_t slot) {
  recorder_of(handle).end(slot);
}

void span_mark(int64_t handle, int64_t id) {
  recorder_of(handle).mark(id);
}

void span_add(int64_t handle, int64_t id, int64_t start_ns, int64_t end_ns, int64_t source) {
  recorder_of(handle).add(id, start_ns, end_ns, static_cast<Source>(source));
}

torch::stable::Tensor span_table(int64_t handle) {
  const SpanRecorder& recorder = recorder_of(handle);
  const int64_t taken = recorder.taken();
  std::vector<int64_t> rows(static_cast<size_t>(taken * SpanRecorder::kColumns));
  rows.resize(static_cast<size_t>(recorder.read(taken, rows.data()) * SpanRecorder::kColumns));
  return table(rows, SpanRecorder::kColumns);
}

int64_t span_dropped(int64_t handle) {
  return recorder_of(handle).dropped();
}

void span_clear(int64_t handle) {
  recorder_of(handle).clear();
}

} // namespace
} // namespace torchsurgeon

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def("span_recorder_open(int capacity) -> int");
  m.def("span_recorder_close(int recorder) -> ()");
  m.def("span_begin(int recorder, int id) -> int");
  m.def("span_end(int recorder, int slot) -> ()");
  m.def("span_mark(int recorder, int id) -> ()");
  m.def("span_add(int recorder, int id, int start_ns, int end_ns, int source) -> ()");
  m.def("span_table(int recorder) -> Tensor");
  m.def("span_dropped(int recorder) -> int");
  m.def("span_clear(int recorder) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CompositeExplicitAutograd, m) {
  m.impl("span_recorder_open", TORCH_BOX(&torchsurgeon::span_recorder_open));
  m.impl("span_recorder_close", TORCH_BOX(&torchsurgeon::span_recorder_close));
  m.impl("span_begin", TORCH_BOX(&torchsurgeon::span_begin));
  m.impl("span_end", TORCH_BOX(&torchsurgeon::span_end));
  m.impl("span_mark", TORCH_BOX(&torchsurgeon::span_mark));
  m.impl("span_add", TORCH_BOX(&torchsurgeon::span_add));
  m.impl("span_table", TORCH_BOX(&torchsurgeon::span_table));
  m.impl("span_dropped", TORCH_BOX(&torchsurgeon::span_dropped));
  m.impl("span_clear", TORCH_BOX(&torchsurgeon::span_clear));
}
