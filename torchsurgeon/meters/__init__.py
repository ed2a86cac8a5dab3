"""Clocks and energy meters, each kind behind one small interface.

A ``Clock`` notes marks and gives the time between them. An ``EnergyMeter`` reads power, or a running total of energy.
An ``EnergySampler`` reads a meter in the background, and its ``EnergyTrace`` gives the energy of any stretch of time.
``find_meter()`` returns the best meter of the machine. Where there is none, that is a ``NullMeter``, and all energies
are None: they are never estimated.
"""

from __future__ import annotations

from torchsurgeon.meters.board import board_state
from torchsurgeon.meters.clock import Clock, CudaEventClock, CuptiClock, WallClock
from torchsurgeon.meters.energy import EnergyMeter, NullMeter, Reading, ReplayMeter, save_log
from torchsurgeon.meters.find import find_meter
from torchsurgeon.meters.jetson import JetsonMeter
from torchsurgeon.meters.nvml import NvmlMeter
from torchsurgeon.meters.rapl import RaplMeter
from torchsurgeon.meters.sampler import EnergySampler, measure_idle
from torchsurgeon.meters.trace import EnergyEstimate, EnergyTrace

__all__ = [
    "Clock",
    "CudaEventClock",
    "CuptiClock",
    "EnergyEstimate",
    "EnergyMeter",
    "EnergySampler",
    "EnergyTrace",
    "JetsonMeter",
    "NullMeter",
    "NvmlMeter",
    "RaplMeter",
    "Reading",
    "ReplayMeter",
    "WallClock",
    "board_state",
    "find_meter",
    "measure_idle",
    "save_log",
]
