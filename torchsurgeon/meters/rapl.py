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

# No package or memory takes more. A counter that fell and would have needed more power for a wrap was set back. The
# second beside the time that passed is for counters that advance in steps.
_MOST_W, _STEP_S = 2000.0, 1.0
_MOST_FAULTS = 100


@dataclass
class _Domain:
    """One counter, followed over its wraps."""

    name: str
    path: Path
    range_uj: int
    last_uj: int
    last_s: float
    total_uj: int = 0

    def advance(self) -> MeterError | None:
        """Read the counter. Return the error that tells that it was set back, so that what it counted is unknown."""
        now_uj, now_s = _number(self.path / "energy_uj"), time.perf_counter()
        step_uj, passed_s = now_uj - self.last_uj, now_s - self.last_s
        self.last_uj, self.last_s = now_uj, now_s
        if step_uj >= 0:
            self.total_uj += step_uj
            return None
        fell = f"the energy counter of {self.name} fell by {-step_uj} µJ"
        if self.range_uj <= 0:
            return MeterError(f"{fell}, and its max_energy_range_uj does not say where it wraps; read it again")
        wrapped_uj = step_uj + self.range_uj
        if not 0 <= wrapped_uj * 1e-6 <= _MOST_W * (passed_s + _STEP_S):
            return MeterError(
                f"{fell} within {passed_s:.3g} s. To wrap, it would have had to count {wrapped_uj * 1e-6:.6g} J, so it "
                "was set back; the energy between these two readings is unknown"
            )
        self.total_uj += wrapped_uj
        return None


class RaplMeter(EnergyMeter):
    """Energy of all processor packages and their memory since the meter was made.

    A counter may wrap at most once between two readings: at 300 W, a common range of 262 kJ lasts a quarter of an hour.
    A counter that fell by more than a wrap explains was set back, by its driver for example: that reading holds no
    energy, and is listed in ``faults``. A domain that fails to be read at first is left out and listed there, too.

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
        resets = [fault for domain in self._domains if (fault := domain.advance()) is not None]
        if resets:
            self.faults = (*self.faults, *resets)[:_MOST_FAULTS]
            return Reading(time.perf_counter_ns())
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
            now_uj = _number(path / "energy_uj")
            domains.append(_Domain(name, path, _range_uj(path), now_uj, time.perf_counter()))
        except MeterError as error:
            faults.append(error)
    return domains, faults


def _name(path: Path) -> str:
    try:
        return (path / "name").read_text(errors="backslashreplace").strip()
    except OSError:
        return ""


def _range_uj(path: Path) -> int:
    try:
        return _number(path / "max_energy_range_uj")
    except MeterError:
        return 0


def _number(path: Path) -> int:
    try:
        number = int(path.read_text())
    except PermissionError as error:
        raise MeterError(f"only root may read {path}; run as root, or: sudo chmod a+r {path}") from error
    except OSError as error:
        raise MeterError(f"reading {path} failed: {error.strerror}") from error
    except ValueError as error:
        raise MeterError(f"{path} must hold a number, and does not") from error
    if number < 0:
        raise MeterError(f"{path} must hold a number from 0 on; got {number}")
    return number
