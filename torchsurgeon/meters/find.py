"""Which energy meter a machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from torchsurgeon.errors import DeviceError, MeterError
from torchsurgeon.meters.energy import EnergyMeter, NullMeter
from torchsurgeon.meters.ina3221 import Ina3221Meter
from torchsurgeon.meters.nvml import NvmlMeter, nvml_name
from torchsurgeon.meters.rapl import RaplMeter


def find_meter(device: str | torch.device = "cpu", sysfs: Path = Path("/sys")) -> EnergyMeter:
    """The meter of ``device``: a Jetson's monitors first, then NVML for "cuda" and RAPL for "cpu".

    Never raises for want of a meter: a :class:`NullMeter` says in its ``faults`` why there is none. Raises
    :class:`DeviceError` for a device that is neither.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is not a device; use 'cpu', 'cuda' or 'cuda:1'") from error
    makers: list[Callable[[], EnergyMeter]] = [lambda: Ina3221Meter(sysfs=sysfs)]
    if wanted.type == "cuda":
        makers.append(lambda: NvmlMeter(nvml_name(wanted)))
    elif wanted.type == "cpu":
        makers.append(lambda: RaplMeter(sysfs))
    else:
        raise DeviceError(f"there is no energy meter for {device!r}; use 'cpu' or 'cuda'")
    faults = []
    for make in makers:
        try:
            return make()
        except MeterError as error:
            faults.append(error)
    return NullMeter(faults)
