"""A SplitModule in simulated time: calls over a replayed uplink, with what its background thread sends between them.

Estimates, decisions, the breaker, the schedules of pings and probes, patience and deadlines are the package's own.
Simulated are the network, whose times are exact, and who does what when: as ``torchsurgeon.runtime`` does it, the tail
is started on the device when the answer is late, a missing answer lowers the estimates and may open the breaker, and
the background thread looks at the server four times a second, twenty times while it is in trouble.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchsurgeon.adapting import Decider, Estimates, Quantity, ServerState, SlowdownEstimator, patience, rescue
from torchsurgeon.adapting.link import LinkEstimate
from torchsurgeon.link import BandwidthTrace, Link
from torchsurgeon.planning.costs import Expected
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.row import Row

PACKET_BYTES, PING_BYTES = 1500, 4400
PING_TAIL_S, PROBE_ANSWER_BYTES = 1e-3, 100
TICK_S, TRIAL_TICK_S, ERRAND_S, QUIET_S, MOST_ERRANDS = 0.25, 0.05, 2.0, 1.0, 4
SLOW_FACTOR, LEAST_SLOW_S = 2.0, 0.05


class Network:
    """Simulated time, and a link whose uplink follows a trace. What is sent while something passes waits behind it."""

    def __init__(self, trace: BandwidthTrace, link: Link, seed: int) -> None:
        self.trace, self.link, self.noise = trace, link, random.Random(seed)
        self.s = self.free_s = 0.0

    def __call__(self) -> float:
        return self.s

    def about(self, value_s: float) -> float:
        return value_s * self.noise.uniform(0.9, 1.1)

    def exchange(self, at_s: float, up_bytes: float, down_bytes: int, tail_s: float) -> tuple[float, dict[str, Any]]:
        """Return when an exchange that begins at ``at_s`` ends, and its timing as an estimator takes it."""
        begin_s = max(at_s, self.free_s)
        first_s = self.trace.delivered_at(begin_s, min(up_bytes, PACKET_BYTES))
        self.free_s = sent_s = self.trace.delivered_at(begin_s, up_bytes)
        down_s, tail_s = self.link.downlink_s(down_bytes), self.about(tail_s)
        total_s = sent_s - at_s + self.about(self.link.round_trip_s) + tail_s + down_s
        return at_s + total_s, {
            "up_bytes": int(up_bytes),
            "up_s": sent_s - first_s,
            "down_bytes": down_bytes,
            "down_s": down_s * (1 - min(PACKET_BYTES / down_bytes, 1)),
            "total_s": total_s,
            "server_s": tail_s,
        }

    def drop(self, at_s: float) -> None:
        """Give up what passes: what is left of it is not sent."""
        self.free_s = min(self.free_s, max(at_s, self.s))


class AverageLink:
    """The simple rival to ``LinkEstimator``: moving averages of the rates and round trips seen, each of weight a half.

    It stands in a ``ServerState`` in the estimator's place, so that everything else is the same.
    """

    def __init__(self, prior: Link, now_s: Callable[[], float]) -> None:
        self._now_s, self._seen_s = now_s, now_s()
        self._up_bit_s, self._down_bit_s, self._trip_s = prior.uplink_bit_s, prior.downlink_bit_s, prior.round_trip_s

    def observe(
        self,
        *,
        up_bytes: int,
        up_s: float | None,
        down_bytes: int,
        down_s: float,
        total_s: float,
        server_s: float = 0.0,
    ) -> None:
        left_s = total_s - down_s - server_s
        if up_s is None:
            up_s = left_s - self._trip_s
        else:
            self._trip_s += 0.5 * (left_s - up_s - self._trip_s)
        self._up_bit_s += 0.5 * (up_bytes * 8 / max(up_s, 2e-3) - self._up_bit_s)
        self._seen_s = self._now_s()

    def missed(self, *, up_bytes: int, waited_s: float) -> None:
        self._up_bit_s = min(self._up_bit_s, up_bytes * 8 / max(waited_s - self._trip_s, 2e-3))

    def estimate(self) -> LinkEstimate:
        age_s = self._now_s() - self._seen_s
        up, down, trip = (
            Quantity(value, 0.1, 0.3, age_s) for value in (self._up_bit_s, self._down_bit_s, self._trip_s)
        )
        return LinkEstimate(up, down, trip)


class ToldLink:
    """An estimator that is told, at no cost, what the uplink could have carried in the last half second."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def observe(self, **timing: Any) -> None:
        pass

    def missed(self, **timing: Any) -> None:
        pass

    def estimate(self) -> LinkEstimate:
        network = self._network
        since_s = max(network.s - 0.5, 0.0)
        passed_s = max(network.s - since_s, 1e-3)
        up_bit_s = max(network.trace.bits_available(since_s, since_s + passed_s) / passed_s, 1e3)
        known = (up_bit_s, network.link.downlink_bit_s, network.link.round_trip_s)
        up, down, trip = (Quantity(value, 0.1, 0.3, 0.0) for value in known)
        return LinkEstimate(up, down, trip)


@dataclass
class Errand:
    """Something that the background thread has sent."""

    trial: bool
    begun_s: float
    end_s: float
    then: Callable[[], None]
    reported: bool = False


@dataclass(frozen=True)
class Call:
    """How one call went: when it began, what it took, and when the next one began."""

    begin_s: float
    latency_s: float
    next_s: float
    row: Row
    probes: int
    local: bool
    """Whether the device was asked for an answer that the server was late with."""


class Module:
    """One module with one server. ``link`` takes its estimator's place; ``deadline_s`` is that of every call."""

    def __init__(
        self,
        network: Network,
        frontier: Frontier,
        *,
        link: AverageLink | ToldLink | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self.network, self.frontier, self.deadline_s = network, frontier, deadline_s
        self.device = next(row for row in frontier.rows if row.on_device)
        self.state: ServerState[str] = ServerState.new("only", network.link, now_s=network, jitter=random.Random(1))
        self.link: Any = link or self.state.link
        self.slowdown = SlowdownEstimator(now_s=network)
        self.decider = Decider(frontier.rows, frontier.costs, now_s=network)
        self.doubted = False
        self._errands: list[Errand] = []
        self._tick_s, self._heard_s = TRIAL_TICK_S, -math.inf

    # --- calls ---

    def call(self, pause_s: float) -> Call:
        """Run one call, let ``pause_s`` pass, and return how it went."""
        network, begin_s, probes = self.network, self.network.s, self.state.probes.count
        usable = self.state.breaker.state == "closed"
        estimates = self._estimates()
        row = self.decider.decide(estimates).row if usable else self.device
        head_s = network.about(row.head_s)
        self._until(begin_s + head_s)
        self.slowdown.observe(head_s, row.head_s)
        local = False
        if not row.on_device:
            link, load, slowdown, _ = estimates
            expected = self.frontier.expected(row, link, load, slowdown.value)
            local = self._ask(row, expected, None if self.deadline_s is None else begin_s + self.deadline_s)
        latency_s = network.s - begin_s
        self._until(network.s + pause_s)
        return Call(begin_s, latency_s, network.s, row, self.state.probes.count - probes, local)

    def _estimates(self) -> Estimates:
        return Estimates(self.link.estimate(), self.state.load.estimate(), self.slowdown.estimate())

    def _ask(self, row: Row, expected: Expected, due_s: float | None) -> bool:
        """Wait for the server's answer or the device's, and return whether it was the device's."""
        network, sent_s = self.network, self.network.s
        end_s, timing = network.exchange(sent_s, row.size_bytes, self.frontier.answer_bytes, row.tail_s)
        slowdown = self.slowdown.estimate()
        wait_s = patience(expected.remote_s, expected.spread, expected.round_trip_s)
        left_s = self.device.head_s - row.head_s
        if due_s is not None:
            plan = rescue(
                due_s - sent_s,
                remote_s=expected.remote_s,
                remote_spread=expected.spread,
                tail_s=left_s * slowdown.value,
                tail_spread=slowdown.spread,
            )
            wait_s = min(wait_s, plan.start_s)
        here_s = sent_s + wait_s + network.about(left_s)
        if end_s <= here_s:
            self._until(end_s)
            self.state.breaker.succeeded()
            self._heard(timing, row.tail_s)
            return False
        self._until(here_s)
        network.drop(here_s)
        taken_s = here_s - sent_s
        if taken_s > expected.remote_s:
            self.doubted = True
            self.link.missed(up_bytes=int(row.size_bytes), waited_s=taken_s - row.tail_s)
        if taken_s > max(SLOW_FACTOR * expected.remote_s, LEAST_SLOW_S):
            self.state.breaker.failed()
        return True

    def _heard(self, timing: dict[str, Any], predicted_s: float) -> None:
        self._heard_s = self.network.s
        self.state.load.observe(queue_s=0.0, compute_s=timing["server_s"], predicted_s=predicted_s)
        self.link.observe(**timing)

    # --- between calls ---

    def _until(self, end_s: float) -> None:
        """Let time pass, with what the background thread does in it."""
        while True:
            first = min(self._errands, key=lambda errand: errand.end_s, default=None)
            if first is not None and first.end_s <= min(self._tick_s, end_s):
                self.network.s = max(self.network.s, first.end_s)
                self._errands.remove(first)
                first.then()
            elif self._tick_s <= end_s:
                self.network.s = max(self.network.s, self._tick_s)
                self._look()
                troubled = self.state.breaker.state != "closed"
                self._tick_s = self.network.s + (TRIAL_TICK_S if troubled else TICK_S)
            else:
                self.network.s = max(self.network.s, end_s)
                return

    def _look(self) -> None:
        now_s, breaker, state = self.network.s, self.state.breaker, self.state
        for errand in self._errands:
            if errand.trial and not errand.reported and now_s - errand.begun_s > breaker.trial_s:
                errand.reported = True
                breaker.failed()
        if breaker.state != "closed":
            fit = all(errand.trial for errand in self._errands) and len(self._errands) < MOST_ERRANDS
            if fit and breaker.allow():
                self._ping(lambda: self._ping(self._prove, trial=True), trial=True)
        elif not self._errands:
            rate = self.link.estimate().uplink
            if self.doubted:
                self._ping(lambda: self._ping(self._prove, trial=True), trial=True)
            elif now_s - self._heard_s > QUIET_S and state.load.ping_due():
                self._ping(lambda: None)
            elif (size := state.probes.due_bytes(rate.age_s, rate.value)) is not None:
                self._probe(size, lambda: None)

    def _prove(self) -> None:
        """Probe twice what is in doubt, and then take the server for well."""

        def well() -> None:
            self.doubted = False
            self.state.breaker.succeeded()

        size = self.state.probes.least_bytes
        if self.doubted:
            self._probe(size, lambda: self._probe(size, well, trial=True), trial=True)
        else:
            well()

    def _send(
        self, size: int, answer: int, ended: Callable[[dict[str, Any]], None], late: Callable[[], None], trial: bool
    ) -> None:
        begun_s = self.network.s
        end_s, timing = self.network.exchange(begun_s, size, answer, PING_TAIL_S)
        if end_s > begun_s + ERRAND_S:
            self.network.free_s = min(self.network.free_s, begun_s + ERRAND_S)
            self._errands.append(Errand(trial, begun_s, begun_s + ERRAND_S, late))
        else:
            self._errands.append(Errand(trial, begun_s, end_s, lambda: ended(timing)))

    def _ping(self, then: Callable[[], None], *, trial: bool = False) -> None:
        def ended(timing: dict[str, Any]) -> None:
            self._heard(timing, PING_TAIL_S)
            then()

        self._send(PING_BYTES, self.frontier.answer_bytes, ended, self.state.breaker.failed, trial)

    def _probe(self, size: int, then: Callable[[], None], *, trial: bool = False) -> None:
        begun_s = self.network.s

        def told(timing: dict[str, Any]) -> None:
            self.state.probes.spent(size, self.network.s - begun_s)
            self.link.observe(**timing)
            then()

        def ended(timing: dict[str, Any]) -> None:
            told(timing | {"up_s": None, "total_s": timing["total_s"] - timing["server_s"], "server_s": 0.0})

        def late() -> None:
            told({"up_bytes": size, "up_s": None, "down_bytes": 0, "down_s": 0.0, "total_s": ERRAND_S})

        self._send(size, PROBE_ANSWER_BYTES, ended, late, trial)
