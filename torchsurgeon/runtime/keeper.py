"""A thread that keeps servers known while they are not asked: trials of dead ones, pings and probes of the others."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from torchsurgeon.codec import find_codec
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.runtime.peer import Failure, Peer
from torchsurgeon.runtime.pool import Call
from torchsurgeon.transport.base import Deadline

if TYPE_CHECKING:
    from torchsurgeon.runtime.engine import Engine

# A breaker's first pause is 50 to 100 ms.
_TRIAL_TICK_S, _TICK_S = 0.05, 0.25
# A module that nobody calls leaves its servers alone.
_IDLE_S = 10.0
# A server that answered a moment ago needs no ping.
_QUIET_S = 1.0
_JOIN_S = 1.0
# A trial may take so many times what the link as last known needs for it; its connection has to be opened first.
_TRIAL_FACTOR = 3.0


class Keeper:
    """Begins at the first :meth:`start`, and ends with :meth:`close`. Everything it sends goes through the pool."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._event = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._under_way: dict[int, Call[None]] = {}
        self._used_s = -math.inf
        self._sleeps = False
        self.pings = 0

    def start(self) -> None:
        """Have the thread run."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="torchsurgeon-keeper", daemon=True)
            self._thread.start()

    def used(self) -> None:
        """The module was called."""
        self._used_s = time.monotonic()
        if self._sleeps:
            self._event.set()

    def wake(self) -> None:
        """There is something to do."""
        self._event.set()

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        self._closed = True
        self._event.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._closed:
            in_use = 0 <= time.monotonic() - self._used_s < _IDLE_S
            self._sleeps = not in_use
            troubled = any(not peer.usable(self._engine.ours.epoch) for peer in self._engine.peers)
            self._event.wait((_TRIAL_TICK_S if troubled else _TICK_S) if in_use else None)
            self._event.clear()
            for peer in self._engine.peers:
                if not self._closed:
                    self._attend(peer)

    def _attend(self, peer: Peer) -> None:
        call = self._under_way.get(id(peer))
        if call is not None and not call.ended:
            return
        breaker = peer.state.breaker
        if breaker.state != "closed" or peer.ready_in != self._engine.ours.epoch:
            if breaker.allow():
                self._begin(peer, self._trial)
        elif time.monotonic() - peer.asked_s > _QUIET_S and self._engine.adapts:
            rate = peer.state.link.estimate().uplink
            if peer.state.load.ping_due():
                self._begin(peer, self._ping)
            elif (size := peer.state.probes.due_bytes(rate.age_s, rate.value)) is not None:
                self._begin(peer, lambda peer, deadline: self._probe(peer, size, deadline))

    def connect(self, peer: Peer, timeout_s: float) -> Call[None]:
        """Begin to make a server ready, now."""
        return self._submit(peer, lambda peer, _: self._engine.connect(peer, timeout_s), Deadline(timeout_s))

    def _begin(self, peer: Peer, task: Callable[[Peer, Deadline], None]) -> None:
        link = peer.state.link.link()
        size = max(peer.state.probes.least_bytes, self._engine.ping_bytes)
        limit_s = max(peer.state.breaker.trial_s, _TRIAL_FACTOR * link.request_s(size, size, fresh=True))
        try:
            self._submit(peer, task, Deadline(limit_s))
        except ServerUnavailableError:
            self._closed = True

    def _submit(self, peer: Peer, task: Callable[[Peer, Deadline], None], deadline: Deadline) -> Call[None]:
        def run() -> None:
            try:
                task(peer, deadline)
            except Exception as error:
                peer.failed(Failure.of(error))

        call = self._under_way[id(peer)] = self._engine.pool.submit(run, deadline.cancel)
        return call

    def _trial(self, peer: Peer, deadline: Deadline) -> None:
        late = peer.failure is not None and peer.failure.kind in ("late", "deadline")
        if peer.ready_in != self._engine.ours.epoch:
            self._engine.connect(peer, deadline.left_s())
        if late:
            # Perhaps it is the link: two transfers show a rate that has changed.
            for _ in range(2):
                self._probe(peer, peer.state.probes.least_bytes, deadline)
        self._ping(peer, deadline)
        peer.answered()

    def _ping(self, peer: Peer, deadline: Deadline) -> None:
        """The least inference there is: it goes through the server's queue as every other."""
        tensors: Mapping[str, Tensor] = self._engine.ping_tensors
        if not tensors:
            return
        answer = peer.ask(tensors, dict.fromkeys(tensors, find_codec("raw")), deadline)
        index = self._engine.ping_index
        peer.observe(answer, peer.plan.tail_s[index] if peer.plan is not None else 0.0)
        self.pings += 1

    def _probe(self, peer: Peer, size: int, deadline: Deadline) -> None:
        begin_s = time.monotonic()
        try:
            timing = peer.transport.probe(size, 0, deadline=deadline)
        finally:
            peer.state.probes.spent(size, time.monotonic() - begin_s)
        peer.state.link.observe(
            up_bytes=timing.sent_bytes,
            up_s=None,
            down_bytes=timing.received_bytes,
            down_s=timing.end_s - timing.first_byte_s,
            total_s=timing.end_s - timing.send_start_s,
        )
