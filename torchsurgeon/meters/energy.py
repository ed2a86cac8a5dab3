"""What every energy meter is, the one that measures nothing, and the one that replays a recorded log."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torchsurgeon.errors import MeterError

_FORMAT, _VERSION = "torchsurgeon-energy-log", 1


@dataclass(frozen=True)
class Reading:
    """One look at a meter: either the power drawn at that moment or the energy drawn since some moment, not both.

    ``time_ns`` counts on the host's monotonic clock (``time.perf_counter_ns``).
    """

    time_ns: int
    power_w: float | None = None
    energy_j: float | None = None


class EnergyMeter(ABC):
    """A source of readings; a context manager that closes it.

    ``name`` says which kind of meter it is, ``scope`` what is metered ("VDD_IN", "GPU 0"), ``period_s`` how often
    reading it is worth while, and ``faults`` which of its parts could not be read and are left out.
    """

    name: str
    scope: str
    period_s: float = 0.01
    faults: tuple[MeterError, ...] = ()

    @abstractmethod
    def read(self) -> Reading:
        """The meter now. Raises :class:`MeterError` when it cannot be read this time; it may be read again."""

    def close(self) -> None:
        """Give back what the meter holds."""

    def __enter__(self) -> EnergyMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class NullMeter(EnergyMeter):
    """The meter of a machine that has none: every energy derived from it is None.

    ``faults`` say why none of the others could be had.
    """

    name = "none"
    scope = "nothing"

    def __init__(self, faults: Iterable[MeterError] = ()) -> None:
        self.faults = tuple(faults)

    def read(self) -> Reading:
        raise MeterError(
            "this machine has no energy meter; " + ("; ".join(map(str, self.faults)) or "none was looked for")
        )


class ReplayMeter(EnergyMeter):
    """A recorded log (:func:`save_log`) read again, one reading a call.

    With ``start_ns`` the first reading is moved to that time and the others with it. Raises :class:`MeterError` where
    the file is not such a log, naming the line, and from :meth:`read` when the log has ended.
    """

    def __init__(self, path: str | os.PathLike[str], start_ns: int | None = None) -> None:
        self.name, self.scope, self.readings = _load_log(Path(path))
        if start_ns is not None and self.readings:
            shift_ns = start_ns - self.readings[0].time_ns
            self.readings = tuple(
                Reading(reading.time_ns + shift_ns, reading.power_w, reading.energy_j) for reading in self.readings
            )
        self._path = path
        self._next = 0

    def read(self) -> Reading:
        if self._next >= len(self.readings):
            raise MeterError(f"the energy log {os.fspath(self._path)} has ended after {len(self.readings)} readings")
        self._next += 1
        return self.readings[self._next - 1]


def save_log(path: str | os.PathLike[str], meter: EnergyMeter, readings: Iterable[Reading]) -> None:
    """Write readings as JSON lines: a header, then [time_ns, power_w, energy_j] each."""
    header = {"format": _FORMAT, "version": _VERSION, "meter": meter.name, "scope": meter.scope}
    lines = [json.dumps(header)]
    lines += [json.dumps([reading.time_ns, reading.power_w, reading.energy_j]) for reading in readings]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load_log(path: Path) -> tuple[str, str, tuple[Reading, ...]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0]) if lines else None
    except (OSError, ValueError) as error:
        raise MeterError(f"the energy log {path} cannot be read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise MeterError(f"{path} is not an energy log: its first line does not say {_FORMAT!r}")
    if header.get("version") != _VERSION:
        raise MeterError(f"the energy log {path} has version {header.get('version')!r}; this release reads {_VERSION}")
    readings = tuple(_parse(path, number, line) for number, line in enumerate(lines[1:], start=2))
    return str(header.get("meter")), str(header.get("scope")), readings


def _parse(path: Path, number: int, line: str) -> Reading:
    try:
        time_ns, power_w, energy_j = json.loads(line)
        if isinstance(time_ns, int) and (power_w is None) != (energy_j is None):
            value = float(energy_j if power_w is None else power_w)
            return Reading(time_ns, energy_j=value) if power_w is None else Reading(time_ns, power_w=value)
    except (TypeError, ValueError):
        pass
    raise MeterError(
        f"line {number} of the energy log {path} is {line[:60]!r}, not [time_ns, power_w or null, energy_j or null]"
    )
