"""Finds the energy meter of a machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.errors import DeviceError, MeterError, short
from torchsurgeon.meters.energy import EnergyMeter, NullMeter
from torchsurgeon.meters.jetson import JetsonMeter
from torchsurgeon.meters.nvml import NvmlMeter, nvml_name
from torchsurgeon.meters.rapl import RaplMeter

if TYPE_CHECKING:
    import torch


def find_meter(device: str | torch.device = "cpu", sysfs: Path = Path("/sys")) -> EnergyMeter:
    """Return the best meter of a device: a Jetson's monitors first, then NVML for a GPU or RAPL for the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"``, or a GPU by its number.
        sysfs: where sysfs is mounted.

    Returns:
        The meter; a ``NullMeter`` where there is none, whose ``faults`` say why.

    Raises:
        DeviceError: the device is neither a CPU nor a CUDA device.
    """
    if not re.fullmatch(r"(cpu|cuda)(:[0-9]+)?", str(device)):
        raise DeviceError(f"a device with a meter must be 'cpu', 'cuda' or 'cuda:1'; got {short(str(device))}")
    makers: list[Callable[[], EnergyMeter]] = [lambda: JetsonMeter(sysfs=sysfs)]
    if str(device).startswith("cuda"):
        makers.append(lambda: NvmlMeter(nvml_name(device)))
    else:
        makers.append(lambda: RaplMeter(sysfs))
    faults = []
    for make in makers:
        try:
            return make()
        except MeterError as error:
            faults.append(error)
    return NullMeter(faults)
