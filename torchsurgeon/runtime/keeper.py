"""A background thread that keeps knowledge of servers fresh: trials of dead ones, pings and probes of the others."""

from __future__ import annotations

import functools
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable

from torchsurgeon._interrupts import NoThreadError, join_threads, start_thread
from torchsurgeon.adapting import Estimates
from torchsurgeon.codec import find_codec
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.models.threads import ThreadSettings
from torchsurgeon.planning import Row
from torchsurgeon.runtime.connector import Connector
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.handshake import LocalModel
from torchsurgeon.runtime.peer import Peer
from torchsurgeon.runtime.pool import Pool, Task
from torchsurgeon.runtime.servers import Servers
from torchsurgeon.transport import Answer
from torchsurgeon.transport.deadline import Deadline

_logger = logging.getLogger(__name__)

# A breaker's first pause is 50 to 100 ms.
_TRIAL_TICK_S, _TICK_S = 0.05, 0.25
# A module that nobody calls leaves its servers alone.
_IDLE_S = 10.0
# A server that answered a moment ago needs no ping.
_QUIET_S = 1.0
_JOIN_S = 1.0
# A thread that the system refused is asked for again after this time.
_RETRY_S = 1.0
# The longest a ping or a probe may take. It may be the link that has become so slow, and only a transfer that ends can
# tell; other trials begin meanwhile, so that a server that returns is not missed.
_ERRAND_S = 2.0
_MOST_ERRANDS = 4


class Errand:
    """Something sent to a server in the background, by one thread of the pool.

    Attributes:
        trial: whether it finds out if a server that failed answers again.
        begun_s: when it began (``time.monotonic``).
    """

    def __init__(self, peer: Peer, *, trial: bool) -> None:
        self.peer, self.trial = peer, trial
        self.begun_s = time.monotonic()
        self._reported = False
        self.task: Task[None] | None = None
        self._cancelled = False
        self._deadline: Deadline | None = None

    @property
    def under_way(self) -> bool:
        """Whether it has not ended."""
        return self.task is not None and not self.task.ended

    def deadline(self, timeout_s: float = _ERRAND_S) -> Deadline:
        """Return the deadline of the exchange that begins now."""
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
        """Record the failure with the server's breaker, once for each errand."""
        if not self._reported:
            self._reported = True
            self.peer.failed(failure)


class Bell:
    """What the keeper's thread waits for. It belongs to the thread, which refers to nothing else while it waits.

    Its queue is not built from Python's locks, which a signal handler that raises could leave locked.
    """

    def __init__(self) -> None:
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Begin without a thread; the parent's does not exist in a forked child."""
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.closed = False

    def ring(self) -> None:
        """Wake the thread."""
        self._rings.put(None)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until it rings, at most ``timeout_s``."""
        try:
            self._rings.get(timeout=timeout_s)
            while True:
                self._rings.get_nowait()
        except queue.Empty:
            pass

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        self.closed = True
        self.ring()
        join_threads(self.threads, _JOIN_S)


class Keeper:
    """The background thread. It begins with ``start()``, ends when ``bell`` is closed, and sends through ``pool``.

    Between two looks at the servers, the thread does not keep the keeper alive, nor what that refers to: the program
    may drop the module, and with it the objects that the program's own functions belong to.

    Attributes:
        pings: how many pings have been answered.
    """

    def __init__(self, local: LocalModel, servers: Servers, connector: Connector, pool: Pool, bell: Bell) -> None:
        self._local, self._servers, self._connector, self._pool = local, servers, connector, pool
        self._bell = bell
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child."""
        self._starting = threading.Lock()
        self._wanted = False
        self._refused_s = -math.inf
        self._errands: list[Errand] = []
        self._used_s = -math.inf
        self._sleeps = False
        self.pings = 0

    def start(self) -> None:
        """Start the thread, unless it runs already. Where none can be started, ``used()`` tries again later."""
        self._wanted = True
        with self._starting:
            if self._bell.threads or self._bell.closed or 0 <= time.monotonic() - self._refused_s < _RETRY_S:
                return
            run = functools.partial(_keep, weakref.ref(self), self._bell, ThreadSettings.here())
            try:
                start_thread(run, "torchsurgeon-keeper", self._bell.threads)
            except NoThreadError:
                self._refused_s = time.monotonic()

    def used(self) -> None:
        """Note that the module was called just now, so that servers are worth attending to."""
        self._used_s = time.monotonic()
        if self._sleeps:
            self._bell.ring()
        if self._wanted and not self._bell.threads:
            self.start()
        self._local.used()

    def wake(self) -> None:
        """Have the thread look at the servers now."""
        self._bell.ring()

    def connect(self, peer: Peer, timeout_s: float) -> Task[None] | None:
        """Begin to make a server ready, and return the task that does it; None if no thread could be started for it."""
        try:
            return self._send(Errand(peer, trial=False), lambda _: self._connector.connect(peer, timeout_s))
        except NoThreadError as error:
            peer.failed(Failure.of(error))
            return None

    def attempt(self, peer: Peer, timeout_s: float | None) -> Task[None]:
        """Begin to make a server ready, and return the task, whose ``error`` says why it failed."""
        return self._pool.submit(functools.partial(self._connector.connect, peer, timeout_s))

    def look(self) -> float | None:
        """Attend to the servers, and return the seconds until the next look; None if only the bell calls for it."""
        self._errands = [errand for errand in self._errands if errand.under_way]
        for peer in self._servers.peers:
            if not self._bell.closed:
                self._attend(peer, [errand for errand in self._errands if errand.peer is peer])
        # First, so that a call which comes meanwhile rings the bell.
        self._sleeps = True
        in_use = 0 <= time.monotonic() - self._used_s < _IDLE_S
        self._sleeps = not in_use
        troubled = any(not peer.usable(self._local.epoch) for peer in self._servers.peers)
        return (_TRIAL_TICK_S if troubled else _TICK_S) if in_use else None

    def _attend(self, peer: Peer, errands: list[Errand]) -> None:
        breaker, ready = peer.state.breaker, peer.ready_in == self._local.epoch
        for errand in errands:
            if errand.trial and time.monotonic() - errand.begun_s > breaker.trial_s:
                # The errand goes on, and may still find the server at the end of a slow link.
                errand.failed(peer.failure or Failure("unavailable", f"{peer.label} does not answer"))
        allows, least_bytes = peer.allowance.allows, peer.state.probes.least_bytes
        pings_bytes = 2 * sum(tensor.nbytes for tensor in self._connector.ping_tensors.values())
        if breaker.state != "closed" or not ready:
            unfit = any(not errand.trial for errand in errands) or len(errands) >= _MOST_ERRANDS
            if not unfit and (breaker.state != "closed" or not errands) and allows(pings_bytes) and breaker.allow():
                self._send(Errand(peer, trial=True), self._try)
        # Where less may be sent, it is left for calls.
        elif not errands and self._servers.chooses and allows(max(least_bytes, pings_bytes)):
            if peer.doubted:
                self._send(Errand(peer, trial=True), self._try)
                return
            # By turns, since where the thread looks seldom, a ping is due at each of its looks.
            turns = (self._transfer_due, self._ping_due) if peer.pinged else (self._ping_due, self._transfer_due)
            what = turns[0](peer) or turns[1](peer)
            if what is not None:
                peer.pinged = what == self._ping
                self._send(Errand(peer, trial=False), what)

    def _ping_due(self, peer: Peer) -> Callable[[Errand], None] | None:
        """Return what pings a server, if that is due now."""
        quiet = not 0 <= time.monotonic() - peer.asked_s <= _QUIET_S
        return self._ping if quiet and peer.state.load.ping_due() else None

    def _transfer_due(self, peer: Peer) -> Callable[[Errand], None] | None:
        """Return what measures how fast a server computes, or its link, if one of them is due now."""
        # Before probes, which are due as often as they may be while nothing else is sent.
        if (row := self._untried(peer)) is not None:
            return functools.partial(self._measure, row)
        # Transfers at a cut that sends little say nothing about the link's rate, however many there are.
        rate, probes = peer.state.link.estimate().uplink, peer.state.probes
        if (size := probes.due_bytes(rate.age_s, rate.value)) is not None:
            return functools.partial(self._probe, size if peer.allowance.allows(size) else probes.least_bytes)
        return None

    def _send(self, errand: Errand, what: Callable[[Errand], None]) -> Task[None]:
        def run() -> None:
            try:
                what(errand)
            except Exception as error:
                errand.failed(Failure.of(error))

        errand.task = self._pool.submit(run, errand.cancel)
        self._errands.append(errand)
        return errand.task

    def _try(self, errand: Errand) -> None:
        """Find out whether the server answers, and if it was late before, whether that was the link."""
        peer = errand.peer
        if peer.ready_in != self._local.epoch or not self._connector.ping_tensors:
            # Without a ping to send, the handshake tells that the server answers.
            self._connector.connect(peer, _ERRAND_S)
        # The first exchange may have waited for the server to come back, which says nothing about the link.
        self._ask(errand)
        self._ping(errand)
        if peer.doubted:
            # A changed rate is believed once two transfers have shown it.
            for _ in range(2):
                if peer.allowance.allows(peer.state.probes.least_bytes):
                    self._probe(peer.state.probes.least_bytes, errand)
            peer.doubted = False
        peer.answered()

    def _ping(self, errand: Errand) -> None:
        """Send a ping, and update the estimates of link and load from it."""
        answer, peer = self._ask(errand), errand.peer
        if answer is None:
            return
        predicted_s = peer.plan.tail_s[self._connector.ping_index] if peer.plan is not None else 0.0
        peer.observe(answer, predicted_s, ping=True)
        self.pings += 1

    def _untried(self, peer: Peer) -> Row | None:
        """Return a row to find out with how fast a server computes that has not been asked for long.

        Its profile may have been measured while its machine was disturbed. Its pings' tails may be too short to tell,
        or be predicted better than those of calls. Then nothing else would ever show that it is worth asking.
        """
        plan, state = peer.plan, peer.state
        if plan is None or self._servers.point != self._servers.whole.point:
            return None
        row = plan.worth_a_trial(Estimates(state.link.estimate(), state.load.estimate(), self._servers.slowdown()))
        if row is None or not peer.allowance.allows(row.size_bytes):
            return None
        return row if state.probes.due(math.inf) and peer.trials.due() else None

    def _measure(self, row: Row, errand: Errand) -> None:
        """Have a server run the tail of a row for the example, to see how long that takes it."""
        peer, tensors = errand.peer, self._connector.boundary(row.point(self._local.graph))
        codecs = dict.fromkeys(tensors, find_codec(row.codec))
        begin_s = time.monotonic()
        try:
            backend = peer.profiles.to_name(row.server_backend)
            answer = peer.ask(tensors, codecs, errand.deadline(), backend=backend)
            peer.observe(answer, row.tail_s)
        finally:
            size_bytes = round(row.size_bytes)
            peer.state.probes.spent(size_bytes, min(max(time.monotonic() - begin_s, 0.0), _ERRAND_S))

    def _ask(self, errand: Errand) -> Answer | None:
        """Send the smallest inference there is; it waits in the server's queue like every other."""
        tensors = self._connector.ping_tensors
        if not tensors:
            return None
        peer = errand.peer
        # Its tail is predicted by the first of the usable backends, so that is the one to ask for.
        backend = peer.profiles.to_name(next((profile.backend for profile in peer.profiles.usable), None))
        return peer.ask(tensors, dict.fromkeys(tensors, find_codec("raw")), errand.deadline(), backend=backend)

    def _probe(self, size: int, errand: Errand) -> None:
        """Send ``size`` bytes that nobody needs, to measure the link's rate."""
        peer, begin_s = errand.peer, time.monotonic()
        try:
            timing = peer.transport.probe(size, 0, deadline=errand.deadline())
        except ServerUnavailableError:
            if time.monotonic() - begin_s < _ERRAND_S:
                raise
            # The server answered a ping just before, so it is the link: it is at most as fast as this.
            peer.state.link.observe(up_bytes=size, up_s=None, down_bytes=0, down_s=0.0, total_s=_ERRAND_S)
            return
        finally:
            # Bounded, or a clock that jumped meanwhile would forbid probes for hours.
            peer.state.probes.spent(size, min(max(time.monotonic() - begin_s, 0.0), _ERRAND_S))
            peer.allowance.spent(size)
        peer.state.link.observe(
            up_bytes=timing.sent_bytes,
            up_s=None,
            down_bytes=timing.received_bytes,
            down_s=timing.end_s - timing.first_byte_s,
            total_s=min(timing.end_s - timing.send_start_s, _ERRAND_S),
        )


def _keep(keeper_of: weakref.ref[Keeper], bell: Bell, settings: ThreadSettings) -> None:
    settings.adopt()
    wait_s: float | None = _TRIAL_TICK_S
    while True:
        bell.wait(wait_s)
        keeper = keeper_of()
        if keeper is None or bell.closed:
            return
        try:
            wait_s = keeper.look()
        except NoThreadError:
            wait_s = _RETRY_S
        except ServerUnavailableError:
            # The pool has been closed.
            return
        except Exception:
            # Without this thread no server that has failed would ever be asked again.
            _logger.exception("looking after the servers failed; it is tried again")
            wait_s = _RETRY_S
        # Or this thread would keep the keeper alive while it waits.
        del keeper
