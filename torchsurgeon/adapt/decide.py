"""Where to cut this time: the best row for what is known now, unless the gain may be noise."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from torchsurgeon.adapt.clock import NowS
from torchsurgeon.adapt.link import LinkEstimate
from torchsurgeon.adapt.load import LoadEstimate
from torchsurgeon.adapt.tracker import Quantity
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import Link

_logger = logging.getLogger(__name__)

_ALLOWANCE = 0.5  # gains of less than so many deviations are no evidence


class Estimates(NamedTuple):
    """What one decision rests on. A call `scale` times as large as the example takes as many times as long."""

    link: LinkEstimate
    load: LoadEstimate
    slowdown: Quantity
    scale: float = 1.0

    def conditions(self) -> Conditions:
        """The most likely values."""
        return self._scaled(self.link.link(later_s=self.load.queue_s), self.load.compute.value, self.slowdown.value)

    def alternatives(self) -> tuple[Conditions, ...]:
        """The most likely values with one of them moved by one standard deviation of its estimate, each in turn."""
        about, queue_s = self.link, self.load.queue_s
        link, load, slowdown = about.link(later_s=queue_s), self.load.compute.value, self.slowdown.value
        trip_off_s = math.hypot(about.round_trip.value * math.expm1(about.round_trip.error), self.load.queue_error_s)
        return (
            self._scaled(about.link(uplink_off=-1, later_s=queue_s), load, slowdown),
            self._scaled(about.link(downlink_off=-1, later_s=queue_s), load, slowdown),
            self._scaled(about.link(later_s=queue_s + trip_off_s), load, slowdown),
            self._scaled(link, load * math.exp(self.load.compute.error), slowdown),
            self._scaled(link, load, slowdown * math.exp(self.slowdown.error)),
        )

    def _scaled(self, link: Link, load: float, slowdown: float) -> Conditions:
        if self.scale == 1.0:
            return Conditions(link, load, slowdown)
        slower = dataclasses.replace(
            link, uplink_bit_s=link.uplink_bit_s / self.scale, downlink_bit_s=link.downlink_bit_s / self.scale
        )
        return Conditions(slower, load * self.scale, slowdown * self.scale)


class Conditions(NamedTuple):
    """What a frontier is asked with: `load` multiplies tail times, `slowdown` head times.

    The wait in the server's queue is part of the link's round trip: like it, it is paid once by every cut that sends.
    """

    link: Link
    load: float
    slowdown: float


_Row = TypeVar("_Row")


class Costs(Protocol):
    """What every row costs under given conditions, as a frontier tells: seconds, or joules if those are to be saved."""

    def __call__(self, link: Link, load: float, slowdown: float) -> Iterable[float]:
        """Return one cost a row, in the rows' order."""


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
    decisions, and one below half the noise never.

    :param rows: what there is to choose from
    :param costs: of all rows for a link, a load and a slow-down
    :param patience: evidence that a change takes, in multiples of the noise
    :param least_gain: share of the cost below which no gain is worth a change
    :param kept: decisions that `decisions` holds
    :param on_change: called with a decision for another row, after it was taken, in the deciding thread
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        costs: Costs,
        *,
        now_s: NowS = time.monotonic,
        patience: float = 2.0,
        least_gain: float = 0.05,
        kept: int = 256,
        on_change: Callable[[Decision[_Row]], object] | None = None,
    ) -> None:
        self.decisions: deque[Decision[_Row]] = deque(maxlen=kept)
        """The last decisions, the newest at the end."""
        self.changes = 0
        if not rows:
            raise AdaptError("there is no row to choose from: give those of a frontier")
        self._rows, self._costs, self._now_s = tuple(rows), costs, now_s
        self._patience, self._least_gain, self._on_change = patience, least_gain, on_change
        self._lock = threading.Lock()
        self._place: int | None = None
        self._evidence = 0.0

    def decide(self, estimates: Estimates) -> Decision[_Row]:
        """Choose for one inference."""
        with self._lock:
            costs = self._costs_under(estimates.conditions())
            best = costs.index(min(costs))
            place = best if self._place is None else self._place
            gain = costs[place] - costs[best]
            if gain <= self._least_gain * costs[place]:
                self._evidence = 0.0
                reason = "the best" if place == best else "another is hardly better"
            else:
                noise = self._noise(place, best, gain, estimates)
                self._evidence = max(0.0, self._evidence + gain / noise - _ALLOWANCE) if noise > 0 else math.inf
                reason = "another may be better"
                if self._evidence >= self._patience:
                    place, reason = best, "better"
            decision = self._took(place, costs[place], estimates, reason)
        if decision.changed:
            self._tell(decision)
        return decision

    def override(self, row: _Row, estimates: Estimates, reason: str) -> Decision[_Row]:
        """Take `row` for a reason from outside, such as a server that is gone; later decisions start from it."""
        with self._lock:
            if row not in self._rows:
                raise AdaptError(f"{row} is none of the {len(self._rows)} rows that this decider chooses from")
            place = self._rows.index(row)
            cost = self._costs_under(estimates.conditions())[place]
            decision = self._took(place, cost, estimates, reason)
        if decision.changed:
            self._tell(decision)
        return decision

    def _costs_under(self, conditions: Conditions) -> list[float]:
        return list(self._costs(conditions.link, conditions.load, conditions.slowdown))

    def _noise(self, place: int, best: int, gain: float, estimates: Estimates) -> float:
        moved = 0.0
        for conditions in estimates.alternatives():
            costs = self._costs_under(conditions)
            moved += (costs[place] - costs[best] - gain) ** 2
        return math.sqrt(moved)

    def _took(self, place: int, cost: float, estimates: Estimates, reason: str) -> Decision[_Row]:
        changed = self._place is not None and self._place != place
        self._place = place
        decision = Decision(self._now_s(), self._rows[place], estimates, float(cost), reason, changed)
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
