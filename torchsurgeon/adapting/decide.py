"""Where to cut at the next inference: at the best row under the present estimates, unless the gain may be noise.

A row is one way to run the model: a cut with its codec, as a planning frontier lists them. Of rows that cost about the
same, the one is taken whose codec changes the model's answers least.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.adapting.clock import NowS
from torchsurgeon.adapting.link import LinkEstimate
from torchsurgeon.adapting.load import LoadEstimate
from torchsurgeon.adapting.mean import Quantity
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import Link

_logger = logging.getLogger(__name__)


class Estimates(NamedTuple):
    """The estimates that one decision rests on.

    Attributes:
        link: rates and round trip.
        load: how busy the server is.
        slowdown: the factor by which the device is slower than predicted.
        scale: how many times as large as the traced example the call is. Its seconds of computing, joules and bytes are
            taken to grow alike.
    """

    link: LinkEstimate
    load: LoadEstimate
    slowdown: Quantity
    scale: float = 1.0

    def conditions(self) -> Conditions:
        """Return the most likely values, as a frontier takes them."""
        link = self.link.link(later_s=self.load.queue_s)
        return Conditions(link, self.load.compute.value, self.slowdown.value, self.scale)


class Conditions(NamedTuple):
    """The arguments with which a frontier computes costs.

    Attributes:
        link: rates and round trip. The wait in the server's queue is added to the round trip, because every cut that
            sends pays both once.
        load: factor on tail times.
        slowdown: factor on head times.
        scale: how many times as large as the traced example the call is.
    """

    link: Link
    load: float
    slowdown: float
    scale: float


# Predicted costs are off by more than this share, so rows that differ by less cost about the same.
_ALIKE = 0.02

_Row = TypeVar("_Row")


class RowCosts(Protocol):
    """A function that computes what every row costs under given conditions, such as a frontier's ``costs``.

    The unit is the objective's: seconds, or joules where energy is saved.
    """

    def __call__(self, link: Link, load: float, slowdown: float, *, scale: float) -> Iterable[float]:
        """Return one cost for each row, in the rows' order.

        Args:
            link: rates and round trip.
            load: factor on tail times.
            slowdown: factor on head times.
            scale: factor on tail times, head times, bytes and joules: how many times as large as the traced example the
                call is. The round trip does not grow with it.
        """


@dataclass(frozen=True, slots=True)
class Decision(Generic[_Row]):
    """One decision of a ``Decider``.

    Attributes:
        time_s: when it was made, by the decider's clock.
        row: the row that was chosen.
        estimates: the estimates that it rests on.
        cost: the row's predicted cost, in the unit of the costs.
        reason: why this row was chosen, in words.
        changed: whether the decision before was for another row.
    """

    time_s: float
    row: _Row
    estimates: Estimates
    cost: float
    reason: str
    changed: bool


class Decider(Generic[_Row]):
    """Chooses a row before every inference, and keeps it until another is better by more than noise. Thread-safe.

    A change costs next to nothing and the estimates are smooth, so the row is changed as soon as that gains more than
    ``least_gain``. It is also changed for a row that loses less, and costs at most 2 % more than the best. So over a
    quick link, where a few bytes more make no difference, finer codecs are used than over a slow one.

    Args:
        rows: the rows to choose from.
        costs: computes the costs of all rows for a link, a load, a slow-down and the size of a call.
        losses: how much each row changes the model's answers, in any unit; without them all rows count as equal.
        now_s: a monotonic clock in seconds.
        least_gain: share of the present row's cost that another row has to save.
        kept: how many decisions ``decisions`` holds.
        on_change: called with each decision that changes the row, in the deciding thread. What it raises is logged.

    Raises:
        AdaptError: ``rows`` is empty, or ``losses`` are not as many as the rows.

    Attributes:
        decisions: the last decisions, the newest at the end.
        changes: how many decisions changed the row.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        costs: RowCosts,
        *,
        losses: Sequence[float] | None = None,
        now_s: NowS = time.monotonic,
        least_gain: float = 0.0,
        kept: int = 256,
        on_change: Callable[[Decision[_Row]], object] | None = None,
    ) -> None:
        self.decisions: deque[Decision[_Row]] = deque(maxlen=kept)
        self.changes = 0
        if not rows:
            raise AdaptError("a decider needs at least one row to choose from; got no row. Give a frontier's rows")
        if losses is not None and len(losses) != len(rows):
            raise AdaptError(f"there must be as many losses as rows; got {len(losses)} for {len(rows)} rows")
        self._rows, self._costs, self._now_s = tuple(rows), costs, now_s
        self._losses = None if losses is None or len(set(losses)) == 1 else tuple(losses)
        self._on_change = on_change
        # The share of a row's cost below which another is not better.
        self._noise = least_gain if self._losses is None else max(least_gain, _ALIKE)
        self._lock = threading.Lock()
        self._place: int | None = None

    def decide(self, estimates: Estimates) -> Decision[_Row]:
        """Choose the row of one inference.

        Args:
            estimates: what is known of link, server and device at the moment.
        """
        with self._lock:
            costs = self._costs_under(estimates.conditions())
            least = min(costs)
            best = costs.index(least)
            finest = best if self._losses is None else self._finest(costs, least)
            place = finest if self._place is None else self._place
            reason = "the best"
            if costs[place] - least > self._noise * costs[place]:
                place, reason = finest, "better"
            elif self._losses is not None and self._losses[finest] < self._losses[place]:
                place, reason = finest, "changes less, and another is hardly better"
            elif place != best:
                reason = "another is hardly better"
            decision = self._record(place, costs[place], estimates, reason)
        # Outside the lock: a listener may take long, or ask this decider again.
        if decision.changed:
            self._call_listener(decision)
        return decision

    def _finest(self, costs: Sequence[float], least: float) -> int:
        """Return the row that loses least among those that cost about the least; of equal ones the cheapest."""
        assert self._losses is not None
        most = least + _ALIKE * abs(least)
        return min(
            (loss, cost, i) for i, (loss, cost) in enumerate(zip(self._losses, costs, strict=True)) if cost <= most
        )[2]

    def _costs_under(self, conditions: Conditions) -> list[float]:
        link, load, slowdown, scale = conditions
        return list(self._costs(link, load, slowdown, scale=scale))

    def _record(self, place: int, cost: float, estimates: Estimates, reason: str) -> Decision[_Row]:
        changed = self._place is not None and self._place != place
        self._place = place
        decision = Decision(self._now_s(), self._rows[place], estimates, float(cost), reason, changed)
        self.decisions.append(decision)
        if changed:
            self.changes += 1
        return decision

    def _call_listener(self, decision: Decision[_Row]) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(decision)
        except Exception as error:
            if by_signal_handler(error):
                raise
            # A listener's error must not cost the inference its answer.
            _logger.exception("on_change raised; the error is ignored")
