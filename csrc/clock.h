#pragma once

#include <cstdint>
#include <ctime>

namespace torchsurgeon {

// Nanoseconds of CLOCK_MONOTONIC, which Python's time.perf_counter_ns reads on Linux too, so times of both compare.
inline int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + int64_t{now.tv_nsec};
}

} // namespace torchsurgeon
