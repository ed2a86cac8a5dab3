"""The mean of a quantity that moves, with its uncertainty."""

from __future__ import annotations

import math
from typing import NamedTuple

from torchsurgeon.adapting.clock import NowS, Since

_LEARNING, _LEARNED = 0.1, 2.0
_FIRST_NOISE, _LEAST_NOISE, _MOST_NOISE = 0.2, 0.03, 0.7
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

    def inverse(self) -> Quantity:
        """Return one over this quantity. What is said of logarithms stays as it is."""
        return Quantity(1 / self.value, self.error, self.spread, self.age_s)


class Mean:
    """The mean of a positive ratio over the last samples, such as the seconds that a bit takes. Not thread-safe.

    A sample is a numerator and a denominator, and the mean is the sum of the ones over the sum of the others, so a
    large sample counts for more than a small one. Each sample counts by ``1 / (1 + t / memory_s)`` when another
    follows after ``t`` seconds: as in a Kalman filter of a random walk, the longer ago, the less it says. So a quantity
    that is sampled often is averaged over about ``memory_s``, and one that is sampled now and then over a few samples.
    The last sample counts for ``least_share`` or more.

    The arithmetic mean is what decisions need. Costs are proportional to the seconds of a bit, to the round trip and to
    the factors on computing times, so their means are what a call is expected to cost, whatever their distributions.

    Args:
        value: the estimate before the first sample, which takes its place.
        now_s: a monotonic clock in seconds.
        memory_s: see above.
        least_share: likewise.
        error: relative deviation of ``value``.
        drift: relative deviation that the quantity gains in one second without a sample, as a random walk.
        rest: value that the estimate returns to between samples; None for none.
        half_life_s: seconds in which the estimate goes half of the way to ``rest``.
    """

    __slots__ = (
        "_drift",
        "_half_life_s",
        "_least_share",
        "_memory_s",
        "_most_variance",
        "_noise",
        "_rest",
        "_seen",
        "_since",
        "_value",
        "_variance",
        "_weight",
    )

    def __init__(
        self,
        value: float,
        *,
        now_s: NowS,
        memory_s: float,
        least_share: float = 0.0,
        error: float = 1.0,
        drift: float = 0.2,
        rest: float | None = None,
        half_life_s: float = math.inf,
    ) -> None:
        self._value, self._weight = value, 0.0
        self._variance = self._most_variance = error * error
        # The deviation of single samples, which is learned from them.
        self._noise = _FIRST_NOISE
        self._memory_s, self._drift, self._rest, self._half_life_s = memory_s, drift, rest, half_life_s
        self._least_share = least_share
        self._since = Since(now_s)
        self._seen = False

    def observe(self, total: float, per: float = 1.0) -> None:
        """Take one sample into account: ``total / per``, with the weight ``per``; both are positive."""
        age_s, noise = self._since.lap_s(), self._noise
        value, variance = self._value_after(age_s), self._variance_after(age_s)
        # The noise is learned from the part of the deviation that the estimate's own error does not explain. Deviations
        # count in proportion, and no more than twice as much as is usual: rare stalls are not what samples are like.
        usual = math.sqrt(variance + noise * noise)
        sample = total / per
        off = min(abs(math.log(sample / value)), _LEARNED * usual) * _HALF_NORMAL
        unexplained = math.sqrt(max(off * off - variance, _LEAST_NOISE * _LEAST_NOISE))
        self._noise = noise = noise + _LEARNING * (min(unexplained, _MOST_NOISE) - noise)
        kept = self._weight / (1 + age_s / self._memory_s)
        share = max(per / (kept + per), self._least_share)
        self._weight = per / share
        self._value = value + share * (sample - value)
        self._variance = (1 - share) ** 2 * variance + (share * noise) ** 2
        self._seen = True

    def suppose(self, value: float) -> None:
        """Set the estimate to a value that is likely and not measured; the next sample takes its place."""
        self._since.mark()
        self._value, self._weight, self._variance = value, 0.0, self._most_variance
        self._seen = True

    def value(self) -> float:
        """Return the estimate now."""
        return self._value if self._rest is None else self._value_after(self._since.passed_s())

    def quantity(self) -> Quantity:
        """Return the estimate now, with its uncertainty, which grows between samples."""
        age_s = self._since.passed_s()
        variance = self._variance_after(age_s)
        return Quantity(
            self._value_after(age_s),
            math.sqrt(variance),
            math.sqrt(variance + self._noise * self._noise),
            age_s if self._seen else math.inf,
        )

    def _value_after(self, age_s: float) -> float:
        if self._rest is None:
            return self._value
        return self._rest * math.pow(self._value / self._rest, math.pow(0.5, age_s / self._half_life_s))

    def _variance_after(self, age_s: float) -> float:
        known, most = self._variance, self._most_variance
        grown = known + self._drift * self._drift * age_s
        # Without min() and max(), which would take most of this method's time. It is called several times a call.
        if grown > most:
            return most if most > known else known
        return grown
