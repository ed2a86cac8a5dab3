"""Where to cut this time: the best row for what is known now, unless the gain may be noise."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torchsurgeon.adapt.clock import NowS
from torchsurgeon.adapt.link import LinkEstimate
from torchsurgeon.adapt.load import LoadEstimate
from torchsurgeon.adapt.tracker import Quantity
from torchsurgeon.link import Link

_logger = logging.getLogger(__name__)

_LEAST_BIT_S, _MOST_ROUND_TRIP_S = 1e3, 60.0


@dataclass(frozen=True, slots=True)
class Estimates:
    """What one decision rests on."""

    link: LinkEstimate
    load: LoadEstimate
    slowdown: Quantity

    def conditions(self) -> Conditions:
        """The most likely values."""
        link, load = self.link, self.load
        return Conditions(
            _link(link.uplink.value, link.downlink.value, link.round_trip.value + load.queue_s),
            load.compute.value,
            self.slowdown.value,
        )

    def alternatives(self) -> tuple[Conditions, ...]:
        """The most likely values with one of them moved by one standard deviation of its estimate, each in turn."""
        up, down, trip = self.link.uplink, self.link.downlink, self.link.round_trip
        now = self.conditions()
        link, load, slowdown = now.link, now.load, now.slowdown
        trip_s = link.round_trip_s
        trip_off_s = math.hypot(trip.value * math.expm1(trip.error), self.load.queue_error_s)
        return (
            Conditions(_link(up.value * math.exp(-up.error), down.value, trip_s), load, slowdown),
            Conditions(_link(up.value, down.value * math.exp(-down.error), trip_s), load, slowdown),
            Conditions(_link(up.value, down.value, trip_s + trip_off_s), load, slowdown),
            Conditions(link, load * math.exp(self.load.compute.error), slowdown),
            Conditions(link, load, slowdown * math.exp(self.slowdown.error)),
        )


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a frontier is asked with: `load` multiplies tail times, `slowdown` head times.

    The wait in the server's queue is part of the link's round trip: like it, it is paid once by every cut that sends.
    """

    link: Link
    load: float
    slowdown: float


def _link(up_bit_s: float, down_bit_s: float, trip_s: float) -> Link:
    return Link(
        "estimated", max(up_bit_s, _LEAST_BIT_S), max(down_bit_s, _LEAST_BIT_S), min(trip_s, _MOST_ROUND_TRIP_S)
    )


_Row = TypeVar("_Row")
_Row_co = TypeVar("_Row_co", covariant=True)
_Row_contra = TypeVar("_Row_contra", contravariant=True)


class Choose(Protocol[_Row_co]):
    """The best row under given conditions."""

    def __call__(self, link: Link, load: float, slowdown: float) -> _Row_co:
        """Return the row of least cost."""


class Cost(Protocol[_Row_contra]):
    """What a row is predicted to cost under given conditions: seconds, or joules if those are to be saved."""

    def __call__(self, row: _Row_contra, link: Link, load: float, slowdown: float) -> float:
        """Return the predicted cost."""


@dataclass(frozen=True, slots=True)
class Decision(Generic[_Row]):
    """One decision: when (by the decider's clock), for which row, on what grounds and at which predicted cost."""

    time_s: float
    row: _Row
    estimates: Estimates
    cost: float
    reason: str
    changed: bool


class Decider(Generic[_Row]):
    """Chooses a row before every inference and stays with it until another is surely better. Thread-safe.

    The evidence for leaving the row in use is a one-sided CUSUM of gain over noise, where noise is how far the gain
    moves when each estimate is off by its own deviation. So a large gain counts at once, a small one after some
    decisions, and one below the noise never.

    :param choose: the best row for a link, load and slow-down, such as a frontier's
    :param cost: of a row under the same
    :param patience: evidence that a change takes, in multiples of the noise
    :param least_gain: share of the cost below which no gain is worth a change
    :param kept: decisions that `decisions` holds
    :param on_change: called with a decision for another row, after it was taken, in the deciding thread
    """

    def __init__(
        self,
        choose: Choose[_Row],
        cost: Cost[_Row],
        *,
        now_s: NowS = time.monotonic,
        patience: float = 2.0,
        least_gain: float = 0.02,
        kept: int = 256,
        on_change: Callable[[Decision[_Row]], object] | None = None,
    ) -> None:
        self.decisions: deque[Decision[_Row]] = deque(maxlen=kept)
        """The last decisions, the newest at the end."""
        self.changes = 0
        self._choose, self._cost, self._now_s = choose, cost, now_s
        self._patience, self._least_gain, self._on_change = patience, least_gain, on_change
        self._lock = threading.Lock()
        self._evidence = 0.0

    def decide(self, estimates: Estimates) -> Decision[_Row]:
        """Choose for one inference."""
        with self._lock:
            now = estimates.conditions()
            best = self._choose(now.link, now.load, now.slowdown)
            best_cost = self._cost(best, now.link, now.load, now.slowdown)
            if not self.decisions:
                return self._took(best, estimates, best_cost, "first")
            row = self.decisions[-1].row
            if row is best or row == best:
                self._evidence = 0.0
                return self._took(row, estimates, best_cost, "still the best")
            cost = self._cost(row, now.link, now.load, now.slowdown)
            gain = cost - best_cost
            if gain <= self._least_gain * cost:
                self._evidence = 0.0
                return self._took(row, estimates, cost, "another is hardly better")
            noise = self._noise(row, best, gain, estimates)
            self._evidence = max(0.0, self._evidence + gain / noise - 1) if noise > 0 else math.inf
            if self._evidence < self._patience:
                return self._took(row, estimates, cost, "another may be better")
            decision = self._took(best, estimates, best_cost, "better")
        self._tell(decision)
        return decision

    def override(self, row: _Row, estimates: Estimates, reason: str) -> Decision[_Row]:
        """Take `row` for a reason from outside, such as a server that is gone; later decisions start from it."""
        with self._lock:
            now = estimates.conditions()
            decision = self._took(row, estimates, self._cost(row, now.link, now.load, now.slowdown), reason)
        if decision.changed:
            self._tell(decision)
        return decision

    def _noise(self, row: _Row, best: _Row, gain: float, estimates: Estimates) -> float:
        cost, moved = self._cost, 0.0
        for other in estimates.alternatives():
            link, load, slowdown = other.link, other.load, other.slowdown
            moved += (cost(row, link, load, slowdown) - cost(best, link, load, slowdown) - gain) ** 2
        return math.sqrt(moved)

    def _took(self, row: _Row, estimates: Estimates, cost: float, reason: str) -> Decision[_Row]:
        changed = bool(self.decisions) and self.decisions[-1].row != row
        decision = Decision(self._now_s(), row, estimates, cost, reason, changed)
        self.decisions.append(decision)
        if changed:
            self.changes += 1
            self._evidence = 0.0
        return decision

    def _tell(self, decision: Decision[_Row]) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(decision)
        except Exception:
            # An answer must not be lost to a listener.
            _logger.exception("on_change raised, and was passed over")
