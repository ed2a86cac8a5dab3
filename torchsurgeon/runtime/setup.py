"""What comes before servers can be asked: hands are shaken, and what a choice rests on is measured."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from torchsurgeon.adapting import SURE
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.planning import Frontier, Objective
from torchsurgeon.profiling import LayerProfile, profile
from torchsurgeon.runtime.choice import Adaptive, Goal
from torchsurgeon.runtime.peer import Failure, Peer
from torchsurgeon.runtime.warn import UnknownEnergyWarning, warn_caller
from torchsurgeon.runtime.work import Work
from torchsurgeon.transport.link_probe import measure_link

if TYPE_CHECKING:
    from torchsurgeon.runtime.engine import Engine

# What the first call waits for servers to be made ready, which takes a profile and a link to be measured, and what a
# later one without a deadline waits for those that were well. Who is not ready by then becomes so in the background.
_SETUP_S = 5.0
_THROUGHPUT = Goal(Objective(throughput=1.0))


class Setup:
    """Set-up of an engine, once for every state of its model's weights and every way of choosing the cut. Thread-safe.

    ``ping_tensors`` are those of the least inference there is, after the layer ``ping_index``.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.ping_tensors: dict[str, Tensor] = {}
        self.ping_index = 0
        self.start_anew()

    def start_anew(self) -> None:
        """Forget locks, and hands that a fork's parent has shaken."""
        self._setting_up, self._measuring = threading.Lock(), threading.Lock()
        self._done_in, self._waited = -1, False

    @property
    def done(self) -> bool:
        """Whether nothing is left to do before a call."""
        engine, epoch = self._engine, self._engine.ours.epoch
        return self._done_in == epoch and (engine.always or any(peer.ready_in == epoch for peer in engine.peers))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Change what set-up rests on while none is under way; it is done anew."""
        with self._setting_up:
            yield
            self._done_in = -1

    def prepare(self, wait_s: float | None = None) -> None:
        """Do what the first call would do before its inference. Raises ServerError only where nothing falls back.

        With ``wait_s`` servers are waited for no longer than that, and not at all where they failed before.
        """
        engine = self._engine
        if self.done:
            return
        if not self._setting_up.acquire(timeout=-1 if wait_s is None or not engine.always else wait_s):
            return
        try:
            if self._done_in != engine.ours.epoch or not engine.always:
                self._prepare(wait_s)
                self._done_in, self._waited = engine.ours.epoch, True
        finally:
            self._setting_up.release()

    def prepare_for(self, work: Work, deadline_s: float | None) -> float:
        """Prepare for a call, and return when it began: the first one only after what has to be measured once."""
        begun_s = time.perf_counter()
        if not self._waited:
            self.prepare()
            return time.perf_counter()
        measures = self._engine.adapts and self._engine.here.profile is None
        self.prepare(self._spare_s(work, deadline_s))
        return time.perf_counter() if measures else begun_s

    def _spare_s(self, work: Work, deadline_s: float | None) -> float | None:
        """For how long a call may wait for servers, and still be in time here."""
        if not self._engine.always:
            return deadline_s
        if deadline_s is None:
            return _SETUP_S
        here = self._engine.here
        slowdown = here.slowdown()
        whole_s = (here.whole_s or math.inf) * work.scale() * slowdown.value * math.exp(SURE * slowdown.spread)
        spare_s = deadline_s - whole_s
        return min(spare_s if spare_s > 0 else deadline_s / 2, _SETUP_S)

    def _prepare(self, wait_s: float | None) -> None:
        engine = self._engine
        if not engine.peers:
            raise ServerUnavailableError('no server was given: SplitModule(…, server="http://host:port")')
        if engine.adapts:
            text = engine.goal.settle(self.profile_device(), engine.link, yields=engine.always)
            if text is not None:
                warn_caller(text, UnknownEnergyWarning)
        if (engine.always or len(engine.peers) > 1) and not self.ping_tensors:
            self._prepare_ping()
        if engine.always:
            peers = [peer for peer in self._unready() if wait_s is None or _answers(peer)]
            end_s = time.monotonic() + (_SETUP_S if wait_s is None else wait_s)
            calls = [engine.keeper.connect(peer, min(_SETUP_S, peer.transport.timeout_s)) for peer in peers]
            for peer, call in zip(peers, calls, strict=True):
                if not call.wait(end_s - time.monotonic()):
                    peer.failure = Failure("unready", f"{peer.label} has not told all that asking it takes")
                engine.warn(peer.failure)
        else:
            self._connect_any(wait_s)
        if self.ping_tensors:
            engine.keeper.start()
            engine.keeper.wake()

    def _unready(self) -> list[Peer]:
        return [peer for peer in self._engine.peers if peer.ready_in != self._engine.ours.epoch]

    def _connect_any(self, timeout_s: float | None) -> None:
        failures: list[Exception] = []
        for peer in self._unready():
            try:
                self.connect(peer, timeout_s)
            except Exception as error:
                peer.failed(Failure.of(error))
                failures.append(error)
        if len(failures) == len(self._engine.peers):
            raise failures[0]

    def connect(self, peer: Peer, timeout_s: float | None = None) -> None:
        """Make a server ready to be asked. Raises ServerError or ProtocolError saying why it is not."""
        engine = self._engine
        epoch = peer.shake(timeout_s)
        if engine.adapts and peer.plan is None:
            frontier = self.frontier(peer)
            assert peer.profile is not None
            plan = Adaptive(
                engine.graph,
                frontier,
                peer.profile,
                engine.goal,
                own_codec=engine.codecs is not None,
                on_change=engine.on_replan,
            )
            # Who wants joules saved wants that of streams too.
            peer.stream_plan = plan.toward(_THROUGHPUT) if engine.goal.wanted == Objective(latency=1.0) else plan
            peer.plan = plan
        peer.answered()
        peer.ready_in = epoch

    def frontier(self, peer: Peer) -> Frontier:
        """Measure what is not known yet, and return the rows to choose from with this server."""
        engine = self._engine
        with self._measuring:
            told = peer.profile
            if told is None:
                told = LayerProfile.from_json(peer.transport.get_json(f"/v2/models/{engine.name}/profile"))
            here = self.profile_device()
            if peer.link is None:
                peer.adopt(measure_link(peer.transport))
            if engine.link is None:
                engine.link = peer.link
            frontier = Frontier.build(engine.graph, here, told, engine.codecs)
            # Only now: a profile of another model would be in the way of every later try.
            peer.profile = told
            return frontier

    def profile_device(self) -> LayerProfile:
        """Measure the layers here, unless they are known."""
        here, graph = self._engine.here, self._engine.graph
        if here.profile is None:
            meter = "auto" if self._engine.goal.needs_joules else None
            here.profile = profile(graph, inputs=graph.tensors_of_call(*here.example), meter=meter)
        return here.profile

    def _prepare_ping(self) -> None:
        """Choose the point in the second half of the model that sends least: light on the link and on the server."""
        graph = self._engine.graph
        late = [point for point in graph.points[:-1] if 2 * point.index >= len(graph.layers)]
        point = min(late or graph.points[:1], key=lambda point: point.size_bytes)
        # As it is, not as a backend would run it.
        head, (args, kwargs) = cut(graph, point).head, self._engine.here.example
        self.ping_index = point.index
        self.ping_tensors = dict(zip((spec.name for spec in point.tensors), head(*args, **kwargs), strict=True))


def _answers(peer: Peer) -> bool:
    """Whether a server answered when it was last asked, with another model perhaps; trials find when others do."""
    return peer.failure is None or peer.failure.kind == "mismatch"
