"""Which server a call asks, where it cuts the model, and whether that keeps its deadline."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torchsurgeon._place import ALL_ON_DEVICE
from torchsurgeon.adapting import SURE, Allowance, Decision, Estimates, Quantity, Refusals, check_deadline
from torchsurgeon.codec import Codec, find_codec
from torchsurgeon.codec.names import FITTED
from torchsurgeon.errors import MismatchWarning, MissingCodecWarning, NoServerWarning, warn_caller
from torchsurgeon.link import Link
from torchsurgeon.models.arithmetic import Arithmetic
from torchsurgeon.planning import Row
from torchsurgeon.planning.sides import with_joules
from torchsurgeon.runtime import bits
from torchsurgeon.runtime.choice import Goal, Way
from torchsurgeon.runtime.device import DeviceTimes
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.handshake import LocalModel
from torchsurgeon.runtime.options import Options
from torchsurgeon.runtime.peer import Peer
from torchsurgeon.runtime.server_profiles import ServerProfiles
from torchsurgeon.runtime.work import Work
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.transport import HttpTransport, Transport
from torchsurgeon.wire.header import PRIORITY

# An answer may have this many times the bytes of the example's, and at least _LEAST_ANSWER_LIMIT_BYTES. Larger batches
# and images need larger answers. The limit is only there so that a hostile server cannot fill the memory.
_LEAST_ANSWER_LIMIT_BYTES = 64 << 20
_ANSWER_FACTOR = 64
_KEPT_DECISIONS = 256
# Calls move to another server only if it costs less than nine tenths of what the present one costs.
_STAY = 0.9
# At a fixed cut, another server is asked again after this time. One that took more than so many times as long as the
# best is asked later: after this time multiplied by the square of how many times it was.
_AGAIN_S, _WORTH = 10.0, 3.0
# A call that takes less than this is not worth looking for a better server.
_LONG_S = 0.1


class Choice(NamedTuple):
    """How one call is run.

    Attributes:
        way: where it cuts the model, and how what crosses is encoded.
        peer: the server it asks; None where it runs on the device as a whole.
        decision: what an adaptive choice was made on; None where the cut is fixed.
        why: why the call is not split as planned; None where it is.
    """

    way: Way
    peer: Peer | None
    decision: Decision[Row] | None = None
    why: Failure | None = None


class Servers:
    """The servers of one model in their order of preference, and the choice among them. Thread-safe.

    Args:
        servers: URLs or transports, the preferred one first. Transports are closed by whoever made them.
        local: the model on this side.
        times: how long its parts take on this device.
    """

    def __init__(
        self, servers: Sequence[str | Transport], options: Options, local: LocalModel, times: DeviceTimes
    ) -> None:
        self._options, self._local, self._times = options, local, times
        self.goal = Goal(options.objective)
        devices = with_joules(options.device_profiles)
        self.goal.check(devices[0] if devices else None, options.link)
        self._graph = graph = local.graph
        limit = max(_LEAST_ANSWER_LIMIT_BYTES, _ANSWER_FACTOR * graph.points[-1].size_bytes)
        headers = {} if options.priority is None else {PRIORITY: options.priority}
        transports = [
            HttpTransport(
                server,
                options.timeout_s,
                headers=headers,
                token=options.token,
                verify=options.ca,
                cert=options.cert,
            )
            if isinstance(server, str)
            else server
            for server in servers
        ]
        self.own = [made for made, given in zip(transports, servers, strict=True) if made is not given]
        self._allowance = Allowance(options.hourly_bytes)
        self.peers = [
            Peer(
                transport,
                options.name,
                local,
                link=options.link,
                profiles=ServerProfiles(
                    transport, options.name, options.server_profiles, options.server_backend, options.tolerance
                ),
                output_codec=options.answer_codec,
                max_bytes=limit,
                exact=options.exact,
                allowance=self._allowance,
            )
            for transport in transports
        ]
        self.whole = Way(graph.points[-1], whole=True)
        """The way that runs all layers on the device."""
        self.fixed: Way | None = None
        """Where every call cuts the model; None where each call chooses."""
        self.free_codec = False
        """Whether each call may choose among the codecs that were measured at a fixed cut."""
        self.decisions: deque[Decision[Row]] = deque(maxlen=_KEPT_DECISIONS)
        self._chosen: PartitionPoint | None = None
        self._preferred: Peer | None = None
        self._warned = self._told_of_none = False
        self._warned_of: set[str] = set()
        self._refusals = Refusals()

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child: connections, locks and estimates stay with the parent."""
        self._refusals = Refusals()
        self._allowance.reset_after_fork()
        for peer in self.peers:
            peer.reset_after_fork()

    def close(self) -> None:
        """Close the transports, those that the user gave among them."""
        for peer in self.peers:
            peer.transport.close()

    def inherit(self, earlier: Servers) -> None:
        """Take over the connections of the servers of an earlier trace, what is known of them, and the decisions."""
        self.own, self.decisions = earlier.own, earlier.decisions
        self._allowance = earlier._allowance
        for peer, known in zip(self.peers, earlier.peers, strict=True):
            peer.link, peer.answers, peer.allowance = known.link, known.answers, known.allowance
            peer.sent_bytes, peer.received_bytes = known.sent_bytes, known.received_bytes
            peer.state = dataclasses.replace(peer.state, link=known.state.link, load=known.state.load)

    # --- what is in use ---

    @property
    def adapts(self) -> bool:
        """Whether each call chooses its cut."""
        return self.fixed is None

    @property
    def chooses(self) -> bool:
        """Whether each call chooses: its cut, or at a fixed cut among the codecs that were measured there."""
        fixed, table = self.fixed, self._options.codecs
        if fixed is None:
            return True
        if fixed.whole or not self.free_codec or table is None:
            return False
        return any(cost.within_budget and cost.codec != "raw" for cost in table.costs(fixed.point))

    @property
    def planned_for(self) -> PartitionPoint | None:
        """The only cut that the choice is among; None for all."""
        return None if self.fixed is None else self.fixed.point

    @property
    def point(self) -> PartitionPoint | None:
        """Where the model is cut now; None before the first choice."""
        return self._chosen if self.fixed is None else self.fixed.point

    @property
    def link(self) -> Link | None:
        """The link as it was given, or first measured; None before that."""
        return next((peer.link for peer in self.peers if peer.link is not None), self._options.link)

    @property
    def round_trip_s(self) -> float:
        """The round trip of ``link``; 0 where that is unknown."""
        link = self.link
        return 0.0 if link is None else link.round_trip_s

    def fix(self, point: PartitionPoint | None) -> None:
        """Cut every call at ``point`` from now on; None to choose at each call."""
        self.fixed = None if point is None else Way(point, whole=point.index == len(self._graph.layers))
        self._plan_again()

    def free(self, *, codec: bool) -> None:
        """From now on, each call may choose among the codecs that were measured at a fixed cut, or may not."""
        self.free_codec = codec
        self._plan_again()

    def _plan_again(self) -> None:
        """Have those servers made ready again that have no plan for what is to be chosen among."""
        for peer in self.peers:
            if self.chooses and not peer.plans(self.planned_for):
                peer.ready_in = -1

    def warn(self, failure: Failure | None) -> None:
        """Warn the caller, once, that a server holds another model, so that its answers are not used."""
        if failure is not None and failure.kind == "mismatch" and self._options.falls_back and not self._warned:
            self._warned = True
            warn_caller(f"a server's answers are not used: {failure.text}", MismatchWarning)

    def warn_of_none(self) -> None:
        """Warn the caller, once, that no server could be made ready, so that the device answers alone."""
        if not (self._warned or self._told_of_none):
            self._told_of_none = True
            reasons = "; ".join(dict.fromkeys(failure.text for failure in self._failures()))
            text = f"no server is in use, so the device answers alone until one can be used: {reasons}"
            warn_caller(text, NoServerWarning)

    def warn_of_codec(self, codec: Codec, other: Codec, peer: Peer) -> None:
        """Warn the caller, once for each codec, that a server lacks it or that the weights are others."""
        name = codec.name.partition("@")[0]
        if name not in self._warned_of:
            self._warned_of.add(name)
            instead = f"so {other.name} is used in its place"
            warn_caller(
                f"the codec {name} was fitted to other weights than the model has now, {instead}; fit a codec to the "
                "model as it is"
                if peer.outdated(codec)
                else f"{peer.label} does not have the codec {name}, {instead}; start the server with --codec "
                f"{self._options.name}=FILE",
                MissingCodecWarning,
            )

    def next_best(self, point: PartitionPoint) -> Codec:
        """Return the codec for a point where a server lacks the wanted one: the smallest within the budget, or zstd."""
        table = self._options.codecs
        rows = () if table is None else table.at(point)
        known = [row.cost for row in rows if row.cost.within_budget and not row.cost.codec.startswith(FITTED)]
        return find_codec(min(known, key=lambda cost: cost.size_bytes).codec if known else "zstd")

    def slowdown(self) -> Quantity:
        """Return by what factor the device is slower now than predicted."""
        return self._times.slowdown()

    # --- the choice ---

    def compared(self, ours: Arithmetic) -> bool:
        """Return whether every server that is ready has been compared with what this device computes with now."""
        # A list, since every call asks, and all() with a generator takes longer.
        epoch = self._local.epoch
        return not [peer for peer in self.peers if peer.ready_in == epoch and not peer.compared(ours)]

    def choose(self, work: Work, ours: Arithmetic, *, in_flight: int | None) -> Choice:
        """Choose where to cut one call, and which server to ask.

        Args:
            work: the call.
            ours: what this device computes with.
            in_flight: how many calls of its stream may be under way, where it belongs to one. The cut of a stream is
                chosen for the rate of answers.
        """
        fixed = self.fixed
        if fixed is not None and fixed.whole:
            return Choice(fixed, None)
        peer = self._peer(work, ours)
        if peer is None:
            for other in self.peers:
                # The background thread may have found the mismatch, and cannot warn the caller itself.
                self.warn(other.failure)
            # Running on the device is worth reporting only where a server would have been asked.
            wanted = self._chosen != self.whole.point or fixed is not None
            return Choice(self.whole, None, why=self._why_nobody(ours) if wanted else None)
        if peer.plan is None or not self.chooses or not peer.plans(self.planned_for):
            return self._allowed(Choice(fixed or self.whole, peer), work)
        plan = peer.plan if in_flight is None else peer.plan.in_stream(in_flight)
        scale = work.scale()
        # An answer that did not come tells of a change at once.
        made = None if peer.doubted else plan.standing(scale)
        if made is None:
            link, load = peer.state.link.estimate(), peer.state.load.estimate()
            made = plan.decide(Estimates(link, load, self._times.slowdown(), scale))
        way, decision = made
        self._chosen = way.point
        self.decisions.append(decision)
        return self._allowed(Choice(way, peer, decision), work)

    def _allowed(self, choice: Choice, work: Work) -> Choice:
        """Return the choice, or the device where the choice would send more than may be sent in this hour."""
        if choice.way.whole or self._allowance.hourly_bytes is None:
            return choice
        metered = self.metered(choice.way, work)
        return choice if metered is None else Choice(self.whole, None, choice.decision, metered)

    def metered(self, way: Way, work: Work, request: object = None) -> Failure | None:
        """Return why no request of a call may be sent in this hour; None where it may.

        Args:
            way: how the call is cut.
            work: the call.
            request: if given, the bytes are reserved for it, so that no other request counts on them.
        """
        if self._allowance.hourly_bytes is None:
            return None
        size_bytes = (way.point.size_bytes if way.row is None else way.row.size_bytes) * work.scale()
        allowance = self._allowance
        if allowance.allows(size_bytes) if request is None else allowance.reserve(request, size_bytes):
            return None
        text = (
            f"{size_bytes:.0f} bytes more would be above hourly_bytes={self._allowance.hourly_bytes:.0f} in this hour; "
            "wait, or give a larger hourly_bytes"
        )
        return Failure("metered", text)

    def within(self, deadline_s: float, begun_s: float, work: Work, choice: Choice) -> Way:
        """Return the chosen way if its predicted latency keeps the deadline, or else the quickest way.

        Args:
            deadline_s: seconds from ``begun_s`` within which the answer is due.
            begun_s: when the call began (``time.perf_counter``).
            work: the call.
            choice: what was chosen without regard to the deadline.

        Raises:
            DeadlineError: every way of answering would miss the deadline with 99 % confidence.
        """
        way, peer, decision, _ = choice
        scale = work.scale()
        head_s, tail_s = self._times.expected_s(way)
        # taken_s is the latency of the chosen way, and best_s that of the quickest. A deadline below surely_s is missed
        # with 99 % confidence, whichever way is taken. All three begin with what running on the device alone takes.
        best_s, quickest, taken_s, how = (head_s + tail_s) * scale, way, (head_s + tail_s) * scale, ALL_ON_DEVICE
        device_error = self._times.slowdown().error
        surely_s = _surely_s(best_s, device_error)
        plan = None if decision is None or peer is None else peer.plan
        rows = () if plan is None else plan.frontier.rows
        # Another thread may have planned anew since the way was chosen. Then only what the device takes is known of it.
        at = next((i for i, row in enumerate(rows) if decision is not None and row is decision.row), None)
        if plan is not None and decision is not None and at is not None:
            latencies = plan.latencies(decision.estimates)
            least = latencies.index(min(latencies))
            taken_s = latencies[at]
            row = rows[least]
            spread = 0.0 if row.on_device else plan.expected(row, decision.estimates, max(scale, 1.0)).spread
            surely_s = min(surely_s, _surely_s(latencies[least], max(device_error, spread)))
            if latencies[least] < best_s:
                quickest = plan.ways[id(row)]
                best_s, how = latencies[least], row.where
        elif peer is not None and (expected := peer.expected_duration(way.point)) is not None:
            # What is kept of a server's part is not scaled down for inputs smaller than the example.
            taken_s = head_s * scale + expected.value * max(scale, 1.0)
            surely_s = min(surely_s, _surely_s(taken_s, max(device_error, expected.spread)))
            if taken_s < best_s:
                best_s, how = taken_s, way.point.where
        if deadline_s >= surely_s:
            self._refusals.end()
        elif self._refusals.refuse(best_s):
            check_deadline(deadline_s, best_s, how)
        return way if taken_s <= deadline_s - (time.perf_counter() - begun_s) else quickest

    def another(self, tried: Sequence[Peer], ours: Arithmetic) -> Peer | None:
        """Return a server that may be asked and is not among ``tried``."""
        epoch, peers = self._local.epoch, self.fit(ours)
        return next((peer for peer in peers if peer not in tried and peer.usable(epoch)), None)

    def fit(self, ours: Arithmetic) -> list[Peer]:
        """Return the servers whose answers are exact enough, among them those that are down."""
        return self.peers if not self._options.exact else [one for one in self.peers if not one.differences(ours)]

    def _peer(self, work: Work, ours: Arithmetic) -> Peer | None:
        """Return the cheapest usable server; the one asked last is left only for one that is clearly cheaper."""
        epoch, peers = self._local.epoch, self.fit(ours)
        if len(self.peers) == 1:
            peer = self.peers[0]
            asked = peer.usable(epoch) if self._options.falls_back else peer.ready_in == epoch
            return peer if asked and peers else None
        usable = [peer for peer in peers if peer.usable(epoch)]
        if not usable and not self._options.falls_back:
            usable = [peer for peer in peers if peer.ready_in == epoch]
        if len(usable) < 2:
            return usable[0] if usable else None
        if not self.chooses and self.fixed is not None:
            return self._quickest(usable, self.fixed.point)
        slowdown, scale = self._times.slowdown(), work.scale()
        costs = [
            peer.plan.least_cost(Estimates(peer.state.link.estimate(), peer.state.load.estimate(), slowdown, scale))
            * (_STAY if peer is self._preferred else 1.0)
            if peer.plan is not None
            else math.inf
            for peer in usable
        ]
        self._preferred = usable[costs.index(min(costs))]
        return self._preferred

    def _quickest(self, usable: Sequence[Peer], cut: PartitionPoint) -> Peer:
        """Return the server that is the quickest at a fixed cut, as its answers have shown.

        Where the one in use takes long, another one of which that is not known is asked once, and again after a while,
        which is the longer the slower it was.
        """
        known = [peer.expected_duration(cut) for peer in usable]
        durations_s = [math.inf if duration is None else duration.value for duration in known]
        least_s, now_s = min(durations_s), time.monotonic()
        for peer, duration in zip(usable, known, strict=True):
            times = 0.0 if duration is None else duration.value / least_s
            pause_s = _AGAIN_S * (1.0 if times <= _WORTH else times**2)
            if (
                peer is not self._preferred
                and _LONG_S <= least_s < math.inf
                and not 0 <= now_s - peer.asked_s < pause_s
            ):
                return peer
        costs = [
            seconds * (_STAY if peer is self._preferred else 1.0)
            for peer, seconds in zip(usable, durations_s, strict=True)
        ]
        self._preferred = usable[costs.index(min(costs))]
        return self._preferred

    def _why_nobody(self, ours: Arithmetic) -> Failure:
        """Return why no server can be asked, with the servers' failures where they are known."""
        failures = self._failures()
        if not failures and self.peers and self.peers[0].told is not None and not self.fit(ours):
            failures = [Failure.of(bits.refusal(self._options.name, self.peers[0].differences(ours)))]
        reasons = "; ".join(dict.fromkeys(map(str, failures)))
        return Failure("unserved", f"no server is in use: {reasons or 'none is ready yet'}")

    def _failures(self) -> list[Failure]:
        """Return why servers cannot be used, as far as that is known."""
        return [peer.failure for peer in self.peers if peer.failure is not None]


def _surely_s(seconds: float, error: float) -> float:
    """Return the seconds that 99 of 100 calls exceed.

    Args:
        seconds: the median of what the calls take.
        error: the standard deviation of the logarithm of what they take.
    """
    return seconds * math.exp(-SURE * error)
