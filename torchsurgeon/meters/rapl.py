"""Running Average Power Limit counters of Intel and AMD processors, as Linux's powercap tree shows them.

Each domain has a counter ``energy_uj``, which wraps at ``max_energy_range_uj``. Packages and their DRAM are added up.
``core`` and ``uncore`` are parts of a package, and ``psys`` contains the packages, so these are not added.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.energy import EnergyMeter, Reading


@dataclass
class _Domain:
    """One counter, followed over its wraps."""

    name: str
    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def advance(self) -> None:
        now_uj = _number(self.path / "energy_uj")
        step_uj = now_uj - self.last_uj
        self.last_uj = now_uj
        if step_uj < 0:
            if self.range_uj <= 0:
                raise MeterError(
                    f"the energy counter of {self.name} fell by {-step_uj} µJ, and its max_energy_range_uj does not "
                    "say where it wraps; read it again"
                )
            step_uj += self.range_uj
        self.total_uj += step_uj


class RaplMeter(EnergyMeter):
    """Energy of all processor packages and their memory since the meter was made.

    A counter may wrap at most once between two readings: at 300 W, a common range of 262 kJ lasts a quarter of an hour.
    A domain that fails to be read is left out and listed in ``faults``.

    Args:
        sysfs: where sysfs is mounted.

    Raises:
        MeterError: no domain can be read; the message says why.
    """

    name = "rapl"
    # The counters advance about every millisecond.
    period_s = 0.005

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        self._domains, faults = _find_domains(sysfs / "class" / "powercap")
        self.faults = tuple(faults)
        if not self._domains:
            reasons = "; ".join(map(str, faults)) or "this processor or virtual machine has none"
            raise MeterError(f"no RAPL energy counter was found under {sysfs}/class/powercap: {reasons}")
        self.scope = " + ".join(domain.name for domain in self._domains)

    def read(self) -> Reading:
        for domain in self._domains:
            domain.advance()
        return Reading(time.perf_counter_ns(), energy_j=sum(domain.total_uj for domain in self._domains) * 1e-6)


def _find_domains(powercap: Path) -> tuple[list[_Domain], list[MeterError]]:
    domains, faults = [], []
    for path in sorted(powercap.glob("intel-rapl:*")):
        name = _name(path)
        is_package = path.name.count(":") == 1 and name.startswith("package")
        if not is_package and name != "dram":
            continue
        if name == "dram":
            name = f"{_name(powercap / path.name.rpartition(':')[0])} dram"
        try:
            domains.append(_Domain(name, path, _range_uj(path), _number(path / "energy_uj")))
        except MeterError as error:
            faults.append(error)
    return domains, faults


def _name(path: Path) -> str:
    try:
        return (path / "name").read_text().strip()
    except OSError:
        return ""


def _range_uj(path: Path) -> int:
    try:
        return _number(path / "max_energy_range_uj")
    except MeterError:
        return 0


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise MeterError(f"only root may read {path}; run as root, or: sudo chmod a+r {path}") from error
    except OSError as error:
        raise MeterError(f"reading {path} failed: {error.strerror}") from error
    except ValueError as error:
        raise MeterError(f"{path} must hold a number, and does not") from error
