"""The INA3221 power monitors of a Jetson, in both layouts their drivers give them in sysfs.

JetPack 4 (Linux 4.9) has NVIDIA's iio driver: ``ina3221x/1-0040/iio:device0/in_power0_input`` in mW beside
``rail_name_0``. JetPack 5 and later have the kernel's hwmon driver: ``ina3221/1-0040/hwmon/hwmon3/in1_input`` in mV and
``curr1_input`` in mA beside ``in1_label``. Boards differ in their rails: TX2, Nano, Xavier NX and Orin NX/Nano have one
for the whole module, AGX Xavier and AGX Orin do not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.energy import EnergyMeter, Reading

# Rails that the module's whole power passes through; the others are behind them and must not be added.
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")

# Rails that feed the GPU; on Xavier NX and Orin NX/Nano it shares one with the CPU and the vision engines.
GPU_RAILS = ("VDD_SYS_GPU", "POM_5V_GPU", "GPU", "VDD_GPU", "VDD_GPU_SOC", "VDD_CPU_GPU_CV")

_NO_RAIL = ("", "NC", "sum of shunt voltages")


@dataclass(frozen=True)
class Rail:
    """One channel: files whose numbers, multiplied and scaled, are its power."""

    name: str
    factors: tuple[Path, ...]
    scale: float

    def power_w(self) -> float:
        """Watts now. Raises :class:`MeterError` where the driver does not give a number."""
        power = self.scale
        for path in self.factors:
            power *= _number(path)
        return power


class Ina3221Meter(EnergyMeter):
    """Power of the whole module, or of the named rails.

    Without ``rails`` it is the total rail where the board has one, and the sum of all rails where it has none. A rail
    that cannot be read is left out of the sum, and so of ``scope``, and listed in ``faults``. Raises
    :class:`MeterError` where there is no monitor, a named rail does not exist, or nothing can be read.
    """

    name = "ina3221"
    # The monitors average over some milliseconds, and each read is a transfer on a slow bus.
    period_s = 0.02

    def __init__(self, rails: Sequence[str] | None = None, sysfs: Path = Path("/sys")) -> None:
        found = find_rails(sysfs)
        if not found:
            raise MeterError(f"no INA3221 power monitor under {sysfs}/bus/i2c/drivers; only Jetson boards have one")
        readable, faults = _probe(found)
        self.faults = tuple(faults)
        self.rails = _chosen(found, readable, rails)
        if not self.rails:
            raise MeterError("no rail of the INA3221 can be read: " + "; ".join(map(str, faults)))
        self.scope = " + ".join(rail.name for rail in self.rails)

    def read(self) -> Reading:
        before_ns = time.perf_counter_ns()
        power_w = sum(rail.power_w() for rail in self.rails)
        return Reading((before_ns + time.perf_counter_ns()) // 2, power_w=power_w)


def find_rails(sysfs: Path = Path("/sys")) -> list[Rail]:
    """Every rail with a name, in the order of the bus."""
    drivers = sysfs / "bus" / "i2c" / "drivers"
    rails = []
    for name_file in sorted(drivers.glob("ina3221x/*/iio:device*/rail_name_*")):
        channel = name_file.name.rpartition("_")[2]
        rails.append(Rail(_text(name_file), (name_file.with_name(f"in_power{channel}_input"),), 1e-3))
    for name_file in sorted(drivers.glob("ina3221/*/hwmon/hwmon*/in[1-3]_label")):
        channel = name_file.name[2]
        factors = (name_file.with_name(f"in{channel}_input"), name_file.with_name(f"curr{channel}_input"))
        rails.append(Rail(_text(name_file), factors, 1e-6))
    return [rail for rail in rails if rail.name not in _NO_RAIL]


def _probe(rails: Sequence[Rail]) -> tuple[list[Rail], list[MeterError]]:
    readable, faults = [], []
    for rail in rails:
        try:
            rail.power_w()
            readable.append(rail)
        except MeterError as error:
            faults.append(MeterError(f"rail {rail.name} is left out: {error}"))
    return readable, faults


def _chosen(found: Sequence[Rail], readable: Sequence[Rail], names: Sequence[str] | None) -> tuple[Rail, ...]:
    if names is None:
        total = tuple(rail for rail in readable if rail.name in TOTAL_RAILS)
        return total or tuple(readable)
    known = [rail.name for rail in found]
    for name in names:
        if name not in known:
            raise MeterError(f"this board has no rail {name!r}; it has {', '.join(known)}")
    return tuple(rail for rail in readable if rail.name in names)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError as error:
        raise MeterError(f"{path} cannot be read ({error.strerror}); check its permissions, or run as root") from error
    except ValueError as error:
        raise MeterError(f"{path} does not hold a number") from error
