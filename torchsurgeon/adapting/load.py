"""How much slower than predicted the server and the device are at the moment."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.adapting.tracker import Quantity, Tracker

_LEAST_TIMED_S = 1e-4
_QUEUE_SCALE_S = 2e-3  # waits below it differ by nothing that matters
_QUEUE_MEMORY_S = 3.0
_SUSPECT = 3.0
_MOST_FACTOR = 1e4


class LoadEstimate(NamedTuple):
    """How busy a server is.

    Its computing takes `compute` times what was predicted, after waiting for `queue_s` on average, give or take
    `queue_spread_s`. The two are kept apart because the wait is paid once, however short the tail: a factor seen with a
    short tail would be wrong for a long one.
    """

    compute: Quantity
    queue_s: float
    queue_spread_s: float = 0.0

    def factor(self, tail_s: float) -> float:
        """K of the Neurosurgeon paper for a tail of `tail_s` predicted seconds: queue and computing over prediction.

        It is infinite for a tail of 0 s that has to wait.
        """
        if tail_s <= 0:
            return math.inf if self.queue_s else self.compute.value
        return self.compute.value + self.queue_s / tail_s


class _Suspect(NamedTuple):
    """A wait that was further than `most_s` off the mean of the time."""

    off_s: float
    mean_s: float
    most_s: float


class Wait:
    """The mean wait in a queue, which is 0 for one request and long for the next: what many requests will pay, and so
    neither the median nor what outliers leave alone. Not thread-safe.

    Each sample counts as much as the time since the one before it is of a memory of a few seconds: about as long as a
    busy queue stays as it is. Two in a row that lie far off on one side are a change, from which it starts again.
    While nothing is seen the mean halves every `half_life_s`.
    """

    __slots__ = ("_count", "_half_life_s", "_mean_s", "_since", "_suspect", "_variance")

    def __init__(self, *, now_s: NowS, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._since = Since(now_s)
        self._start(0.0, 0.0, count=1)  # an empty queue is taken as seen once

    def _start(self, mean_s: float, variance: float, *, count: int) -> None:
        self._mean_s, self._variance, self._count = mean_s, variance, count
        self._suspect: _Suspect | None = None

    def observe(self, wait_s: float) -> None:
        """Take in the wait of one request."""
        age_s = self._since.passed_s()
        self._since.mark()
        off_s = wait_s - self._faded(age_s)
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
        self._mean_s = max(self._faded(age_s) + gain * off_s, 0.0)
        self._variance = (1 - gain) * (self._variance + gain * off_s * off_s)

    def _faded(self, age_s: float) -> float:
        return self._mean_s * math.pow(0.5, age_s / self._half_life_s)

    def estimate(self) -> tuple[float, float]:
        """The mean wait now, and the standard deviation of single ones."""
        return self._faded(self._since.passed_s()), math.sqrt(self._variance)


class LoadEstimator:
    """Server load from what every answer tells. Thread-safe.

    While nothing is heard the estimate returns to an idle server, half of the way every `half_life_s`, so that one busy
    moment is not held against a server for ever; a ping is due every `ping_s` to know better.
    """

    def __init__(self, *, now_s: NowS = time.monotonic, half_life_s: float = 10.0, ping_s: float = 1.0) -> None:
        self._lock = threading.Lock()
        self._compute = Tracker(1.0, now_s=now_s, error=0.5, drift=0.2, rest=1.0, half_life_s=half_life_s)
        self._queue = Wait(now_s=now_s, half_life_s=half_life_s)
        self._heard, self._pinged = Since(now_s), Since(now_s)
        self._ping_s = ping_s

    def observe(self, *, queue_s: float, compute_s: float, predicted_s: float) -> None:
        """Take in what one answer told of its tail, predicted to compute for `predicted_s`; nonsense is passed over.

        A tail too short to be timed tells of the queue only.
        """
        if not (0 <= queue_s < math.inf and 0 <= compute_s < math.inf and 0 <= predicted_s < math.inf):
            return
        with self._lock:
            self._heard.mark()
            self._queue.observe(queue_s)
            _observe_ratio(self._compute, compute_s, predicted_s)

    def estimate(self) -> LoadEstimate:
        """The load now."""
        with self._lock:
            return LoadEstimate(self._compute.quantity(), *self._queue.estimate())

    def age_s(self) -> float:
        """Seconds since the server last told its load."""
        with self._lock:
            return self._heard.passed_s()

    def ping_due(self) -> bool:
        """Whether to ask the server for its load now; a True is taken as asked."""
        with self._lock:
            due = self._heard.passed_s() >= self._ping_s and self._pinged.passed_s() >= self._ping_s
            if due:
                self._pinged.mark()
            return due


class SlowdownEstimator:
    """How much longer than predicted the device takes: heat, other processes, a power mode. Thread-safe.

    While no head runs, the estimate returns to 1, half of the way every `half_life_s`: an idle device cools down.
    """

    def __init__(self, *, now_s: NowS = time.monotonic, half_life_s: float = 60.0) -> None:
        self._lock = threading.Lock()
        self._factor = Tracker(1.0, now_s=now_s, error=0.5, drift=0.1, rest=1.0, half_life_s=half_life_s)

    def observe(self, observed_s: float, predicted_s: float) -> None:
        """Take in one head's time; heads too short to be timed, and nonsense, are passed over."""
        with self._lock:
            _observe_ratio(self._factor, observed_s, predicted_s)

    def estimate(self) -> Quantity:
        """The factor now."""
        with self._lock:
            return self._factor.quantity()


def _observe_ratio(tracker: Tracker, observed_s: float, predicted_s: float) -> None:
    if _LEAST_TIMED_S <= predicted_s < math.inf and 0 < observed_s < math.inf:
        ratio = min(max(observed_s / predicted_s, 1 / _MOST_FACTOR), _MOST_FACTOR)
        tracker.observe(ratio, noise=_LEAST_TIMED_S / predicted_s / 2)
