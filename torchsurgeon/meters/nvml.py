"""Energy of a desktop or datacenter GPU, read through NVIDIA's management library (NVML).

The library comes with NVIDIA's driver; the package nvidia-ml-py (``pip install 'torchsurgeon[nvidia]'``) calls it. On a
Jetson NVML answers but knows neither energy nor power; its meter is ``torchsurgeon.meters.jetson``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.energy import EnergyMeter, Reading

if TYPE_CHECKING:
    import torch


def nvml_name(device: str | torch.device) -> int | str:
    """Return what NVML calls a CUDA device.

    It is a UUID, because NVML counts all devices and CUDA only the visible ones. Where PyTorch sees no device or is not
    installed, it is the device's number.
    """
    try:
        import torch
    except ModuleNotFoundError:
        pass
    else:
        if torch.cuda.is_available():
            return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return int(str(device).partition(":")[2] or 0)


class NvmlMeter(EnergyMeter):
    """Total energy of one GPU since the driver was loaded, or the power of a GPU before Volta, which has no counter.

    Args:
        device: the GPU's index in NVML, or its UUID with the prefix ``GPU-``, as ``nvml_name()`` returns it. The two
            differ where CUDA_VISIBLE_DEVICES renumbers devices.

    Raises:
        MeterError: the package, the driver or the GPU is missing; the message says which.
    """

    name = "nvml"
    # The counter advances at best every 20 ms.
    period_s = 0.02

    def __init__(self, device: int | str = 0) -> None:
        self._nvml = _pynvml()
        self.scope = f"GPU {device}"
        with self._reported("NVML, which comes with NVIDIA's driver, does not start"):
            self._nvml.nvmlInit()
        self._open = True
        try:
            with self._reported(f"there is no GPU {device}"):
                self._handle = self._find(device)
            self._counts_energy = self._can_count()
        except MeterError:
            self.close()
            raise

    def read(self) -> Reading:
        if self._counts_energy:
            energy_j = self._energy_j()
            return Reading(time.perf_counter_ns(), energy_j=energy_j)
        power_w = self._power_w()
        return Reading(time.perf_counter_ns(), power_w=power_w)

    def state(self) -> dict[str, Any]:
        """Return clocks in MHz, power limit in watts and reasons for lowered clocks, as far as NVML knows them."""
        nvml = self._nvml
        found: dict[str, Any] = {
            "gpu_clock_mhz": self._answer(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "gpu_memory_clock_mhz": self._answer(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        }
        limit_mw = self._answer(nvml.nvmlDeviceGetEnforcedPowerLimit)
        if limit_mw is not None:
            found["power_limit_w"] = limit_mw * 1e-3
        reasons = self._answer(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        if reasons is not None:
            throttles = {
                nvml.nvmlClocksThrottleReasonSwPowerCap: "power cap",
                nvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
                nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "thermal limit",
                nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hardware thermal limit",
            }
            found["throttled_by"] = [text for bit, text in throttles.items() if reasons & bit]
        return {key: value for key, value in found.items() if value is not None}

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _find(self, device: int | str) -> Any:
        if isinstance(device, str):
            return self._nvml.nvmlDeviceGetHandleByUUID(device)
        return self._nvml.nvmlDeviceGetHandleByIndex(device)

    def _can_count(self) -> bool:
        with self._reported(f"{self.scope} does not report its energy"):
            try:
                self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
                return True
            except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound):
                pass
        self._power_w()
        return False

    def _energy_j(self) -> float:
        with self._reported(f"{self.scope} does not report its energy"):
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) * 1e-3)

    def _power_w(self) -> float:
        with self._reported(f"{self.scope} reports neither its energy nor its power"):
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle) * 1e-3)

    def _answer(self, function: Callable[..., int], *arguments: Any) -> int | None:
        """Return what a function of NVML answers about this GPU; None where it is not supported."""
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            raise MeterError(f"{what}: {error} ({error.value})") from error


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise MeterError(
            "no NVML: the package nvidia-ml-py is not installed; pip install 'torchsurgeon[nvidia]'"
        ) from error
    return pynvml
