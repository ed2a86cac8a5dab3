"""Estimates of how much slower than predicted the server and the device are at the moment."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.adapting.mean import Mean, Quantity

_LEAST_TIMED_S = 1e-4  # shorter predictions make no usable ratio
_QUEUE_SCALE_S = 2e-3  # differences between shorter waits do not matter
_QUEUE_MEMORY_S = 3.0  # about as long as a busy queue stays as it is
_FACTOR_MEMORY_S, _FACTOR_SHARE = 1.0, 0.5
_SUSPECT = 3.0
_MOST_FACTOR = 1e4
_WILD = 3.0
_LEAST_PAUSE_S, _MOST_PAUSE_S, _PINGS_COUNT_S = 3.0, 300.0, 10.0


class LoadEstimate(NamedTuple):
    """How busy a server is.

    Computing and waiting are kept apart because a request waits once, however short its tail is: a factor that was
    measured with a short tail would be wrong for a long one.

    Attributes:
        compute: factor by which the server computes longer than predicted.
        queue_s: mean wait in the server's queue, in seconds.
        queue_spread_s: standard deviation of single waits, in seconds.
    """

    compute: Quantity
    queue_s: float
    queue_spread_s: float = 0.0

    def factor(self, tail_s: float) -> float:
        """Return the load factor K of Neurosurgeon (Kang et al., ASPLOS 2017): queue and computing over prediction.

        Args:
            tail_s: predicted seconds of the tail. For a tail of 0 s that has to wait, the factor is infinite.
        """
        if tail_s <= 0:
            return math.inf if self.queue_s else self.compute.value
        return self.compute.value + self.queue_s / tail_s


class _Suspect(NamedTuple):
    """A wait that lay further than ``most_s`` off the mean at that time."""

    off_s: float
    mean_s: float
    most_s: float


class Wait:
    """Estimates the mean wait in a server's queue. Not thread-safe; its owners lock.

    A wait is 0 for one request and long for the next, and many requests pay all of them, so this is a mean, where a
    median or a filter that drops outliers would be too low. The mean is exponentially weighted by time, over a memory
    of three seconds. A single wait far off the mean counts only in part; two in a row on the same side are a change,
    and the mean starts again from them. While nothing is observed, the mean halves every ``half_life_s``.

    Args:
        now_s: a monotonic clock in seconds.
        half_life_s: see above.
    """

    __slots__ = ("_count", "_half_life_s", "_mean_s", "_since", "_suspect", "_variance")

    def __init__(self, *, now_s: NowS, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._since = Since(now_s)
        self._start(0.0, 0.0, count=1)  # starts as if one request had found the queue empty

    def _start(self, mean_s: float, variance: float, *, count: int) -> None:
        self._mean_s, self._variance, self._count = mean_s, variance, count
        self._suspect: _Suspect | None = None

    def observe(self, wait_s: float) -> None:
        """Update the mean with the wait of one request, in seconds."""
        age_s = self._since.lap_s()
        faded_s = self._faded(age_s)
        off_s = wait_s - faded_s
        before, self._suspect = self._suspect, None
        if before is not None and (wait_s - before.mean_s) * before.off_s > before.most_s * abs(before.off_s):
            self._start(before.mean_s + (before.off_s + wait_s - before.mean_s) / 2, self._variance, count=2)
            return
        most_s = _SUSPECT * math.sqrt(self._variance + _QUEUE_SCALE_S**2)
        if abs(off_s) > most_s:
            self._suspect = _Suspect(off_s, wait_s - off_s, most_s)
            off_s = math.copysign(most_s, off_s)
        self._count += 1
        gain = max(1 / self._count, -math.expm1(-age_s / _QUEUE_MEMORY_S))
        self._mean_s = max(faded_s + gain * off_s, 0.0)
        self._variance = (1 - gain) * (self._variance + gain * off_s * off_s)

    def _faded(self, age_s: float) -> float:
        return self._mean_s * math.pow(0.5, age_s / self._half_life_s)

    def estimate(self) -> tuple[float, float]:
        """Return the mean wait now, and the standard deviation of single waits, in seconds."""
        return self._faded(self._since.passed_s()), math.sqrt(self._variance)


class LoadEstimator:
    """Estimates a server's load from the times that its answers report. Thread-safe.

    Without new answers the estimate returns to that of an idle server, half of the way every ``half_life_s``, so that a
    server is not avoided for ever because it was busy once. A ping every ``ping_s`` measures the load meanwhile.

    Args:
        now_s: a monotonic clock in seconds.
        half_life_s: see above.
        ping_s: seconds without a report after which a ping is due.
    """

    def __init__(self, *, now_s: NowS = time.monotonic, half_life_s: float = 10.0, ping_s: float = 1.0) -> None:
        self._lock = threading.Lock()
        self._compute = _factor(now_s, 0.2, half_life_s)
        self._queue = Wait(now_s=now_s, half_life_s=half_life_s)
        self._heard, self._pinged = Since(now_s), Since(now_s)
        self._ping_s = ping_s

    def observe(self, *, queue_s: float, compute_s: float, predicted_s: float) -> None:
        """Update the estimate with the times that one answer reports. Negative and infinite times are ignored.

        Args:
            queue_s: seconds that the request waited.
            compute_s: seconds that the server computed.
            predicted_s: predicted seconds of that computing. Where it is too short to be timed, only the wait counts.
        """
        if not (0 <= queue_s < math.inf and 0 <= compute_s < math.inf and 0 <= predicted_s < math.inf):
            return
        with self._lock:
            self._heard.mark()
            self._queue.observe(queue_s)
            _observe_ratio(self._compute, compute_s, predicted_s)

    def estimate(self) -> LoadEstimate:
        """Return the load as estimated now."""
        with self._lock:
            return LoadEstimate(self._compute.quantity(), *self._queue.estimate())

    def age_s(self) -> float:
        """Return the seconds since an answer last reported the server's load."""
        with self._lock:
            return self._heard.passed_s()

    def ping_due(self) -> bool:
        """Return whether to ping the server for its load now. A caller that gets True makes the ping."""
        with self._lock:
            due = self._heard.passed_s() >= self._ping_s and self._pinged.passed_s() >= self._ping_s
            if due:
                self._pinged.mark()
            return due


class TrialPolicy:
    """Says when to try how fast a server computes that is not asked. Not thread-safe.

    A trial is due once neither a call nor a trial has shown it for three seconds, and the pause doubles with every
    trial, up to five minutes, until a call is answered: many devices that leave a busy server alone must not keep it
    busy with trials. Pings count again once neither has shown it for ten seconds. Their tails are short, and may be
    predicted otherwise than those of calls.

    Args:
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, *, now_s: NowS = time.monotonic) -> None:
        self._since, self._seen = Since(now_s), False
        self._pause_s = _LEAST_PAUSE_S

    def timed(self) -> None:
        """Record that an answer to a call or a trial has shown it."""
        self._since.mark()
        self._seen = True

    def answered(self) -> None:
        """Record that the server is in use."""
        self._pause_s = _LEAST_PAUSE_S

    def pings_count(self) -> bool:
        """Return whether nothing but pings has shown it lately."""
        return not self._seen or self._since.passed_s() >= _PINGS_COUNT_S

    def due(self) -> bool:
        """Return whether to make a trial now. A caller that gets True makes it."""
        if self._seen and self._since.passed_s() < self._pause_s:
            return False
        self.timed()
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)
        return True


class SlowdownEstimator:
    """Estimates how much slower than predicted the device is: heat, other processes, a power mode. Thread-safe.

    While no head runs, the estimate returns to 1, half of the way every ``half_life_s``, because an idle device cools
    down.

    A single duration of more than three times the estimate counts as three times the estimate: the process may have
    been stopped, or the clock may have jumped. If the server is asked from then on, no other duration would correct the
    estimate. Of two such durations in a row, the second counts in full.

    Args:
        now_s: a monotonic clock in seconds.
        half_life_s: see above.
    """

    def __init__(self, *, now_s: NowS = time.monotonic, half_life_s: float = 60.0) -> None:
        self._lock = threading.Lock()
        self._factor = _factor(now_s, 0.1, half_life_s)
        self._wild = False

    def observe(self, observed_s: float, predicted_s: float) -> None:
        """Update the factor from measured against predicted seconds. What is too short to be timed is ignored."""
        if not _is_timed(observed_s, predicted_s):
            return
        with self._lock:
            most_s = _WILD * self._factor.value() * predicted_s
            before, self._wild = self._wild, observed_s > most_s
            _observe_ratio(self._factor, observed_s if before else min(observed_s, most_s), predicted_s)

    def estimate(self) -> Quantity:
        """Return the factor as estimated now."""
        with self._lock:
            return self._factor.quantity()


def _factor(now_s: NowS, drift: float, half_life_s: float) -> Mean:
    return Mean(
        1.0,
        now_s=now_s,
        memory_s=_FACTOR_MEMORY_S,
        least_share=_FACTOR_SHARE,
        error=0.5,
        drift=drift,
        rest=1.0,
        half_life_s=half_life_s,
    )


def _is_timed(observed_s: float, predicted_s: float) -> bool:
    return _LEAST_TIMED_S <= predicted_s < math.inf and 0 < observed_s < math.inf


def _observe_ratio(factor: Mean, observed_s: float, predicted_s: float) -> None:
    if _is_timed(observed_s, predicted_s):
        factor.observe(min(max(observed_s, predicted_s / _MOST_FACTOR), predicted_s * _MOST_FACTOR), predicted_s)
