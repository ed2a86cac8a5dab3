"""A thread that keeps servers known while they are not asked: trials of dead ones, pings and probes of the others."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchsurgeon.codec import find_codec
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.runtime.peer import Failure, Peer
from torchsurgeon.runtime.pool import Call
from torchsurgeon.transport import Answer
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
# What a ping or a probe may take. The link may have become that slow, which only a transfer that ends can tell; later
# trials begin meanwhile, so that a server which returns is not missed for it.
_ERRAND_S = 2.0
_MOST_ERRANDS = 4


class Errand:
    """Something sent to a server in the background, by one thread of the pool."""

    def __init__(self, peer: Peer, *, trial: bool) -> None:
        self.peer, self.trial = peer, trial
        self.begun_s = time.monotonic()
        self.told = False
        self.call: Call[None] | None = None
        self._cancelled = False
        self._deadline: Deadline | None = None

    @property
    def under_way(self) -> bool:
        """Whether it has not ended."""
        return self.call is not None and not self.call.ended

    def deadline(self, timeout_s: float = _ERRAND_S) -> Deadline:
        """When the exchange that begins now has to be over."""
        self._deadline = Deadline(timeout_s)
        if self._cancelled:
            self._deadline.cancel()
        return self._deadline

    def cancel(self) -> None:
        """End it now."""
        self._cancelled = True
        if self._deadline is not None:
            self._deadline.cancel()

    def failed(self, failure: Failure) -> None:
        """Tell the breaker, once, that nothing good came of it."""
        if not self.told:
            self.told = True
            self.peer.failed(failure)


class Keeper:
    """Begins with :meth:`start`, and ends with :meth:`close`. Everything it sends goes through the engine's pool."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._event = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._errands: list[Errand] = []
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

    def connect(self, peer: Peer, timeout_s: float) -> Call[None]:
        """Begin to make a server ready, now."""
        return self._send(Errand(peer, trial=False), lambda _: self._engine.setup.connect(peer, timeout_s))

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
            self._errands = [errand for errand in self._errands if errand.under_way]
            try:
                for peer in self._engine.peers:
                    if not self._closed:
                        self._attend(peer, [errand for errand in self._errands if errand.peer is peer])
            except ServerUnavailableError:
                # The pool has been closed.
                return

    def _attend(self, peer: Peer, errands: list[Errand]) -> None:
        breaker, ready = peer.state.breaker, peer.ready_in == self._engine.ours.epoch
        for errand in errands:
            if errand.trial and time.monotonic() - errand.begun_s > breaker.trial_s:
                # It goes on, and may still find the server at the end of a slow link.
                errand.failed(peer.failure or Failure("unavailable", f"{peer.label} does not answer"))
        if breaker.state != "closed" or not ready:
            unfit = any(not errand.trial for errand in errands) or len(errands) >= _MOST_ERRANDS
            if not unfit and (breaker.state != "closed" or not errands) and breaker.allow():
                self._send(Errand(peer, trial=True), self._try)
        elif not errands and self._engine.adapts:
            quiet = not 0 <= time.monotonic() - peer.asked_s <= _QUIET_S
            rate = peer.state.link.estimate().uplink
            if peer.doubted:
                self._send(Errand(peer, trial=True), self._try)
            elif quiet and peer.state.load.ping_due():
                self._send(Errand(peer, trial=False), self._ping)
            # A cut that sends little says nothing of the rate, however often it is taken.
            elif (size := peer.state.probes.due_bytes(rate.age_s, rate.value)) is not None:
                self._send(Errand(peer, trial=False), functools.partial(self._probe, size))

    def _send(self, errand: Errand, task: Callable[[Errand], None]) -> Call[None]:
        def run() -> None:
            try:
                task(errand)
            except Exception as error:
                errand.failed(Failure.of(error))

        errand.call = self._engine.pool.submit(run, errand.cancel)
        self._errands.append(errand)
        return errand.call

    def _try(self, errand: Errand) -> None:
        """Find out whether the server answers, and if it was late before, whether that was the link."""
        peer = errand.peer
        if peer.ready_in != self._engine.ours.epoch:
            self._engine.setup.connect(peer, _ERRAND_S)
        # The first may have waited for the server to come back, which says nothing about the link.
        self._ask(errand)
        self._ping(errand)
        if peer.doubted:
            # A rate that has changed is believed when it is seen twice.
            for _ in range(2):
                self._probe(peer.state.probes.least_bytes, errand)
            peer.doubted = False
        peer.answered()

    def _ping(self, errand: Errand) -> None:
        """Learn link and load."""
        answer, peer = self._ask(errand), errand.peer
        if answer is None:
            return
        peer.observe(answer, peer.plan.tail_s[self._engine.setup.ping_index] if peer.plan is not None else 0.0)
        self.pings += 1

    def _ask(self, errand: Errand) -> Answer | None:
        """The least inference there is: it goes through the server's queue as every other."""
        tensors = self._engine.setup.ping_tensors
        if not tensors:
            return None
        return errand.peer.ask(tensors, dict.fromkeys(tensors, find_codec("raw")), errand.deadline())

    def _probe(self, size: int, errand: Errand) -> None:
        """Send bytes for no other reason than to see how fast they go."""
        peer, begin_s = errand.peer, time.monotonic()
        try:
            timing = peer.transport.probe(size, 0, deadline=errand.deadline())
        except ServerUnavailableError:
            taken_s = time.monotonic() - begin_s
            if taken_s < _ERRAND_S:
                raise
            # It answered a ping: the link is at most as fast as this.
            peer.state.link.observe(up_bytes=size, up_s=None, down_bytes=0, down_s=0.0, total_s=_ERRAND_S)
            return
        finally:
            # A clock that jumped meanwhile would forbid probes for hours.
            peer.state.probes.spent(size, min(max(time.monotonic() - begin_s, 0.0), _ERRAND_S))
        peer.state.link.observe(
            up_bytes=timing.sent_bytes,
            up_s=None,
            down_bytes=timing.received_bytes,
            down_s=timing.end_s - timing.first_byte_s,
            total_s=min(timing.end_s - timing.send_start_s, _ERRAND_S),
        )
