#pragma once

#include <cstddef>
#include <cstdint>

#include "activity.h"

namespace torchsurgeon {

// The part of CUPTI's activity API that this extension calls, declared by hand as the driver's is.
using CuptiResult = int;

constexpr CuptiResult kCuptiSuccess = 0;
constexpr CuptiResult kCuptiMaxLimitReached = 12;
constexpr uint32_t kCuptiFlushForced = 1;

using BufferRequested = void (*)(uint8_t** buffer, size_t* size, size_t* max_records);
using BufferCompleted = void (*)(void* context, uint32_t stream, uint8_t* buffer, size_t size, size_t valid_size);

struct Cupti {
  CuptiResult (*enable)(ActivityKind kind);
  CuptiResult (*disable)(ActivityKind kind);
  CuptiResult (*register_callbacks)(BufferRequested requested, BufferCompleted completed);
  CuptiResult (*next_record)(uint8_t* buffer, size_t valid_size, void** record);
  CuptiResult (*dropped_records)(void* context, uint32_t stream, size_t* dropped);
  CuptiResult (*flush_all)(uint32_t flag);
  CuptiResult (*push_external_id)(uint32_t kind, uint64_t id);
  CuptiResult (*pop_external_id)(uint32_t kind, uint64_t* last_id);
  CuptiResult (*timestamp)(uint64_t* timestamp_ns);
  CuptiResult (*result_string)(CuptiResult result, const char** text);
};

} // namespace torchsurgeon
