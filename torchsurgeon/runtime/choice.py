"""Where to cut this time, and how long that should take."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torchsurgeon.adapting import Decider, Decision, Estimates
from torchsurgeon.codec import Codec, find_codec
from torchsurgeon.errors import PlanError
from torchsurgeon.link import Link
from torchsurgeon.planning import Battery, Frontier, Objective, Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

_logger = logging.getLogger(__name__)

# A battery's level moves in minutes, and reading it may be a system call or a message to another process.
_BATTERY_S = 1.0


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run the model: where it is cut and how what crosses is encoded; ``row`` is None where nobody predicted
    what it costs, ``codec`` where the module's own is used."""

    point: PartitionPoint
    whole: bool
    row: Row | None = None
    codec: Codec | None = None

    @property
    def name(self) -> str:
        """The way as ``stats`` counts it."""
        if self.whole:
            return "device"
        return self.point.name if self.codec is None else f"{self.point.name}, {self.codec.name}"


class Expected(NamedTuple):
    """How long the server's part should take, from the end of the head to the answer, and one round trip of that."""

    remote_s: float
    spread: float
    round_trip_s: float


def _unmetered(device: LayerProfile) -> str | None:
    """Return why a profile does not tell the energy of every cut, and what to do about it; None where it does."""
    joules = device.head_j
    if joules is not None and math.isfinite(joules[-1]):
        return None
    return (
        f"the device's profile holds no joules of all layers (meter: {device.provenance.get('meter', 'none')}); give "
        "device_profile= with joules, from where a meter exists (docs/profiling.md)"
    )


def _unknown_radio(link: Link | None) -> str | None:
    """Return why the energy of a transfer cannot be told, and what to do about it; None where it can."""
    if link is not None and link.radio is not None:
        return None
    which = "the link that is measured here" if link is None else f"{link.name!r}"
    return (
        f"what the radio takes over {which} is not known; give link= with a radio, such as "
        'ts.Link.parse("wifi") or Link(…, radio=torchsurgeon.link.WIRED) where no radio is in use'
    )


class Goal:
    """What is made small at the moment: an objective, or the one a battery asks for.

    ``lack`` says why energy cannot be told, once that is known; then latency takes its place.
    """

    def __init__(self, wanted: Objective | Battery) -> None:
        self.wanted = wanted
        self.lack: str | None = None
        self._now: str | Objective = wanted.now() if isinstance(wanted, Battery) else _plain(wanted)
        self._asked_s = time.monotonic()

    @property
    def needs_joules(self) -> bool:
        """Whether energy counts, now or when the battery is lower."""
        return isinstance(self.wanted, Battery) or self.wanted.energy > 0

    def check(self, device: LayerProfile | None, link: Link | None) -> None:
        """Raise PlanError where energy counts, and what was given of device and link does not tell it."""
        if self.needs_joules:
            lack = (_unmetered(device) if device is not None else None) or (
                _unknown_radio(link) if link is not None else None
            )
            if lack is not None:
                raise PlanError(f"energy cannot be saved: {lack}; or choose another objective")

    def settle(self, device: LayerProfile, link: Link | None, *, yields: bool) -> str | None:
        """Turn to latency where energy counts, and all that is known of device and link does not tell it. Return what
        to warn of, once.

        Raises PlanError in its place where the goal does not yield, unless it only follows a battery.
        """
        if self.lack is not None or not self.needs_joules:
            return None
        lack = _unmetered(device) or _unknown_radio(link)
        if lack is None:
            return None
        if not yields and isinstance(self.wanted, Objective):
            raise PlanError(f"energy cannot be saved: {lack}; or choose another objective")
        self.lack = lack
        return f"latency is made small, not energy: {lack}"

    def now(self) -> str | Objective:
        """The objective, as a frontier takes it."""
        if self.lack is not None:
            return "latency"
        if isinstance(self.wanted, Battery) and not 0 <= time.monotonic() - self._asked_s < _BATTERY_S:
            self._asked_s = time.monotonic()
            try:
                self._now = self.wanted.now()
            except Exception:
                # An answer must not be lost to a battery that cannot be read.
                _logger.exception("the battery's level could not be told; the last objective stays")
        return self._now


def _plain(objective: Objective) -> str | Objective:
    # A frontier has a short way for the word.
    return "latency" if objective == Objective(latency=1.0) else objective


class Adaptive:
    """Chooses among the rows of a frontier before every inference. Thread-safe.

    :param own_codec: whether rows say how to encode; otherwise all is sent under the module's codec
    :param on_change: told of every decision for another row
    """

    def __init__(
        self,
        graph: LayerGraph,
        frontier: Frontier,
        server: LayerProfile,
        goal: Goal,
        *,
        own_codec: bool,
        on_change: Callable[[Decision[Row]], object] | None,
    ) -> None:
        self.frontier = frontier
        self.ways = {
            id(row): Way(row.point(graph), row.on_device, row, find_codec(row.codec) if own_codec else None)
            for row in frontier.rows
        }
        self.tail_s = [float(value) for value in server.tail_s]
        self.goal = goal
        self._on_change = on_change
        self.decider: Decider[Row] = Decider(frontier.rows, self._costs, on_change=on_change)

    def toward(self, goal: Goal) -> Adaptive:
        """The same rows, chosen among for another goal, with a history of its own."""
        other = copy.copy(self)
        other.goal = goal
        other.decider = Decider(self.frontier.rows, other._costs, on_change=self._on_change)
        return other

    def _costs(self, link: Link, load: float, slowdown: float) -> list[float]:
        return self.frontier.costs(link, load, slowdown, self.goal.now()).tolist()  # type: ignore[no-any-return]

    def decide(self, estimates: Estimates) -> tuple[Way, Decision[Row]]:
        """Choose for one inference."""
        decision = self.decider.decide(estimates)
        return self.ways[id(decision.row)], decision

    def least_cost(self, estimates: Estimates) -> float:
        """What the best row costs now, to compare servers by."""
        now = estimates.conditions()
        return float(self.frontier.costs(now.link, now.load, now.slowdown, self.goal.now()).min())

    def expected(self, row: Row, estimates: Estimates) -> Expected:
        """How long the server's part of a row should take, for a call like the example."""
        link, load, slowdown, _ = estimates
        round_trip_s = link.round_trip.value + load.queue_s
        up_s = row.size_bytes * 8 / link.uplink.value
        tail_s = (row.tail_s + row.decode_s) * load.compute.value
        down_s = self.frontier.answer_bytes * 8 / link.downlink.value
        here_s = row.encode_s * slowdown.value
        remote_s = up_s + tail_s + down_s + here_s + round_trip_s
        spread = math.hypot(
            up_s * link.uplink.spread,
            tail_s * load.compute.spread,
            down_s * link.downlink.spread,
            link.round_trip.value * link.round_trip.spread,
            load.queue_spread_s,
        )
        return Expected(remote_s, spread / remote_s if remote_s > 0 else 0.0, round_trip_s)

    def latencies(self, estimates: Estimates) -> list[float]:
        """The predicted latency of every row, in the order of the frontier's rows."""
        now = estimates.conditions()
        return self.frontier.costs(now.link, now.load, now.slowdown, "latency").tolist()  # type: ignore[no-any-return]
