// Compares what csrc declares of CUDA and CUPTI by hand with the real headers; compiling it is the test.
#include <cuda.h>
#include <cupti.h>

#include <type_traits>

#include "activity.h"
#include "cuda_driver.h"
#include "cupti.h"

using namespace torchsurgeon;

#define SAME_KERNEL_PREFIX(Real)                                                          \
  static_assert(offsetof(Real, start) == offsetof(KernelRecord, start));                  \
  static_assert(offsetof(Real, end) == offsetof(KernelRecord, end));                      \
  static_assert(offsetof(Real, deviceId) == offsetof(KernelRecord, device));              \
  static_assert(offsetof(Real, contextId) == offsetof(KernelRecord, context));            \
  static_assert(offsetof(Real, streamId) == offsetof(KernelRecord, stream));              \
  static_assert(offsetof(Real, gridX) == offsetof(KernelRecord, grid));                   \
  static_assert(offsetof(Real, blockX) == offsetof(KernelRecord, block));                 \
  static_assert(offsetof(Real, correlationId) == offsetof(KernelRecord, correlation));    \
  static_assert(offsetof(Real, name) == offsetof(KernelRecord, name));                    \
  static_assert(sizeof(Real) >= sizeof(KernelRecord));

#define SAME_TRANSFER_PREFIX(Real)                                                        \
  static_assert(offsetof(Real, bytes) == offsetof(TransferRecord, bytes));                \
  static_assert(offsetof(Real, start) == offsetof(TransferRecord, start));                \
  static_assert(offsetof(Real, end) == offsetof(TransferRecord, end));                    \
  static_assert(offsetof(Real, deviceId) == offsetof(TransferRecord, device));            \
  static_assert(offsetof(Real, streamId) == offsetof(TransferRecord, stream));            \
  static_assert(offsetof(Real, correlationId) == offsetof(TransferRecord, correlation));  \
  static_assert(sizeof(Real) >= sizeof(TransferRecord));

// From CUDA 9 (Kernel4) to the newest this header knows.
SAME_KERNEL_PREFIX(CUpti_ActivityKernel4)
SAME_KERNEL_PREFIX(CUpti_ActivityKernel7)
SAME_KERNEL_PREFIX(CUpti_ActivityKernel9)
SAME_TRANSFER_PREFIX(CUpti_ActivityMemcpy)
SAME_TRANSFER_PREFIX(CUpti_ActivityMemcpy5)
SAME_TRANSFER_PREFIX(CUpti_ActivityMemset)
SAME_TRANSFER_PREFIX(CUpti_ActivityMemset4)
#if CUPTI_API_VERSION >= 130000
SAME_KERNEL_PREFIX(CUpti_ActivityKernel10)
SAME_TRANSFER_PREFIX(CUpti_ActivityMemcpy6)
#endif
#if CUPTI_API_VERSION >= 130200
SAME_KERNEL_PREFIX(CUpti_ActivityKernel11)
#endif

static_assert(sizeof(CUpti_ActivityExternalCorrelation) == sizeof(ExternalCorrelationRecord));
static_assert(offsetof(CUpti_ActivityExternalCorrelation, externalKind) == offsetof(ExternalCorrelationRecord, external_kind));
static_assert(offsetof(CUpti_ActivityExternalCorrelation, externalId) == offsetof(ExternalCorrelationRecord, external_id));
static_assert(offsetof(CUpti_ActivityExternalCorrelation, correlationId) == offsetof(ExternalCorrelationRecord, correlation));

static_assert(CUPTI_ACTIVITY_KIND_MEMCPY == static_cast<int>(ActivityKind::kMemcpy));
static_assert(CUPTI_ACTIVITY_KIND_MEMSET == static_cast<int>(ActivityKind::kMemset));
static_assert(CUPTI_ACTIVITY_KIND_KERNEL == static_cast<int>(ActivityKind::kKernel));
static_assert(CUPTI_ACTIVITY_KIND_DRIVER == static_cast<int>(ActivityKind::kDriver));
static_assert(CUPTI_ACTIVITY_KIND_RUNTIME == static_cast<int>(ActivityKind::kRuntime));
static_assert(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL == static_cast<int>(ActivityKind::kConcurrentKernel));
static_assert(CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION == static_cast<int>(ActivityKind::kExternalCorrelation));
static_assert(CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM2 == kExternalKind);
static_assert(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED == kCuptiFlushForced);
static_assert(CUPTI_ERROR_INSUFFICIENT_PRIVILEGES == 35 && CUPTI_ERROR_VIRTUALIZED_DEVICE_INSUFFICIENT_PRIVILEGES == 40);
static_assert(CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED == 39);
static_assert(CUDA_SUCCESS == kCudaSuccess && CUPTI_SUCCESS == kCuptiSuccess);

// Two functions are called alike when each argument and the result have the same size and are a pointer, or are not.
template <typename Real, typename Ours>
constexpr bool passes_alike = sizeof(Real) == sizeof(Ours) && std::is_pointer_v<Real> == std::is_pointer_v<Ours> &&
    std::is_floating_point_v<Real> == std::is_floating_point_v<Ours>;

template <typename Real, typename Ours>
struct CalledAlike;
template <typename RealResult, typename... Real, typename OurResult, typename... Ours>
struct CalledAlike<RealResult (*)(Real...), OurResult (*)(Ours...)> {
  static_assert(sizeof...(Real) == sizeof...(Ours));
  static constexpr bool value = passes_alike<RealResult, OurResult> && (passes_alike<Real, Ours> && ...);
};

#define CALLED_ALIKE(real, ours) static_assert(CalledAlike<decltype(&real), decltype(ours)>::value);

CALLED_ALIKE(cuInit, CudaDriver::init)
CALLED_ALIKE(cuDriverGetVersion, CudaDriver::driver_version)
CALLED_ALIKE(cuGetErrorName, CudaDriver::error_name)
CALLED_ALIKE(cuCtxGetCurrent, CudaDriver::context_current)
CALLED_ALIKE(cuEventCreate, CudaDriver::event_create)
CALLED_ALIKE(cuEventDestroy_v2, CudaDriver::event_destroy)
CALLED_ALIKE(cuEventRecord, CudaDriver::event_record)
CALLED_ALIKE(cuEventSynchronize, CudaDriver::event_synchronize)
CALLED_ALIKE(cuEventElapsedTime, CudaDriver::event_elapsed_ms)
CALLED_ALIKE(cuptiActivityEnable, Cupti::enable)
CALLED_ALIKE(cuptiActivityDisable, Cupti::disable)
CALLED_ALIKE(cuptiActivityRegisterCallbacks, Cupti::register_callbacks)
CALLED_ALIKE(cuptiActivityGetNextRecord, Cupti::next_record)
CALLED_ALIKE(cuptiActivityGetNumDroppedRecords, Cupti::dropped_records)
CALLED_ALIKE(cuptiActivityFlushAll, Cupti::flush_all)
CALLED_ALIKE(cuptiActivityPushExternalCorrelationId, Cupti::push_external_id)
CALLED_ALIKE(cuptiActivityPopExternalCorrelationId, Cupti::pop_external_id)
CALLED_ALIKE(cuptiGetTimestamp, Cupti::timestamp)
CALLED_ALIKE(cuptiGetResultString, Cupti::result_string)
