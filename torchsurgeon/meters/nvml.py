"""Energy of a desktop or datacenter GPU through NVIDIA's management library, opened at run time.

On a Jetson NVML answers but knows neither energy nor power; its meter is :mod:`torchsurgeon.meters.ina3221`.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.energy import EnergyMeter, Reading

if TYPE_CHECKING:
    import torch

_SUCCESS, _NOT_SUPPORTED = 0, 3
_CLOCK_SM, _CLOCK_MEMORY = 1, 2
# nvmlClocksEventReason… bits that say the clocks are lower than asked for.
_THROTTLE_REASONS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal limit", 0x40: "hardware thermal limit"}


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
    """Total energy of one GPU since the driver was loaded, or its power where the GPU (before Volta) does not count.

    ``device`` is NVML's index, or a UUID ("GPU-…", ``torch.cuda.get_device_properties(0).uuid`` with that prefix) where
    CUDA_VISIBLE_DEVICES renumbers devices. Raises :class:`MeterError` saying what is missing.
    """

    name = "nvml"
    # The counter advances at best every 20 ms.
    period_s = 0.02

    def __init__(self, device: int | str = 0, library: str = "libnvidia-ml.so.1") -> None:
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError as error:
            raise MeterError(f"no NVML: {library} does not open ({error}); NVIDIA's driver brings it") from error
        self._nvml.nvmlErrorString.restype = ctypes.c_char_p
        self._check(self._nvml.nvmlInit_v2(), "NVML does not start")
        self._open = True
        try:
            self._handle = self._find(device)
            self.scope = f"GPU {device}"
            self._counts_energy = self._can_count()
        except MeterError:
            self.close()
            raise

    def read(self) -> Reading:
        if self._counts_energy:
            energy_mj = ctypes.c_ulonglong()
            code = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(energy_mj))
            self._check(code, f"{self.scope} does not tell its energy")
            return Reading(time.perf_counter_ns(), energy_j=energy_mj.value * 1e-3)
        return Reading(time.perf_counter_ns(), power_w=self._power_w())

    def state(self) -> dict[str, Any]:
        """Clocks in MHz, enforced power limit in watts and reasons to throttle, those of them that this GPU tells."""
        found: dict[str, Any] = {}
        for key, kind in (("gpu_clock_mhz", _CLOCK_SM), ("gpu_memory_clock_mhz", _CLOCK_MEMORY)):
            clock_mhz = ctypes.c_uint()
            if self._tells("nvmlDeviceGetClockInfo", kind, ctypes.byref(clock_mhz)):
                found[key] = clock_mhz.value
        limit_mw = ctypes.c_uint()
        if self._tells("nvmlDeviceGetEnforcedPowerLimit", ctypes.byref(limit_mw)):
            found["power_limit_w"] = limit_mw.value * 1e-3
        reasons = ctypes.c_ulonglong()
        if self._tells("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.byref(reasons)):
            found["throttled_by"] = [text for bit, text in _THROTTLE_REASONS.items() if reasons.value & bit]
        return found

    def _tells(self, function: str, *arguments: Any) -> bool:
        try:
            call = getattr(self._nvml, function)
        except AttributeError:
            return False
        return bool(call(self._handle, *arguments) == _SUCCESS)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._nvml.nvmlShutdown()

    def _find(self, device: int | str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        if isinstance(device, str):
            code = self._nvml.nvmlDeviceGetHandleByUUID(device.encode(), ctypes.byref(handle))
        else:
            code = self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(device), ctypes.byref(handle))
        self._check(code, f"there is no GPU {device}")
        return handle

    def _can_count(self) -> bool:
        energy_mj = ctypes.c_ulonglong()
        code = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(energy_mj))
        if code == _NOT_SUPPORTED:
            self._power_w()
            return False
        self._check(code, f"{self.scope} does not tell its energy")
        return True

    def _power_w(self) -> float:
        power_mw = ctypes.c_uint()
        code = self._nvml.nvmlDeviceGetPowerUsage(self._handle, ctypes.byref(power_mw))
        self._check(code, f"{self.scope} tells neither its energy nor its power")
        return power_mw.value * 1e-3

    def _check(self, code: int, what: str) -> None:
        if code != _SUCCESS:
            raise MeterError(f"{what}: {self._nvml.nvmlErrorString(code).decode()} ({code})")
