"""What runs a model between here and its servers: set-up, the choice before every inference, and its account."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchsurgeon.adapting import SURE, Decision, Estimates, Refusals, check_deadline
from torchsurgeon.codec import Codec, CodecTable
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.link import Link
from torchsurgeon.planning import Battery, Objective, Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime import telemetry
from torchsurgeon.runtime import work as works
from torchsurgeon.runtime.choice import Goal, Way
from torchsurgeon.runtime.counts import Counts
from torchsurgeon.runtime.handshake import Ours, autocast_mismatch
from torchsurgeon.runtime.here import Here
from torchsurgeon.runtime.inference import Inference, Moments
from torchsurgeon.runtime.keeper import Keeper
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.parts import Backend, Parts
from torchsurgeon.runtime.peer import Failure, Peer
from torchsurgeon.runtime.pending import Done, Pending
from torchsurgeon.runtime.pool import Pool
from torchsurgeon.runtime.setup import Setup
from torchsurgeon.runtime.stream import MOST_IN_FLIGHT, Stream
from torchsurgeon.runtime.warn import MismatchWarning, warn_caller
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.transport import HttpTransport, Transport

# A larger batch or image gives a larger answer; this only keeps a hostile server from filling the memory.
_LEAST_ANSWER_LIMIT_BYTES = 64 << 20
_ANSWER_FACTOR = 64
_KEPT_DECISIONS = 256
# A server is left for another that is a tenth cheaper.
_STAY = 0.9

Work = works.Work


class Engine:
    """Runs calls of one traced model. Thread-safe.

    ``always`` says that a call is answered here when no server does, ``fixed`` where to cut, None to choose each time.
    """

    def __init__(
        self,
        graph: LayerGraph,
        servers: Sequence[str | Transport],
        name: str,
        example: tuple[tuple[Any, ...], Mapping[str, Any]],
        *,
        always: bool,
        objective: Objective | Battery,
        codec: Codec | Lossless,
        answer_codec: Codec,
        codecs: CodecTable | None,
        backend: Backend | None,
        link: Link | None,
        device_profile: LayerProfile | None,
        server_profile: LayerProfile | None,
        timeout_s: float,
        on_replan: Callable[[Decision[Row]], object] | None,
    ) -> None:
        self.goal = Goal(objective)
        self.goal.check(device_profile, link)
        self.graph, self.name, self.always = graph, name, always
        self.link, self.codec, self.codecs, self.on_replan = link, codec, codecs, on_replan
        self.ours = Ours(graph)
        self.parts, self._compiles = Parts(graph, backend), backend is not None
        self.here = Here(self.parts, example, device_profile)
        limit = max(_LEAST_ANSWER_LIMIT_BYTES, _ANSWER_FACTOR * graph.points[-1].size_bytes)
        self.peers = [
            Peer(
                HttpTransport(server, timeout_s) if isinstance(server, str) else server,
                name,
                self.ours,
                link=link,
                profile=server_profile,
                output_codec=answer_codec,
                max_bytes=limit,
            )
            for server in servers
        ]
        made = zip(self.peers, servers, strict=True)
        self._made = [peer.transport for peer, server in made if isinstance(server, str)]
        self.decisions: deque[Decision[Row]] = deque(maxlen=_KEPT_DECISIONS)
        self.last: Inference | None = None
        self._whole = Way(graph.points[-1], whole=True)
        self._fixed: Way | None = None
        self._chosen: PartitionPoint | None = None
        self._preferred: Peer | None = None
        self._warned = self._closed = False
        self._closing = threading.Lock()
        self.setup = Setup(self)
        self._start()
        _open.add(self)

    def _start(self) -> None:
        self.pool = Pool("torchsurgeon-request")
        self.keeper = Keeper(self)
        self.counts = Counts()
        self._refusals = Refusals()
        self._stream: Stream | None = None

    # --- where to cut ---

    @property
    def adapts(self) -> bool:
        """Whether the cut is chosen at every inference."""
        return self._fixed is None

    @property
    def point(self) -> PartitionPoint | None:
        """Where the model is cut now; None before the first choice."""
        return self._chosen if self._fixed is None else self._fixed.point

    def fix(self, point: PartitionPoint | None) -> None:
        """Cut at ``point`` from now on, or choose each time."""
        with self.setup.again():
            if point is None:
                self._fixed = None
                for peer in self.peers:
                    if peer.plan is None:
                        peer.ready_in = -1
            else:
                self._fixed = Way(point, whole=point.index == len(self.graph.layers))

    @property
    def round_trip_s(self) -> float:
        """The round trip as it was given or measured; 0 where it was neither."""
        return 0.0 if self.link is None else self.link.round_trip_s

    def warn(self, failure: Failure | None) -> None:
        """Warn whoever called, once, that a server's model is another."""
        if failure is not None and failure.kind == "mismatch" and self.always and not self._warned:
            self._warned = True
            warn_caller(f"a server's answers are not used: {failure.text}", MismatchWarning)

    # --- one inference ---

    def run(self, work: Work, deadline_s: float | None = None) -> Any:
        """Return the result of one call."""
        return self.started(work, deadline_s, here=not self.always).result()

    def started(
        self, work: Work, deadline_s: float | None, *, streamed: bool = False, here: bool = False
    ) -> Pending | Done:
        """Run the head of one call and send its request; ``here`` waits for the answer in this thread."""
        begun_s = time.perf_counter()
        pending: Pending | Done | None = None
        try:
            pending = self.begin(work, deadline_s, streamed=streamed)
            pending.send(here=here)
            return pending
        except KeyboardInterrupt:
            if pending is not None:
                pending.cancel()
            raise
        except Exception as error:
            telemetry.record_error(self.name, time.perf_counter() - begun_s, error)
            raise

    def begin(self, work: Work, deadline_s: float | None = None, *, streamed: bool = False) -> Pending | Done:
        """Choose a cut and run the head; or the whole call, where nothing is to be asked.

        ``streamed`` chooses for the rate of a stream of calls, where a single one is wanted soon. Raises DeadlineError
        for a deadline that no way of running the call can keep.
        """
        fixed = self._fixed
        if fixed is not None and fixed.whole and deadline_s is None:
            if self._compiles:
                self.parts.compile(fixed.point, self.here.example)
            return Done(self.run_here(work, time.perf_counter(), None))
        if self._closed:
            raise ServerUnavailableError("the SplitModule has been closed")
        self.ours.check()
        mismatch = autocast_mismatch()
        if mismatch is not None:
            if not self.always:
                raise mismatch
            return Done(self.run_here(work, time.perf_counter(), Failure("autocast", str(mismatch))))
        if not self.always:
            self.renew()
        begun_s = time.perf_counter()
        if (fixed is None or not fixed.whole) and not self.setup.done:
            begun_s = self.setup.prepare_for(work, deadline_s)
        self.keeper.used()
        way, peer, decision, why = self._choose(work, streamed)
        if self._compiles and why is None:
            # In an emergency nobody waits for a compiler.
            compiling_s = time.perf_counter()
            self.parts.compile(way.point, self.here.example)
            begun_s += time.perf_counter() - compiling_s
        if deadline_s is not None and self.always:
            way = self._within(deadline_s, begun_s, work, way, peer, decision)
        if peer is None or way.whole:
            if why is not None:
                self.renew()
            return Done(self.run_here(work, begun_s, why, decision))
        head = work.head(way.point)
        decided_s = time.perf_counter()
        try:
            boundary = head()
        except TypeError as error:
            # The trace does not hold for this call, or the model itself refuses it.
            if not self.always:
                raise
            return Done(self.run_here(work, begun_s, Failure("unlike", str(error)), decision))
        headed_s = time.perf_counter()
        plan, row = peer.plan, way.row
        expected = None
        if decision is not None and plan is not None and row is not None:
            expected = functools.partial(plan.expected, row, decision.estimates)
        pending = Pending(
            self,
            work,
            way,
            peer,
            boundary,
            Moments(begun_s, decided_s, headed_s),
            expected=expected,
            decision=decision,
            deadline_s=None if deadline_s is None else begun_s + deadline_s,
        )
        if row is not None:
            self.here.took(headed_s - decided_s, row.head_s * pending.scale)
        return pending

    def _choose(self, work: Work, streamed: bool) -> tuple[Way, Peer | None, Decision[Row] | None, Failure | None]:
        """Where to cut, whom to ask, what that was decided on, and why it is not as it should be."""
        fixed = self._fixed
        if fixed is not None and fixed.whole:
            return fixed, None, None, None
        peer = self._peer(work)
        if peer is None:
            for other in self.peers:
                # It may have been found in the background.
                self.warn(other.failure)
            meant = self._chosen != self._whole.point or fixed is not None
            return self._whole, None, None, self._why_nobody() if meant else None
        if fixed is not None or peer.plan is None:
            return fixed or self._whole, peer, None, None
        plan = peer.stream_plan if streamed and peer.stream_plan is not None else peer.plan
        way, decision = plan.decide(
            Estimates(peer.state.link.estimate(), peer.state.load.estimate(), self.here.slowdown(), work.scale())
        )
        self._chosen = way.point
        self.decisions.append(decision)
        return way, peer, decision, None

    def _peer(self, work: Work) -> Peer | None:
        epoch = self.ours.epoch
        if len(self.peers) == 1:
            peer = self.peers[0]
            asked = peer.usable(epoch) if self.always else peer.ready_in == epoch
            return peer if asked else None
        usable = [peer for peer in self.peers if peer.usable(epoch)]
        if not usable and not self.always:
            usable = [peer for peer in self.peers if peer.ready_in == epoch]
        if len(usable) < 2 or not self.adapts:
            return usable[0] if usable else None
        slowdown, scale = self.here.slowdown(), work.scale()
        costs = [
            peer.plan.least_cost(Estimates(peer.state.link.estimate(), peer.state.load.estimate(), slowdown, scale))
            * (_STAY if peer is self._preferred else 1.0)
            if peer.plan is not None
            else math.inf
            for peer in usable
        ]
        self._preferred = usable[costs.index(min(costs))]
        return self._preferred

    def another(self, tried: Sequence[Peer]) -> Peer | None:
        """A server that may be asked beside those that have been."""
        epoch = self.ours.epoch
        return next((peer for peer in self.peers if peer not in tried and peer.usable(epoch)), None)

    def _why_nobody(self) -> Failure:
        known = next((peer.failure for peer in self.peers if peer.failure is not None), None)
        return Failure("nobody", "no server is ready" if known is None else f"no server to ask, after: {known}")

    def _within(
        self,
        deadline_s: float,
        begun_s: float,
        work: Work,
        way: Way,
        peer: Peer | None,
        decision: Decision[Row] | None,
    ) -> Way:
        """Return the way that was chosen if it should keep the deadline, or else the quickest."""
        scale = work.scale()
        head_s, tail_s = self.here.takes_s(way)
        best_s, quickest, taken_s, how = (head_s + tail_s) * scale, way, (head_s + tail_s) * scale, "on the device"
        here = self.here.slowdown().error
        surely_s = _surely_s(best_s, here)
        if decision is not None and peer is not None and peer.plan is not None:
            latencies = peer.plan.latencies(decision.estimates)
            rows = peer.plan.frontier.rows
            least = latencies.index(min(latencies))
            taken_s = latencies[next(i for i, row in enumerate(rows) if row is decision.row)]
            there = 0.0 if rows[least].on_device else peer.plan.expected(rows[least], decision.estimates).spread
            surely_s = min(surely_s, _surely_s(latencies[least], max(here, there)))
            if latencies[least] < best_s:
                quickest = peer.plan.ways[id(rows[least])]
                best_s, how = latencies[least], f"cut after {rows[least].name}"
        elif peer is not None and (taken := peer.takes(way.point.index)) is not None:
            taken_s = (head_s + taken.value) * scale
            surely_s = min(surely_s, _surely_s(taken_s, max(here, taken.spread)))
            if taken_s < best_s:
                best_s, how = taken_s, f"cut after {way.point.name}"
        if deadline_s >= surely_s:
            self._refusals.end()
        elif self._refusals.refuse(best_s):
            check_deadline(deadline_s, best_s, how)
        return way if taken_s <= deadline_s - (time.perf_counter() - begun_s) else quickest

    def run_here(self, work: Work, begun_s: float, why: Failure | None, decision: Decision[Row] | None = None) -> Any:
        """Return the result of a call that runs here as a whole; ``why`` says why it had to."""
        run = work.whole()
        decided_s = time.perf_counter()
        result = run()
        end_s = time.perf_counter()
        known_s = self.here.whole_s
        if known_s is not None:
            self.here.took(end_s - decided_s, known_s * work.scale())
        self.ended(
            self._whole,
            Inference(
                partition=self._whole.point,
                total_s=end_s - begun_s,
                decide_s=decided_s - begun_s,
                head_s=end_s - decided_s,
                degraded=None if why is None else str(why),
                decision=decision,
            ),
            why,
        )
        return result

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Take in that ``fn`` is applied to the model's tensors, as :meth:`torch.nn.Module.to` does."""
        with torch.no_grad():
            self.here.example = pytree.tree_map_only(Tensor, fn, self.here.example)
        self.here.forget()
        self.setup.ping_tensors = {}
        self.parts.clear()

    def renew(self) -> None:
        """Notice weights that have changed: hands are shaken again, and the parts are cut anew."""
        if self.ours.renew():
            self.parts.clear()
            self.setup.ping_tensors = {}

    def ended(self, way: Way, inference: Inference, why: Failure | None) -> None:
        """Keep the account of an inference."""
        self.last = inference
        self.counts.add(way.name, inference, None if why is None else why.kind)
        telemetry.record(self.name, inference)

    def stats(self) -> dict[str, Any]:
        """What happened so far and what is known now, as plain data."""
        return {
            **self.counts.told(),
            "slowdown": self.here.slowdown().value,
            "pings": self.keeper.pings,
            "servers": [peer.told(self.ours.epoch) for peer in self.peers],
        }

    # --- streams ---

    def stream(self) -> Stream:
        """Where single calls run beside each other; made when it is first asked for."""
        if self._stream is None:
            with self._closing:
                if self._stream is None and not self._closed:
                    self._stream = Stream(MOST_IN_FLIGHT)
        if self._closed or self._stream is None:
            raise ServerUnavailableError("the SplitModule has been closed")
        return self._stream

    # --- the end ---

    def close(self) -> None:
        """End all threads and connections. Closing twice, or from two threads at once, is harmless."""
        self.abandon()
        for peer in self.peers:
            peer.transport.close()

    def abandon(self) -> None:
        """End what was begun here, but leave the transports that were given to their owner."""
        with self._closing:
            # Only that: what ends below may call those who close again, in this thread and in others.
            self._closed = True
        if self._stream is not None:
            self._stream.close()
        for transport in self._made:
            transport.close()
        self.keeper.close()
        self.pool.close()

    def start_anew(self) -> None:
        """In a process that was forked off: leave threads, locks and connections to the parent, and begin again."""
        self._closing = threading.Lock()
        self.ours.start_anew()
        for peer in self.peers:
            peer.start_anew()
        self.here.start_anew()
        self.setup.start_anew()
        self._start()


def _surely_s(seconds: float, error: float) -> float:
    """What will be exceeded 99 times in 100."""
    return seconds * math.exp(-SURE * error)


_open: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_open):
        engine.start_anew()


os.register_at_fork(after_in_child=_after_fork)
