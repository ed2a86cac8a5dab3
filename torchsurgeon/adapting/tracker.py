"""An estimate of one positive quantity that drifts and jumps, from samples with noise and outliers."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from torchsurgeon.adapting.clock import NowS, Since

_SUSPECT = 3.0  # deviations from which a sample is an outlier
_ALLOWANCE = 0.75  # the slack of the CUSUM, in deviations
_ALARM = 4.4  # below twice (_SUSPECT - _ALLOWANCE), so two outliers in a row on one side are a change
_LEARNING, _LEARNED = 0.1, 2.0
_LEAST_NOISE = 0.03
_MOST_NOISE = 0.7
_RUN = 3  # samples that an estimate starts again from after a change
_HALF_NORMAL = math.sqrt(math.pi / 2)  # standard deviation over mean absolute deviation


class Quantity(NamedTuple):
    """The estimate of one positive quantity.

    Attributes:
        value: the estimate.
        error: one standard deviation of the estimate's logarithm: 0.1 is about 10 %.
        spread: one standard deviation of the next sample's logarithm.
        age_s: seconds since the last sample; infinite before the first.
    """

    value: float
    error: float
    spread: float
    age_s: float


class Tracker:
    """Robust estimate of a positive quantity: a local-level Kalman filter on its logarithm, with change detection.

    A sample more than three deviations off does not move the estimate. All deviations add up in a two-sided CUSUM
    (Page, Biometrika 41, 1954) that detects changes. After a change the estimate starts again from the median of the
    last samples. So a single outlier has no effect, and the second sample after a jump is followed. Each sample costs
    constant time. Not thread-safe; its owners lock.

    Args:
        value: the estimate before the first sample.
        now_s: a monotonic clock in seconds.
        error: relative deviation of ``value``.
        noise: relative deviation of a single sample. This is where it starts; the tracker learns it from the samples.
        drift: relative deviation that the quantity gains in one second, as a random walk.
        rest: value that the estimate returns to between samples; None for none.
        half_life_s: seconds in which the estimate goes half of the way to ``rest``.

    Attributes:
        changes: how many changes were detected, ``jump()`` included.
    """

    __slots__ = (
        "_drift",
        "_falling",
        "_half_life_s",
        "_level",
        "_most_variance",
        "_noise",
        "_rest",
        "_rising",
        "_run",
        "_seen",
        "_since",
        "_variance",
        "changes",
    )

    def __init__(
        self,
        value: float,
        *,
        now_s: NowS,
        error: float = 1.0,
        noise: float = 0.2,
        drift: float = 0.3,
        rest: float | None = None,
        half_life_s: float = math.inf,
    ) -> None:
        self.changes = 0
        self._level = math.log(value)
        self._variance = self._most_variance = error * error
        self._noise = noise
        self._drift = drift
        self._rest = None if rest is None else math.log(rest)
        self._half_life_s = half_life_s
        self._since = Since(now_s)
        self._seen = False
        self._run: list[float] = []
        self._rising = self._falling = 0.0

    def observe(self, value: float, *, noise: float = 0.0, lasted_s: float = 0.0) -> None:
        """Update the estimate with one sample.

        Args:
            value: the sample.
            noise: relative deviation of this sample, in addition to that of all samples.
            lasted_s: seconds that measuring the sample took. Drift during that time makes the estimate less certain, so
                the sample counts for more. The further off a sample is, the less of this time is counted: otherwise a
                transfer that took far too long would be believed just because it took long.
        """
        sample = math.log(value)
        age_s = self._since.passed_s()
        level = self._level_after(age_s)
        off = sample - level
        variance = self._variance_after(max(age_s + lasted_s * math.expm1(-abs(off)), 0.0))
        self._since.mark()
        own = self._noise * self._noise + noise * noise
        deviation = math.sqrt(variance + own)
        z = min(max(off / deviation, -_SUSPECT), _SUSPECT)
        suspect = abs(off) > _SUSPECT * deviation
        rising, falling = max(0.0, self._rising + z - _ALLOWANCE), max(0.0, self._falling - z - _ALLOWANCE)
        self._rising, self._falling = rising, falling
        if rising or falling:
            self._run = [*self._run[1 - _RUN :], sample]
        else:
            self._run.clear()
        if rising > _ALARM or falling > _ALARM:
            self._restart(own)
            return
        # The noise is learned from the part of the deviation that the estimate's own uncertainty does not explain. The
        # deviation is capped, so that a sample that may be an outlier teaches little.
        surprise = min(abs(z), _LEARNED) * deviation * _HALF_NORMAL
        unexplained = math.sqrt(max(surprise * surprise - variance - noise * noise, _LEAST_NOISE * _LEAST_NOISE))
        self._noise = min(max(self._noise + _LEARNING * (unexplained - self._noise), _LEAST_NOISE), _MOST_NOISE)
        gain = 0.0 if suspect else variance / (variance + own)
        self._level = level + gain * off
        self._variance = variance * (1 - gain)
        self._seen = True

    def jump(self, value: float) -> None:
        """Set the estimate to one sample at once, for a quantity that has surely changed."""
        self._since.mark()
        self._run = [math.log(value)]
        self._restart(self._noise * self._noise)

    def _restart(self, own: float) -> None:
        self._level = statistics.median(self._run)
        self._variance = own / len(self._run)
        self._rising = self._falling = 0.0
        self._run.clear()
        self._seen = True
        self.changes += 1

    def _level_after(self, age_s: float) -> float:
        if self._rest is None:
            return self._level
        return self._rest + (self._level - self._rest) * math.pow(0.5, age_s / self._half_life_s)

    def _variance_after(self, age_s: float) -> float:
        grown = self._variance + self._drift * self._drift * age_s
        return min(grown, max(self._most_variance, self._variance))

    def value(self) -> float:
        """Return the estimate now."""
        return math.exp(self._level_after(self._since.passed_s()))

    def quantity(self) -> Quantity:
        """Return the estimate now, with its uncertainty, which grows between samples."""
        age_s = self._since.passed_s()
        variance = self._variance_after(age_s)
        return Quantity(
            math.exp(self._level_after(age_s)),
            math.sqrt(variance),
            math.sqrt(variance + self._noise * self._noise),
            age_s if self._seen else math.inf,
        )
