"""Where to cut this time: the best row for what is known now, unless the gain may be noise."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from torchsurgeon.adapting.clock import NowS
from torchsurgeon.adapting.link import LinkEstimate
from torchsurgeon.adapting.load import LoadEstimate
from torchsurgeon.adapting.tracker import Quantity
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import Link

_logger = logging.getLogger(__name__)


class Estimates(NamedTuple):
    """What one decision rests on. A call `scale` times as large as the example takes as many times as long."""

    link: LinkEstimate
    load: LoadEstimate
    slowdown: Quantity
    scale: float = 1.0

    def conditions(self) -> Conditions:
        """The most likely values."""
        link = self.link.link(later_s=self.load.queue_s)
        if self.scale != 1.0:
            up_bit_s, down_bit_s = link.uplink_bit_s / self.scale, link.downlink_bit_s / self.scale
            link = dataclasses.replace(link, uplink_bit_s=up_bit_s, downlink_bit_s=down_bit_s)
        return Conditions(link, self.load.compute.value * self.scale, self.slowdown.value * self.scale)


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

    A change costs next to nothing, so one is made as soon as it gains more than `least_gain`; the estimates are smooth.

    :param rows: what there is to choose from
    :param costs: of all rows for a link, a load and a slow-down
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
        least_gain: float = 0.07,
        kept: int = 256,
        on_change: Callable[[Decision[_Row]], object] | None = None,
    ) -> None:
        self.decisions: deque[Decision[_Row]] = deque(maxlen=kept)
        """The last decisions, the newest at the end."""
        self.changes = 0
        if not rows:
            raise AdaptError("there is no row to choose from: give those of a frontier")
        self._rows, self._costs, self._now_s = tuple(rows), costs, now_s
        self._least_gain, self._on_change = least_gain, on_change
        self._lock = threading.Lock()
        self._place: int | None = None

    def decide(self, estimates: Estimates) -> Decision[_Row]:
        """Choose for one inference."""
        with self._lock:
            costs = self._costs_under(estimates.conditions())
            best = costs.index(min(costs))
            place = best if self._place is None else self._place
            reason = "the best"
            if costs[place] - costs[best] > self._least_gain * costs[place]:
                place, reason = best, "better"
            elif place != best:
                reason = "another is hardly better"
            decision = self._took(place, costs[place], estimates, reason)
        if decision.changed:
            self._tell(decision)
        return decision

    def _costs_under(self, conditions: Conditions) -> list[float]:
        return list(self._costs(conditions.link, conditions.load, conditions.slowdown))

    def _took(self, place: int, cost: float, estimates: Estimates, reason: str) -> Decision[_Row]:
        changed = self._place is not None and self._place != place
        self._place = place
        decision = Decision(self._now_s(), self._rows[place], estimates, float(cost), reason, changed)
        self.decisions.append(decision)
        if changed:
            self.changes += 1
        return decision

    def _tell(self, decision: Decision[_Row]) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(decision)
        except Exception:
            # An answer must not be lost to a listener.
            _logger.exception("on_change raised, and was passed over")
