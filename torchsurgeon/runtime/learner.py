"""Finds out in the background what backends take, on this device and on servers, and has parts built there."""

from __future__ import annotations

import functools
import logging
import threading
import time

from torchsurgeon._interrupts import NoThreadError
from torchsurgeon.backends import Backend
from torchsurgeon.errors import ServerUnavailableError, TorchSurgeonError
from torchsurgeon.profiling.fused import fused_profile
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.connector import Connector
from torchsurgeon.runtime.device import DeviceTimes
from torchsurgeon.runtime.parts import Parts
from torchsurgeon.runtime.pool import Pool
from torchsurgeon.runtime.servers import Servers
from torchsurgeon.tracing.graph import LayerGraph

_logger = logging.getLogger(__name__)

# How long the parts of one backend are measured, how often each, and how long until a server is asked again.
_BUDGET_S = 10.0
_REPEATS = 7
_AGAIN_S = 2.0


class Learner:
    """Measures what heads and tails take by the backends that may run them, and plans anew with that. Thread-safe.

    Calls go on meanwhile: with what is known so far, and in eager PyTorch where a part has not been built.
    """

    def __init__(
        self, graph: LayerGraph, parts: Parts, times: DeviceTimes, servers: Servers, connector: Connector, pool: Pool
    ) -> None:
        self._graph, self._parts, self._times = graph, parts, times
        self._servers, self._connector, self._pool = servers, connector, pool
        # Who gives profiles knows what the device takes.
        self._measures = parts.auto is not None or (bool(parts.backends) and not times.profiles)
        self._failed: set[str] = set()
        if parts.auto is not None and times.profiles:
            parts.auto.learn(graph, times.usable)
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child."""
        self._learning = threading.Lock()
        self._busy = self._stopped = False
        self._next_s = 0.0
        self._asked: set[object] = set()

    def start(self) -> None:
        """Begin to find out what is not known yet, in a thread of the pool; to be called at every inference."""
        if self._busy or not self._due() or time.monotonic() < self._next_s:
            return
        try:
            self._busy = True
            self._next_s = time.monotonic() + _AGAIN_S
            self._pool.submit(self._run, self._stop)
        except BaseException as error:
            # Also what a signal handler raises here, which must not end all learning.
            self._busy = False
            if not isinstance(error, NoThreadError | ServerUnavailableError):
                raise

    def learn(self) -> None:
        """Find it out now, and build the parts that calls run first; for whoever waits for no answer."""
        if self._due():
            with self._learning:
                self._learn()
        if self._parts.auto is not None:
            fixed = self._servers.fixed
            for point in dict.fromkeys([self._graph.points[-1], *([] if fixed is None else [fixed.point])]):
                self._parts.compile(point, self._times.example)

    def build(self, way: Way) -> None:
        """Have head and tail of a way built in a thread of the pool: once, and after each change of the weights."""
        student = None if way.student is None else way.student.name
        key = (self._parts.generation, *way.point.place, student)
        if key in self._asked:
            if not self._parts.forget_outdated(way.point, way.student):
                return
            self._asked.clear()
            key = (self._parts.generation, *key[1:])
        try:
            self._asked.add(key)
            self._pool.submit(functools.partial(self._build, way), self._stop)
        except BaseException as error:
            self._asked.discard(key)
            if not isinstance(error, NoThreadError | ServerUnavailableError):
                raise

    def _stop(self) -> None:
        """Begin nothing more where the module is being closed; a task may be given up for another reason, too."""
        if self._pool.closed:
            self._stopped = True

    def _build(self, way: Way) -> None:
        # One after the other: the calls need the processor, too.
        with self._learning:
            if self._stopped:
                return
            self._parts.compile(way.point, self._times.example, way.student)

    def _due(self) -> bool:
        lacking = [peer for peer in self._servers.peers if peer.profiles.lacking]
        return (bool(lacking) and self._servers.chooses) or (self._measures and bool(self._missing()))

    def _missing(self) -> list[Backend]:
        """Return the backends of this device of which it is not known yet what they take."""
        if not self._measures or not (self._servers.chooses or self._parts.auto is not None):
            return []
        known = {profile.backend for profile in self._times.profiles} | self._failed
        return [backend for backend in self._parts.backends if backend.name not in known]

    def _run(self) -> None:
        try:
            with self._learning:
                self._learn()
        finally:
            self._busy = False

    def _learn(self) -> None:
        for backend in self._missing():
            if self._stopped:
                return
            eager = self._connector.profile_device()
            inputs = self._graph.tensors_of_call(*self._times.example)
            try:
                measured = fused_profile(
                    self._graph,
                    backend,
                    eager,
                    inputs,
                    repeats=_REPEATS,
                    budget_s=_BUDGET_S,
                    stopped=lambda: self._stopped,
                )
            except Exception:  # a runtime of another project may fail in any way; the calls go on without it
                _logger.exception("what heads and tails take by backend %s is not known", backend.name)
                self._failed.add(backend.name)
                continue
            self._times.learn(measured)
            if self._parts.auto is not None:
                self._parts.auto.learn(self._graph, self._times.usable)
                self._parts.generation += 1
            for peer in self._servers.peers:
                self._connector.plan_again(peer)
        for peer in self._servers.peers:
            if self._servers.chooses and peer.profiles.lacking:
                try:
                    more = peer.profiles.complete()
                except TorchSurgeonError:
                    continue  # It measures, or answers nothing of use; it is asked again later.
                if more:
                    peer.forget_load()
                    self._connector.plan_again(peer)
