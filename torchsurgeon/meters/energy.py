"""The interface of energy meters, a meter that measures nothing, and one that replays a recorded log."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torchsurgeon.errors import MeterError, is_finite, short

_FORMAT, _VERSION = "torchsurgeon-energy-log", 1
# Times are counted in 64 bits, and differences of two are taken.
_MOST_NS = 1 << 62


@dataclass(frozen=True)
class Reading:
    """One reading of a meter: either the power at that moment, or the energy since some earlier moment.

    A reading that holds neither says that the meter does not know what has been used since the one before.

    Attributes:
        time_ns: when it was read, on the host's monotonic clock (``time.perf_counter_ns``).
        power_w: the power in watts; None for a meter that counts energy.
        energy_j: the energy in joules; None for a meter that reads power.
    """

    time_ns: int
    power_w: float | None = None
    energy_j: float | None = None


class EnergyMeter(ABC):
    """A source of readings; as a context manager, it closes itself.

    Attributes:
        name: the kind of meter, such as ``"nvml"``.
        scope: what is metered, such as ``"VDD_IN"`` or ``"GPU 0"``.
        period_s: how often it has a new value to read.
        faults: why some of its parts could not be read and are left out.
    """

    name: str
    scope: str
    period_s: float = 0.01
    faults: tuple[MeterError, ...] = ()

    @abstractmethod
    def read(self) -> Reading:
        """Read the meter.

        Raises:
            MeterError: this reading failed; the next one may succeed.
        """

    def close(self) -> None:
        """Release what the meter holds."""

    def __enter__(self) -> EnergyMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class NullMeter(EnergyMeter):
    """The meter of a machine that has none: every energy derived from it is None.

    Args:
        faults: why none of the other meters works on this machine.
    """

    name = "none"
    scope = "nothing"

    def __init__(self, faults: Iterable[MeterError] = ()) -> None:
        self.faults = tuple(faults)

    def read(self) -> Reading:
        raise MeterError(
            "this machine has no energy meter: " + ("; ".join(map(str, self.faults)) or "none was looked for")
        )


class ReplayMeter(EnergyMeter):
    """A log written by ``save_log()``, read again: each ``read()`` returns its next reading.

    Args:
        path: the log.
        start_ns: the time to which the first reading is moved, and all others with it; by default they keep their own.

    Raises:
        MeterError: the file is not such a log; the message names the line. ``read()`` raises it at the log's end.
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
    """Write readings to a file as JSON lines: a header, then ``[time_ns, power_w, energy_j]`` for each reading.

    Args:
        path: the file.
        meter: the meter that they are from; the header holds its name and scope.
        readings: the readings.
    """
    header = {"format": _FORMAT, "version": _VERSION, "meter": meter.name, "scope": meter.scope}
    lines = [json.dumps(header)]
    lines += [json.dumps([reading.time_ns, reading.power_w, reading.energy_j]) for reading in readings]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load_log(path: Path) -> tuple[str, str, tuple[Reading, ...]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0]) if lines else None
    except (OSError, ValueError) as error:
        raise MeterError(f"reading the energy log {path} failed: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise MeterError(f"the first line of an energy log must hold the format {_FORMAT!r}; that of {path} does not")
    if header.get("version") != _VERSION:
        raise MeterError(f"the energy log {path} must have version {_VERSION}; got {short(header.get('version'), 60)}")
    readings = tuple(_parse(path, number, line) for number, line in enumerate(lines[1:], start=2))
    return str(header.get("meter")), str(header.get("scope")), readings


def _parse(path: Path, number: int, line: str) -> Reading:
    try:
        time_ns, power_w, energy_j = json.loads(line)
        values = [value for value in (power_w, energy_j) if value is not None]
        if type(time_ns) is int and abs(time_ns) < _MOST_NS and len(values) < 2 and all(map(_is_reading, values)):
            return Reading(time_ns, *(None if value is None else float(value) for value in (power_w, energy_j)))
    except (TypeError, ValueError):
        pass
    raise MeterError(
        f"line {number} of the energy log {path} must be [time_ns, power_w or null, energy_j or null], with numbers "
        f"that are finite and not negative; got {short(line, 60)}"
    )


def _is_reading(value: object) -> bool:
    return not isinstance(value, bool) and is_finite(value) and float(value) >= 0  # type: ignore[arg-type]
