"""Readings of a meter integrated over time, and the energy of short spans of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from torchsurgeon.errors import MeterError, is_finite, short
from torchsurgeon.meters.energy import Reading

_CONFIDENCE = 0.95
# A pause in the readings this many times the usual one is a gap, over which nothing is known.
_GAP_FACTOR = 10


@dataclass(frozen=True)
class EnergyEstimate:
    """The energy of one repetition of a span, above idle.

    Attributes:
        mean_j: the mean over the repetitions, in joules.
        interval_j: the interval that holds the mean with 95 % confidence, by Student's t over batches of at least two
            sampling periods each, since closer neighbours share readings; None for fewer than two batches.
        repeats: how many repetitions were metered.
        missing: how many fell into gaps of the readings and are left out.
        resolved: False if the span is shorter than the sampling period. Its energy is then smeared over its neighbours,
            and only their sum can be trusted.
    """

    mean_j: float
    interval_j: tuple[float, float] | None
    repeats: int
    missing: int
    resolved: bool


class EnergyTrace:
    """Energy over time, integrated from the readings of one meter.

    Between two readings, power is taken to change linearly, and a counter's growth to be even. Energy is unknown where
    time or counter run backwards, across pauses in the readings, and beside a reading that is not a finite number from
    0 on.

    Args:
        readings: the readings, in the order they were made.

    Attributes:
        faults: where time or counter ran backwards, and readings that are not finite numbers from 0 on.
        period_s: the median time between two readings; NaN for fewer than two.
    """

    def __init__(self, readings: Iterable[Reading]) -> None:
        self.faults: list[MeterError] = []
        kept = self._in_order(list(readings))
        self._times = np.array([reading.time_ns for reading in kept], dtype=np.int64)
        steps_j = np.array([_step_j(start, end) for start, end in pairwise(kept)], dtype=np.float64)
        pauses = np.diff(self._times)
        self.period_s = float(np.median(pauses)) * 1e-9 if len(pauses) else math.nan
        unknown = np.isnan(steps_j)
        if len(pauses):
            unknown |= pauses > _GAP_FACTOR * np.median(pauses)
        self._energy_j = np.concatenate([[0.0], np.cumsum(np.where(unknown, 0.0, steps_j))])
        self._unknown = np.concatenate([[0], np.cumsum(unknown)])
        for start, end in pairwise(kept):
            if start.energy_j is not None and end.energy_j is not None and end.energy_j < start.energy_j:
                self.faults.append(
                    MeterError(
                        f"an energy counter must not fall, and went from {start.energy_j} J to {end.energy_j} J; its "
                        "driver was probably reset, so the energy between these readings is unknown"
                    )
                )

    def _in_order(self, readings: Sequence[Reading]) -> list[Reading]:
        kept: list[Reading] = []
        for reading in readings:
            values = [value for value in (reading.power_w, reading.energy_j) if value is not None]
            if not all(is_finite(value) and value >= 0 for value in values):
                self.faults.append(
                    MeterError(
                        f"a meter must read watts or joules that are finite and not negative; got {short(values)}; the "
                        "energy beside this reading is unknown"
                    )
                )
                reading = Reading(reading.time_ns)
            if kept and reading.time_ns <= kept[-1].time_ns:
                back_ns = kept[-1].time_ns - reading.time_ns
                self.faults.append(
                    MeterError(f"the clock went back {back_ns} ns between two readings; the later one is left out")
                )
            else:
                kept.append(reading)
        return kept

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured, so that every energy is None."""
        return len(self._times) < 2

    def energy_j(self, start_ns: int, end_ns: int) -> float | None:
        """Return the joules between two times; None if any moment between them was not metered.

        Args:
            start_ns: the earlier time (``time.perf_counter_ns``).
            end_ns: the later one.
        """
        (energy_j,) = self._energies([(start_ns, end_ns)])
        return None if math.isnan(energy_j) else float(energy_j)

    def mean_power_w(self) -> float | None:
        """Return the mean power in watts over all the time that was metered; None if none was."""
        if self.is_empty:
            return None
        known_ns = np.diff(self._times)[np.diff(self._unknown) == 0].sum()
        return float(self._energy_j[-1] / (known_ns * 1e-9)) if known_ns else None

    def estimate(self, spans: Sequence[tuple[int, int]], idle_power_w: float = 0.0) -> EnergyEstimate | None:
        """Return the energy of one of many repetitions of the same work; None if none of them was metered.

        Args:
            spans: start and end of each repetition (``time.perf_counter_ns``).
            idle_power_w: the machine's power while it is idle, which is subtracted.
        """
        energies = self._energies(spans)
        metered = ~np.isnan(energies)
        if not metered.any():
            return None
        starts, ends = np.array(spans, dtype=np.int64)[metered].T
        above_idle = energies[metered] - idle_power_w * (ends - starts) * 1e-9
        return EnergyEstimate(
            mean_j=float(above_idle.mean()),
            interval_j=_interval(above_idle, self._batches(starts)),
            repeats=int(metered.sum()),
            missing=int((~metered).sum()),
            resolved=bool(np.median(ends - starts) * 1e-9 >= self.period_s),
        )

    def _energies(self, spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.float64]:
        edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
        if self.is_empty:
            return np.full(len(edges), np.nan)
        outside = (edges[:, 0] < self._times[0]) | (edges[:, 1] > self._times[-1]) | (edges[:, 1] < edges[:, 0])
        first = np.clip(np.searchsorted(self._times, edges[:, 0], side="right") - 1, 0, len(self._times) - 2)
        last = np.clip(np.searchsorted(self._times, edges[:, 1], side="left"), 1, len(self._times) - 1)
        in_gap = self._unknown[last] > self._unknown[first]
        # Relative to the first reading, since nanoseconds since boot have no digits to spare in a float.
        at = np.interp(
            (edges - self._times[0]).astype(np.float64),
            (self._times - self._times[0]).astype(np.float64),
            self._energy_j,
        )
        return np.where(outside | in_gap, np.nan, at[:, 1] - at[:, 0])

    def _batches(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        width_ns = max(2 * self.period_s * 1e9, 1.0)
        batches: npt.NDArray[np.int64] = ((starts - starts.min()) // width_ns).astype(np.int64)
        return batches


def _step_j(start: Reading, end: Reading) -> float:
    if start.power_w is not None and end.power_w is not None:
        return (start.power_w + end.power_w) / 2 * (end.time_ns - start.time_ns) * 1e-9
    if start.energy_j is not None and end.energy_j is not None and end.energy_j >= start.energy_j:
        return end.energy_j - start.energy_j
    return math.nan


def _interval(values: npt.NDArray[np.float64], batches: npt.NDArray[np.int64]) -> tuple[float, float] | None:
    _, index, sizes = np.unique(batches, return_inverse=True, return_counts=True)
    count = len(sizes)
    if count < 2:
        return None
    # Loading SciPy takes longer than loading all of this package, and only an interval needs it.
    from scipy.special import stdtrit

    means = np.bincount(index, weights=values) / sizes
    half = float(stdtrit(count - 1, (1 + _CONFIDENCE) / 2)) * float(means.std(ddof=1)) / math.sqrt(count)
    mean = float(values.mean())
    return mean - half, mean + half
