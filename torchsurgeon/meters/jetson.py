"""The power monitors of a Jetson, as their drivers show them in sysfs.

Three layouts exist:

* JetPack 4 (Linux 4.9), INA3221, NVIDIA's iio driver: ``ina3221x/1-0040/iio:device0/in_power0_input`` in mW beside
  ``rail_name_0``.
* JetPack 5 and later, INA3221, the kernel's hwmon driver: ``ina3221/1-0040/hwmon/hwmon3/in1_input`` in mV and
  ``curr1_input`` in mA beside ``in1_label``.
* Jetson Thor, INA238 beside an INA3221, the kernel's hwmon driver: ``ina238/2-0044/hwmon/hwmon6/power1_input`` in µW
  beside ``label``.

Boards differ in their rails. TX2, Nano, Xavier NX and Orin NX/Nano have one rail for the whole module. AGX Xavier and
AGX Orin have none. On Thor the INA238 measures ``VIN``, which feeds the module and the carrier board.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchsurgeon.errors import MeterError, short
from torchsurgeon.meters.energy import EnergyMeter, Reading

# Rails that all power passes through; the others are behind them and must not be added.
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")

# Rails that feed the GPU; on Xavier NX and Orin NX/Nano it shares one with the CPU and the vision engines.
GPU_RAILS = ("VDD_SYS_GPU", "POM_5V_GPU", "GPU", "VDD_GPU", "VDD_GPU_SOC", "VDD_CPU_GPU_CV")

# An INA3221 averages over some milliseconds, and each read is a transfer on a slow bus. The INA238's driver sets it to
# average 16 conversions of its three inputs, 1.052 ms each, so a new value comes every 50 ms.
_PERIOD_S = {"ina3221": 0.02, "ina238": 0.05}

_NO_RAIL = ("", "NC", "sum of shunt voltages")


@dataclass(frozen=True)
class Rail:
    """One channel of a monitor: the product of the numbers in its files and of ``scale`` is its power in watts.

    Attributes:
        name: the rail's name, such as ``"VDD_IN"``.
        chip: the monitor, ``"ina3221"`` or ``"ina238"``.
        factors: the files.
        scale: what turns the product of their numbers into watts.
    """

    name: str
    chip: str
    factors: tuple[Path, ...]
    scale: float

    def power_w(self) -> float:
        """Return its power now, in watts.

        Raises:
            MeterError: the driver gives no number, or the power is negative.
        """
        power = self.scale
        for path in self.factors:
            power *= _number(path)
        if power < 0:
            raise MeterError(f"a rail's power must not be negative; {self.name} reads {power:.6g} W")
        return power


class JetsonMeter(EnergyMeter):
    """Power of the whole board or module, or of the named rails.

    A rail that fails to be read is left out of the sum and of ``scope``, and listed in ``faults``, unless it was asked
    for by its name.

    Args:
        rails: the rails to add up. By default it is the total rail, or all rails on a board that has no total rail.
        sysfs: where sysfs is mounted.

    Raises:
        MeterError: there is no monitor, a named rail does not exist or cannot be read, or no rail can be read.
    """

    def __init__(self, rails: Sequence[str] | None = None, sysfs: Path = Path("/sys")) -> None:
        found = find_rails(sysfs)
        if not found:
            raise MeterError(
                f"no INA3221 or INA238 power monitor with a named rail under {sysfs}/bus/i2c/drivers; "
                "only Jetson boards have one"
            )
        if rails is not None:
            found = _named(found, rails)
        readable, faults = _probe(found, "is left out" if rails is None else "was asked for and cannot be read")
        if rails is not None and faults:
            raise faults[0]
        self.faults = tuple(faults)
        total = tuple(rail for rail in readable if rail.name in TOTAL_RAILS) if rails is None else ()
        self.rails = total or tuple(readable)
        if not self.rails:
            raise MeterError("every rail of this board failed to be read: " + "; ".join(map(str, faults)))
        chips = sorted({rail.chip for rail in self.rails})
        self.name = " + ".join(chips)
        self.period_s = max(_PERIOD_S[chip] for chip in chips)
        self.scope = " + ".join(rail.name for rail in self.rails)

    def read(self) -> Reading:
        before_ns = time.perf_counter_ns()
        power_w = sum(rail.power_w() for rail in self.rails)
        return Reading((before_ns + time.perf_counter_ns()) // 2, power_w=power_w)


def find_rails(sysfs: Path = Path("/sys")) -> list[Rail]:
    """Return every rail that has a name, in the order of the bus; ``sysfs`` is where sysfs is mounted."""
    drivers = sysfs / "bus" / "i2c" / "drivers"
    rails = []
    for label in sorted(drivers.glob("ina3221x/*/iio:device*/rail_name_*")):
        channel = label.name.rpartition("_")[2]
        rails.append(Rail(_text(label), "ina3221", (label.with_name(f"in_power{channel}_input"),), 1e-3))
    for label in sorted(drivers.glob("ina3221/*/hwmon/hwmon*/in[1-3]_label")):
        channel = label.name[2]
        factors = (label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input"))
        rails.append(Rail(_text(label), "ina3221", factors, 1e-6))
    # The driver names no channel. The kernel shows what the device tree calls the chip, and without that name nobody
    # knows what it measures.
    rails += [
        Rail(_text(label), "ina238", (label.with_name("power1_input"),), 1e-6)
        for label in sorted(drivers.glob("ina238/*/hwmon/hwmon*/label"))
    ]
    return [rail for rail in rails if rail.name not in _NO_RAIL]


def _probe(rails: Sequence[Rail], what: str) -> tuple[list[Rail], list[MeterError]]:
    readable, faults = [], []
    for rail in rails:
        try:
            rail.power_w()
            readable.append(rail)
        except MeterError as error:
            faults.append(MeterError(f"rail {rail.name} {what}: {error}"))
    return readable, faults


def _named(found: Sequence[Rail], names: Sequence[str]) -> list[Rail]:
    known = [rail.name for rail in found]
    for name in names:
        if name not in known:
            raise MeterError(f"a rail must be one of {', '.join(known)}; got {short(name)}")
    return [rail for rail in found if rail.name in names]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="backslashreplace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError as error:
        raise MeterError(f"reading {path} failed: {error.strerror}; check its permissions, or run as root") from error
    except ValueError as error:
        raise MeterError(f"{path} must hold a number, and does not") from error
