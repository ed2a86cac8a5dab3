// A libnvidia-ml.so.1 without a GPU. FAKE_NVML says which: "energy" (a counter that grows 2 J a call), "power" (a GPU from
// before Volta), "jetson" (tells nothing) or "driver" (the driver is not loaded). Compiled with WITHOUT_COUNTER it is the
// library of a driver from before there was a counter.
#include <cstdlib>
#include <cstring>

namespace {

unsigned long long energy_mj = 5'000;

bool is(const char* what) {
  const char* setting = std::getenv("FAKE_NVML");
  return std::strcmp(setting != nullptr ? setting : "energy", what) == 0;
}

constexpr int kNotSupported = 3;
constexpr int kNotFound = 6;
constexpr int kDriverNotLoaded = 9;

} // namespace

extern "C" {
int nvmlInitWithFlags(unsigned int) {
  return is("driver") ? kDriverNotLoaded : 0;
}
int nvmlShutdown() {
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void** device) {
  *device = &energy_mj;
  return index == 0 ? 0 : kNotFound;
}
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  *device = &energy_mj;
  return std::strcmp(uuid, "GPU-1234") == 0 ? 0 : kNotFound;
}
#ifndef WITHOUT_COUNTER
int nvmlDeviceGetTotalEnergyConsumption(void*, unsigned long long* energy) {
  *energy = energy_mj += 2'000;
  return is("energy") ? 0 : kNotSupported;
}
#endif
int nvmlDeviceGetClockInfo(void*, int kind, unsigned int* clock_mhz) {
  *clock_mhz = kind == 1 ? 1'410 : 1'593;
  return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* reasons) {
  *reasons = 0x24;
  return 0;
}
int nvmlDeviceGetPowerUsage(void*, unsigned int* power_mw) {
  *power_mw = 75'500;
  return is("jetson") ? kNotSupported : 0;
}
}
