"""The ways to run a call, the goal that they are chosen by, and the choice among them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from torchsurgeon._cached import cached_property
from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.adapting import Decider, Decision, Estimates
from torchsurgeon.codec import Codec, find_codec
from torchsurgeon.codec.fitted import FittedCodec, RatedCodec
from torchsurgeon.errors import PlanError
from torchsurgeon.link import Link
from torchsurgeon.planning import Battery, Frontier, Objective, Row
from torchsurgeon.planning.costs import Expected
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

_logger = logging.getLogger(__name__)

# A battery's level moves in minutes, and reading it may be a system call or a message to another process.
_BATTERY_S = 1.0
# A choice stands for so long. The estimates are averages over a hundred times as long, so choosing again for each of
# several calls within this time would only cost these calls more.
_STANDS_S = 2e-3
# A server that computes in no time, and the shortest tail that shows how long one computes.
_NO_LOAD, _TIMED_TAIL_S = 1e-6, 1e-3

COMPILED_GAIN = 0.1
"""The share of its latency that another cut has to save where the parts of each cut have to be compiled first."""


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run the model.

    Attributes:
        point: where it is cut.
        whole: whether everything runs on the device.
        row: what it is predicted to cost; None where nothing was predicted.
        codec: how the boundary is encoded; None for the module's own codec.
    """

    point: PartitionPoint
    whole: bool
    row: Row | None = None
    codec: Codec | None = None

    @cached_property
    def name(self) -> str:
        """The name under which ``stats()`` counts it."""
        if self.whole:
            return "device"
        return self.point.name if self.codec is None else f"{self.point.name}, {self.codec.name}"

    @cached_property
    def student(self) -> FittedCodec | None:
        """The codec whose student computes the boundary in place of the model's own layers; None where these do."""
        return self.codec.student_at(self.point) if isinstance(self.codec, RatedCodec) else None


def _unmetered(device: LayerProfile) -> str | None:
    """Return why a profile does not give the energy of every cut, and what to do about it; None if it does."""
    joules = device.head_j
    if joules is not None and math.isfinite(joules[-1]):
        return None
    return (
        f"the device's profile has no joules for some layers (meter: {device.provenance.get('meter', 'none')}); give "
        "a device_profile= with joules, measured where a meter exists (docs/profiling.md)"
    )


def _unknown_radio(link: Link | None) -> str | None:
    """Return why the energy of a transfer is unknown, and what to do about it; None if it is known."""
    if link is not None and link.radio is not None:
        return None
    which = "a measured link" if link is None else f"the link {link.name!r}"
    return (
        f"the energy of the radio over {which} is unknown; give a link= with a radio, such as "
        'ts.Link.parse("wifi"), or Link(…, radio=torchsurgeon.link.WIRED) where no radio is in use'
    )


class Goal:
    """What is minimized at the moment: an objective, or the one that a battery's charge asks for.

    Attributes:
        wanted: what the user asked for.
        energy_unknown_because: why energy is unknown, once that has turned out; latency is then minimized instead.
    """

    def __init__(self, wanted: Objective | Battery) -> None:
        self.wanted = wanted
        self.energy_unknown_because: str | None = None
        self._now: str | Objective = wanted.now() if isinstance(wanted, Battery) else _plain(wanted)
        self._asked_s = time.monotonic()

    @property
    def needs_joules(self) -> bool:
        """Whether energy counts, now or when the battery is lower."""
        return isinstance(self.wanted, Battery) or self.wanted.energy > 0

    def check(self, device: LayerProfile | None, link: Link | None) -> None:
        """Check that the given profile and link tell the energy, if energy counts.

        Raises:
            PlanError: they do not.
        """
        if self.needs_joules:
            reason = (_unmetered(device) if device is not None else None) or (
                _unknown_radio(link) if link is not None else None
            )
            if reason is not None:
                raise PlanError(
                    f"energy is not known, so it cannot be minimized: {reason}; or choose another objective"
                )

    def settle(self, device: LayerProfile, link: Link | None, *, yields: bool) -> str | None:
        """Minimize latency from now on, if energy counts and turns out to be unknown.

        Args:
            device: the device's profile, given or measured.
            link: the link, if it is known.
            yields: whether latency may take energy's place. A goal that follows a battery always yields.

        Returns:
            What to warn the caller of, once; None if nothing has changed.

        Raises:
            PlanError: energy is unknown, and the goal does not yield.
        """
        if self.energy_unknown_because is not None or not self.needs_joules:
            return None
        reason = _unmetered(device) or _unknown_radio(link)
        if reason is None:
            return None
        if not yields and isinstance(self.wanted, Objective):
            raise PlanError(f"energy is not known, so it cannot be minimized: {reason}; or choose another objective")
        self.energy_unknown_because = reason
        return f"latency is minimized instead of energy: {reason}"

    def now(self) -> str | Objective:
        """Return the objective at the moment, as a frontier takes it."""
        if self.energy_unknown_because is not None:
            return "latency"
        if isinstance(self.wanted, Battery) and not 0 <= time.monotonic() - self._asked_s < _BATTERY_S:
            self._asked_s = time.monotonic()
            try:
                self._now = self.wanted.now()
            except Exception as error:
                if by_signal_handler(error):
                    raise
                # A battery that fails to be read must not cost an answer.
                _logger.exception("the battery's level could not be read; the last objective stays")
        return self._now


def _plain(objective: Objective) -> str | Objective:
    # A frontier takes a short way for this word.
    return "latency" if objective == Objective(latency=1.0) else objective


class Adaptive:
    """Chooses among the rows of a frontier before every call. Thread-safe.

    Args:
        graph: the traced model.
        frontier: the rows.
        server: the server's layer times.
        goal: what to minimize.
        own_codec: whether the rows say how to encode; otherwise everything is sent under the module's codec.
        least_gain: the share of the present row's cost that another has to save.
        on_change: called with every decision for another row.
    """

    def __init__(
        self,
        graph: LayerGraph,
        frontier: Frontier,
        server: LayerProfile,
        goal: Goal,
        *,
        own_codec: bool,
        least_gain: float = 0.0,
        on_change: Callable[[Decision[Row]], object] | None,
    ) -> None:
        self.frontier = frontier
        self.ways = {
            id(row): Way(row.point(graph), row.on_device, row, find_codec(row.codec) if own_codec else None)
            for row in frontier.rows
        }
        self.tail_s = [float(value) for value in server.tail_s]
        self.goal = goal
        self._least_gain, self._on_change = least_gain, on_change
        self.decider = self._new_decider()
        self._standing: tuple[Way, Decision[Row]] | None = None
        self._streams: dict[int, Adaptive] = {}

    def in_stream(self, in_flight: int) -> Adaptive:
        """Return the choice among the same rows for streams, with a history of its own.

        Where this one makes latency small, that one makes the rate of answers large. Other objectives stay.

        Args:
            in_flight: how many calls of the stream may be under way.
        """
        if self.goal.wanted != Objective(latency=1.0):
            return self
        found = self._streams.get(in_flight)
        if found is None:
            other = self.toward(Goal(Objective(throughput=1.0, in_flight=in_flight)))
            found = self._streams.setdefault(in_flight, other)
        return found

    def toward(self, goal: Goal) -> Adaptive:
        """Return a choice among the same rows for another goal, with a history of its own."""
        other = copy.copy(self)
        other.goal = goal
        other.decider, other._standing = other._new_decider(), None
        return other

    def _new_decider(self) -> Decider[Row]:
        rows = self.frontier.rows
        losses = [row.budget_used for row in rows]
        return Decider(rows, self._costs, losses=losses, least_gain=self._least_gain, on_change=self._on_change)

    def _costs(self, link: Link, load: float, slowdown: float, *, scale: float) -> list[float]:
        return self.frontier.costs(link, load, slowdown, self.goal.now(), scale).tolist()  # type: ignore[no-any-return]

    def decide(self, estimates: Estimates) -> tuple[Way, Decision[Row]]:
        """Choose the way to run one call."""
        decision = self.decider.decide(estimates)
        way = self.ways[id(decision.row)]
        # A call that finds it standing changes nothing any more.
        self._standing = way, dataclasses.replace(decision, changed=False) if decision.changed else decision
        return way, decision

    def standing(self, scale: float) -> tuple[Way, Decision[Row]] | None:
        """Return the last choice if it is so new that nothing can have changed since; otherwise None.

        Args:
            scale: the call's bytes over the example's; the choice was made for calls of the same size.
        """
        made = self._standing
        if made is None or made[1].estimates.scale != scale or not 0 <= time.monotonic() - made[1].time_s < _STANDS_S:
            return None
        return made

    def least_cost(self, estimates: Estimates) -> float:
        """Return what the best row costs now; servers are compared by it."""
        link, load, slowdown, scale = estimates.conditions()
        return float(self.frontier.costs(link, load, slowdown, self.goal.now(), scale).min())

    def worth_a_trial(self, estimates: Estimates) -> Row | None:
        """Return the row to try a server with that is not asked now; None where its speed could not matter.

        It is the best row but for the tail's seconds, if it would then beat the device, and its tail is long enough to
        tell how fast the server is.
        """
        link, _, slowdown, scale = estimates.conditions()
        costs = self.frontier.costs(link, _NO_LOAD, slowdown, self.goal.now(), scale)
        here = min(
            (cost for row, cost in zip(self.frontier.rows, costs, strict=True) if row.on_device), default=math.inf
        )
        tried = [
            (cost, place)
            for place, (row, cost) in enumerate(zip(self.frontier.rows, costs, strict=True))
            if not row.on_device and not row.student and row.tail_s >= _TIMED_TAIL_S and cost < here
        ]
        return self.frontier.rows[min(tried)[1]] if tried else None

    def expected(self, row: Row, estimates: Estimates, scale: float) -> Expected:
        """Return how long the server's part of a row should take for a call of ``scale`` times the example's size."""
        link, load, slowdown, _ = estimates
        return self.frontier.expected(row, link, load, slowdown.value, scale)

    def latencies(self, estimates: Estimates) -> list[float]:
        """Return the predicted latency of every row, in the order of the frontier's rows."""
        link, load, slowdown, scale = estimates.conditions()
        return self.frontier.costs(link, load, slowdown, "latency", scale).tolist()  # type: ignore[no-any-return]
