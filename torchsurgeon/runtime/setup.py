"""What has to be done before servers can be asked, and how long a call waits for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

import torch

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.adapting import SURE
from torchsurgeon.errors import ServerUnavailableError, UnknownEnergyWarning, short, warn_caller
from torchsurgeon.planning.sides import with_joules
from torchsurgeon.runtime.connector import Connector
from torchsurgeon.runtime.device import DeviceTimes
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.handshake import LocalModel
from torchsurgeon.runtime.keeper import Keeper
from torchsurgeon.runtime.options import Options
from torchsurgeon.runtime.peer import Peer
from torchsurgeon.runtime.servers import Servers
from torchsurgeon.runtime.work import Work

# How long the first call waits for servers to be made ready, which includes measuring a profile and the link, and how
# long a later call without a deadline waits for servers that were well. Others become ready in the background.
_SETUP_S = 5.0
# What is asked while a server is made ready ends by itself after the time given to it, but for this.
_GRACE_S = 0.1


class Setup:
    """Prepares the servers, once for each state of the weights and each way of choosing the cut. Thread-safe."""

    def __init__(
        self,
        options: Options,
        local: LocalModel,
        times: DeviceTimes,
        servers: Servers,
        connector: Connector,
        keeper: Keeper,
    ) -> None:
        self._options, self._local, self._times = options, local, times
        self._servers, self._connector, self._keeper = servers, connector, keeper
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may hold, and prepare again: connections are the parent's."""
        # Reentrant, because such a lock is only released by the thread that holds it: see _leave().
        self._setting_up = threading.RLock()
        self._done_in, self._waited = -1, False

    def inherit(self, earlier: Setup) -> None:
        """Take over from an earlier trace whether a call has waited for servers already; a later one waits less."""
        self._waited = earlier._waited

    @property
    def done(self) -> bool:
        """Whether nothing is left to do before a call."""
        epoch = self._local.epoch
        if self._done_in != epoch:
            return False
        return self._options.falls_back or bool([peer for peer in self._servers.peers if peer.ready_in == epoch])

    def again(self, change: Callable[[], object]) -> None:
        """Call ``change`` while nobody prepares; afterwards it is done again, since preparing rests on what changes."""
        with self._setting_up:
            change()
            self._done_in = -1

    def prepare(self, wait_s: float | None = None, *, again: bool = False) -> None:
        """Do what the first call would do before its inference.

        Args:
            wait_s: wait no longer for servers, and not at all for those that failed before; by default the first
                call's time.
            again: whether to shake hands again with all servers, which then read all their weights.

        Raises:
            ServerError: no server could be made ready, and the module does not fall back to the device.
        """
        if self.done:
            peers = [*self._servers.peers] if again else []
            for peer in peers:
                peer.ready_in = -1
            if self._options.falls_back:
                self._connect_all(peers, None)
        if self.done:
            return
        try:
            if not self._setting_up.acquire(timeout=-1 if wait_s is None or not self._options.falls_back else wait_s):
                return
            if self._done_in != self._local.epoch or not self._options.falls_back:
                # The example is run as it was traced, whatever mode the caller is in.
                with torch.inference_mode(False), torch.no_grad():
                    self._prepare(wait_s)
                self._done_in, self._waited = self._local.epoch, True
        finally:
            self._leave()

    def _leave(self) -> None:
        """Release the lock if this thread holds it: a signal handler may have raised before that, or just after."""
        try:
            self._setting_up.release()
        except RuntimeError as error:
            if by_signal_handler(error):
                raise

    def prepare_for(self, work: Work, deadline_s: float | None) -> float:
        """Prepare for a call, and return from when its time counts (``time.perf_counter``).

        The first call's time counts from the end of measurements that are made once.
        """
        begun_s = time.perf_counter()
        if not self._waited:
            # Without a fallback, nothing answers a call whose deadline passes while servers are made ready.
            self.prepare(None if self._options.falls_back else deadline_s)
            return time.perf_counter()
        measures = self._servers.chooses and self._times.profile is None
        self.prepare(self._spare_s(work, deadline_s))
        return time.perf_counter() if measures else begun_s

    def _spare_s(self, work: Work, deadline_s: float | None) -> float | None:
        """Return how long a call may wait for servers, and still be answered by the device in time."""
        if not self._options.falls_back:
            return deadline_s
        if deadline_s is None:
            return _SETUP_S
        slowdown = self._times.slowdown()
        whole_s = (self._times.whole_s or math.inf) * work.scale() * slowdown.value * math.exp(SURE * slowdown.spread)
        spare_s = deadline_s - whole_s
        return min(spare_s if spare_s > 0 else deadline_s / 2, _SETUP_S)

    def _prepare(self, wait_s: float | None) -> None:
        servers, falls_back = self._servers, self._options.falls_back
        if not servers.peers:
            return  # everything runs on the device
        try:
            unlike = self._unlike() if falls_back else None
            if unlike is None:
                self._run_example()
        except (RuntimeError, TypeError) as error:
            if not falls_back or by_signal_handler(error):
                raise
            # As of PyTorch, where the model has been moved or converted by itself, and the example has not.
            unlike = Failure("unlike", f"the model does not run its example any more: {short(error, 300)}")
        if unlike is not None:
            for peer in servers.peers:
                peer.failure = unlike
            return
        if servers.chooses:
            device = with_joules(self._times.usable)[0]
            text = servers.goal.settle(device, servers.link, yields=falls_back)
            if text is not None:
                warn_caller(text, UnknownEnergyWarning)
        if falls_back:
            self._connect_all([peer for peer in self._unready() if wait_s is None or _answers(peer)], wait_s)
            # A call that has little time did not wait long enough to know of servers that have not answered yet.
            kinds = {peer.failure.kind for peer in self._unready() if peer.failure is not None}
            if len(self._unready()) == len(servers.peers) and (kinds - {"unready"} or (kinds and wait_s is None)):
                servers.warn_of_none()
        else:
            self._connect_any(wait_s)
        if self._connector.ping_tensors:
            self._keeper.start()
            self._keeper.wake()

    def _run_example(self) -> None:
        """Measure this device where a cut is to be chosen, and compute what is sent to see whether servers answer."""
        if self._servers.chooses:
            self._connector.profile_device()
        if self._options.falls_back or len(self._servers.peers) > 1 or self._servers.chooses:
            self._connector.prepare_ping()

    def _unlike(self) -> Failure | None:
        """Return why no server can be of use to the model as it was moved, to another dtype; None if it was not."""
        try:
            self._local.graph.tensors_of_call(*self._times.example)
        except TypeError as error:
            return Failure("unlike", str(error))
        return None

    def _unready(self) -> list[Peer]:
        return [peer for peer in self._servers.peers if peer.ready_in != self._local.epoch]

    def _connect_all(self, peers: Sequence[Peer], wait_s: float | None) -> None:
        """Connect to servers side by side, in the background threads, and wait for them."""
        end_s = time.monotonic() + (_SETUP_S if wait_s is None else wait_s)
        tasks = [self._keeper.connect(peer, min(_SETUP_S, peer.transport.timeout_s)) for peer in peers]
        for peer, task in zip(peers, tasks, strict=True):
            if task is not None and not task.wait(end_s - time.monotonic()):
                waits = "is still loading or measuring the model, or does not answer; it is used once it has answered"
                peer.failure = Failure("unready", f"{peer.label} {waits}")
            self._servers.warn(peer.failure)

    def _connect_any(self, timeout_s: float | None) -> None:
        """Connect to the servers one after the other, and raise the first one's error if none could be connected to.

        A thread of the pool does so, so that what a signal handler raises here is not taken for a server's failure.
        """
        failures: list[BaseException] = []
        for peer in self._unready():
            task = self._keeper.attempt(peer, timeout_s)
            if not task.wait(threading.TIMEOUT_MAX if timeout_s is None else timeout_s + _GRACE_S):
                task.give_up()
                task.error = ServerUnavailableError(f"{peer.label} was not made ready within {timeout_s:g} s")
            if task.error is not None:
                peer.failed(Failure.of(task.error))
                failures.append(task.error)
        if len(failures) == len(self._servers.peers):
            raise failures[0]


def _answers(peer: Peer) -> bool:
    """Return whether a server answered when it was last asked, if only for another model, or was not asked at all.

    The keeper's trials find out when the others answer again.
    """
    return peer.failure is None or peer.failure.kind in ("mismatch", "unlike", "threads")
