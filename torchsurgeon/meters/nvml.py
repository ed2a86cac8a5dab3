"""Energy of a desktop or datacenter GPU through NVIDIA's management library, opened at run time.

On a Jetson NVML answers but knows neither energy nor power; its meter is :mod:`torchsurgeon.meters.ina3221`.
"""

from __future__ import annotations

import ctypes
import time

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.energy import EnergyMeter, Reading

_SUCCESS, _NOT_SUPPORTED = 0, 3


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
