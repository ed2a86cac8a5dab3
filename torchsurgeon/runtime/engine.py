"""Runs the calls of one SplitModule: chooses the cut of each call, runs its head, and sends the rest to a server."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.codec import Codec
from torchsurgeon.codec.codec import fitted_codecs
from torchsurgeon.codec.fitted import RatedCodec
from torchsurgeon.errors import (
    ArithmeticMismatchError,
    DeadlineError,
    PartitionError,
    ServerUnavailableError,
    TraceError,
    short,
)
from torchsurgeon.models.arithmetic import Arithmetic
from torchsurgeon.planning.costs import Expected
from torchsurgeon.runtime import bits
from torchsurgeon.runtime.changes import Changes
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.connector import Connector
from torchsurgeon.runtime.device import DeviceRunner, DeviceTimes, settle
from torchsurgeon.runtime.ending import Ending
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.handshake import LocalModel, autocast_mismatch, changed_midway, mode_here
from torchsurgeon.runtime.inference import Moments
from torchsurgeon.runtime.keeper import Bell, Keeper
from torchsurgeon.runtime.learner import Learner
from torchsurgeon.runtime.ledger import Ledger
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.options import Options
from torchsurgeon.runtime.parts import Parts
from torchsurgeon.runtime.pending import Done, Pending, Shared
from torchsurgeon.runtime.pool import Pool
from torchsurgeon.runtime.servers import Choice, Servers
from torchsurgeon.runtime.setup import Setup
from torchsurgeon.runtime.stream import MOST_IN_FLIGHT, Stream
from torchsurgeon.runtime.work import Work
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.tracing.structure import with_tensors
from torchsurgeon.tracing.tracer import trace
from torchsurgeon.transport import Transport

_logger = logging.getLogger(__name__)


class Engine:
    """Runs calls of one traced model between this device and its servers. Thread-safe.

    Args:
        graph: the traced model.
        servers: URLs or transports, the preferred one first.
        options: what the user asked for.
        earlier: the engine of the same module that this one replaces, as ``successor()`` does; None for the first.

    Attributes:
        changes: the changes of the model since it was traced.
        codec: how boundary tensors are encoded where the choice of the cut does not say so; may be assigned.
    """

    def __init__(
        self,
        graph: LayerGraph,
        servers: Sequence[str | Transport],
        options: Options,
        earlier: Engine | None = None,
    ) -> None:
        self.graph, self.options, self._codec = graph, options, options.codec
        self.local = LocalModel(graph)
        self.parts = Parts(graph, options.backend, self.local.watch)
        self.times = DeviceTimes(self.parts, options.example, options.device_profiles)
        self.servers = Servers(servers, options, self.local, self.times)
        self.servers.free_codec = isinstance(options.codec, Lossless)
        self.ledger: Ledger = Ledger(options.name) if earlier is None else earlier.ledger
        self.changes: Changes = Changes() if earlier is None else earlier.changes
        self._device = DeviceRunner(self.times, self.ledger, self.servers.whole, options.rounded_because)
        self._pool: Pool = Pool("torchsurgeon-request") if earlier is None else earlier._pool
        self._connector = Connector(options, self.local, self.parts, self.times, self.servers)
        bell = Bell()
        self._keeper = Keeper(self.local, self.servers, self._connector, self._pool, bell)
        self._setup = Setup(options, self.local, self.times, self.servers, self._connector, self._keeper)
        self._learner = Learner(graph, self.parts, self.times, self.servers, self._connector, self._pool)
        self.ending: Ending = Ending(self._pool, bell, self.servers.own) if earlier is None else earlier.ending
        self._bell = bell
        self._shared = Shared(
            options=options,
            local=self.local,
            parts=self.parts,
            times=self.times,
            device=self._device,
            servers=self.servers,
            connector=self._connector,
            keeper=self._keeper,
            pool=self._pool,
            ledger=self.ledger,
        )
        self._compiles = options.backend is not None
        self._closed = False
        self._closing = threading.Lock()
        # The cut that was asked for, by name, and why calls run on the device as a whole in spite of it.
        self._asked: str | tuple[str, ...] | None = None
        self._astray: Failure | None = None
        self._successor: Engine | None = None
        _open.add(self)

    # --- before a call ---

    @property
    def codec(self) -> Codec | Lossless:
        return self._codec

    @codec.setter
    def codec(self, wanted: Codec | Lossless) -> None:
        self._codec = wanted
        free = isinstance(wanted, Lossless)
        if free != self.servers.free_codec:
            self._setup.again(functools.partial(self.servers.free, codec=free))

    def fix(self, point: PartitionPoint | None) -> None:
        """Cut every call at ``point`` from now on. With None, choose where to cut at each call."""

        def change() -> None:
            self._asked, self._astray = _name_of(point, self.graph), None
            self.servers.fix(point)

        self._setup.again(change)

    def prepare(self) -> None:
        """Do what the first call would do before its inference, and shake hands again with all servers.

        Raises:
            ServerError: no server could be made ready, and the module does not fall back to the device.
        """
        self.local.arithmetic.now()  # servers are compared with what this thread computes with
        self._setup.prepare(again=True)
        self._learner.learn()

    def renew_in_full(self) -> None:
        """Notice weights that have changed in any way, by reading all of them."""
        self._connector.renew(in_full=True)

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Note that ``fn`` is applied to the model's tensors, as ``torch.nn.Module.to()`` does."""
        with torch.no_grad():
            self.times.example = with_tensors(fn, self.times.example)
        self.times.forget()
        # The next call makes the ping again, even if the move has changed nothing.
        self._setup.again(self._connector.forget_parts)

    # --- one call ---

    def run(self, work: Work, deadline_s: float | None = None) -> Any:
        """Return the result of one call."""
        begun_s = time.perf_counter()
        pending: Pending | Done | None = None
        try:
            pending = self._begin(work, deadline_s, in_flight=None)
            pending.send(in_caller=True)
            return pending.result()
        except BaseException as error:
            self._give_up(pending, begun_s, error)
            raise

    def started(self, work: Work, deadline_s: float | None, *, in_flight: int | None = None) -> Pending | Done:
        """Run the head of one call and send its request, for whose answer a thread of the pool waits.

        Args:
            work: the call.
            deadline_s: seconds from now within which its answer is due; None for no deadline.
            in_flight: how many calls of its stream may be under way, where it belongs to one. The cut is then chosen
                for the rate of answers, not for the latency of a single call.

        Raises:
            DeadlineError: no way of running the call can keep the deadline.
        """
        begun_s = time.perf_counter()
        pending: Pending | Done | None = None
        try:
            pending = self._begin(work, deadline_s, in_flight=in_flight)
            pending.send()
            return pending
        except BaseException as error:
            self._give_up(pending, begun_s, error)
            raise

    def _give_up(self, pending: Pending | Done | None, begun_s: float, error: BaseException) -> None:
        """End a call that has raised, wherever a signal handler may have raised in it, and record its error once."""
        if pending is not None:
            pending.cancel()
        if isinstance(error, Exception) and (pending is None or not pending.recorded):
            self.ledger.record_error(time.perf_counter() - begun_s, error)

    def _begin(self, work: Work, deadline_s: float | None, *, in_flight: int | None) -> Pending | Done:
        """Choose a cut and run the head; or run the whole call on the device, where no server is to be asked."""
        fixed, falls_back = self.servers.fixed, self.options.falls_back
        if fixed is not None and fixed.whole and deadline_s is None:
            uncut = work.uncut() if self._compiles and self._unlike_trace() else None
            if self._compiles and uncut is None:
                self.local.used()
                self._learner.start()
                self._compile(fixed)
            return Done(self._device.run(work, time.perf_counter(), self._astray, uncut=uncut))
        if self._closed:
            raise ServerUnavailableError("the SplitModule has been closed; make a new one")
        if not falls_back:
            # With a fallback, changed weights are noticed while the request is on its way, which costs no time.
            self._connector.renew()
        changed = self.local.departed()
        if changed is not None:
            return self._uncut(work, changed, hasty=deadline_s is not None)
        mismatch = autocast_mismatch()
        if mismatch is not None:
            if not falls_back:
                raise mismatch
            uncut = work.uncut() if self.parts.exported else None
            return Done(self._device.run(work, time.perf_counter(), Failure("autocast", str(mismatch)), uncut=uncut))
        mode = mode_here()
        if mode is not None:
            if not falls_back:
                raise TraceError(f"{mode}; call the SplitModule outside of it, or its .model")
            return Done(self._device.run(work, time.perf_counter(), Failure("mode", mode), uncut=work.uncut()))
        arithmetic = self.local.arithmetic.now()
        if not self.servers.compared(arithmetic):
            self.local.again()
        begun_s, weights = time.perf_counter(), self.local.weights
        if (fixed is None or not fixed.whole) and not self._setup.done:
            begun_s = self._setup.prepare_for(work, deadline_s)
            if not falls_back and self.local.changed(weights):
                # As they may in the seconds that preparing takes. A new head must not be finished with old weights.
                raise changed_midway()
        self._learner.start()
        self._keeper.used()
        try:
            choice = self.servers.choose(work, arithmetic, in_flight=in_flight)
        except Exception as error:
            if not falls_back or by_signal_handler(error):
                raise
            # A fault in an estimate or a cost must not cost an answer.
            _logger.exception("choosing where to cut failed; the device answers")
            why = Failure("choice", f"choosing where to cut failed: {type(error).__name__}: {short(error)}")
            return Done(self._device.run(work, begun_s, why))
        way = self._decoded(choice)
        if way is not choice.way:
            choice = choice._replace(way=way)
        if self._compiles and choice.why is None:
            # Compiling takes seconds, so it is not done in an emergency, and does not count as the call's time.
            compiling_s = time.perf_counter()
            if self._compile(choice.way) and not falls_back and self.local.changed(weights):
                raise changed_midway()
            begun_s += time.perf_counter() - compiling_s
        if deadline_s is not None and falls_back:
            way, begun_s = self._within(deadline_s, begun_s, work, choice)
            choice = choice._replace(way=way)
        if choice.peer is None or choice.way.whole:
            if choice.why is not None:
                if not falls_back and choice.why.kind == "metered":
                    raise ServerUnavailableError(f"no request may be sent: {choice.why.text}")
                if not falls_back and not self.servers.fit(arithmetic):
                    raise bits.refusal(self.options.name, self.servers.peers[0].differences(arithmetic))
                self._connector.renew()
            return Done(self._device.run(work, begun_s, choice.why or self._astray, choice.decision))
        return self._headed(work, choice, arithmetic, begun_s, None if deadline_s is None else begun_s + deadline_s)

    def _within(self, deadline_s: float, begun_s: float, work: Work, choice: Choice) -> tuple[Way, float]:
        """Return the way of a choice, or a quicker one that keeps the deadline, and from when the call's time counts.

        See ``Servers.within()``.
        """
        timing_s = time.perf_counter()
        try:
            # Where nobody has said what the way's parts take, they are run for that once, which is not the call's time.
            self.times.expected_s(choice.way)
            begun_s += time.perf_counter() - timing_s
            return self.servers.within(deadline_s, begun_s, work, choice), begun_s
        except Exception as error:
            if isinstance(error, DeadlineError) or by_signal_handler(error):
                raise
            _logger.exception("whether the deadline can be kept is not known; the call is cut where it was to be cut")
            return choice.way, begun_s

    def _compile(self, way: Way) -> bool:
        """Have the parts of a way compiled, if that is due: now, or in the background where backends are chosen.

        Returns:
            Whether it was due.
        """
        if not self.parts.due(way.point, way.student):
            return False
        # What is built now is to be compared with the weights as they are now.
        self._connector.renew()
        if self.parts.auto is None:
            self.parts.compile(way.point, self.times.example, way.student)
        else:
            self._learner.build(way)
        return True

    def _unlike_trace(self) -> bool:
        """Return whether the model itself may answer a call otherwise than as it was traced, with which it is built."""
        return self.local.departed() is not None or autocast_mismatch() is not None or mode_here() is not None

    def _decoded(self, choice: Choice) -> Way:
        """Return the way of a choice, with the module's codec in it where a student of that codec is its head.

        A student computes what only its own codec was made for, so it is not used with a server that lacks the codec.
        """
        way = choice.way
        if way.codec is None and isinstance(self._codec, RatedCodec):
            own = dataclasses.replace(way, codec=self._codec)
            way = way if own.student is None else own
        if way.student is None or choice.peer is None or way.codec is None or choice.peer.has(way.codec):
            return way
        return dataclasses.replace(way, codec=None)

    def _uncut(self, work: Work, changed: str, *, hasty: bool) -> Done:
        """Have the model itself answer a call, as it is now that it is no longer as it was traced.

        Raises:
            TraceError: the module does not fall back to the device, or the call begins inside the model.
        """
        begun_s, model = time.perf_counter(), work.uncut()
        if model is None or not self.options.falls_back:
            raise TraceError(changed)
        with self.changes.answering(self.graph.model, changed, look=not hasty) as why:
            return Done(self._device.run(work, begun_s, why, uncut=model))

    def _headed(
        self, work: Work, choice: Choice, arithmetic: Arithmetic, begun_s: float, due_s: float | None
    ) -> Pending | Done:
        """Run the head of a call that asks a server; ``due_s`` is when its answer is due (``time.perf_counter``)."""
        way, peer, decision, _ = choice
        assert peer is not None
        head, weights = work.head(way.point, way.student), self.local.weights
        decided_s = time.perf_counter()
        raised: Failure | None = None
        try:
            boundary = head()
        except Exception as error:
            if work.uncut() is None or not self.options.falls_back or by_signal_handler(error):
                raise
            raised = Failure.of_part(error)
        if raised is not None:
            # The trace does not hold for this call, or the model refuses it, or catches what its layers raise.
            return Done(self._device.run(work, begun_s, raised, decision, uncut=work.uncut()))
        settle(boundary)
        headed_s = time.perf_counter()
        specs = work.crossing(way.point)
        rounded = bits.displaced(self.graph, specs, boundary)
        if rounded and self.options.exact:
            if not self.options.falls_back:
                raise ArithmeticMismatchError(f"exact=True asks for the same bits, and {'; '.join(rounded)}")
            return Done(self._device.run(work, begun_s, Failure("inexact", "; ".join(rounded)), decision))
        plan, row = peer.plan, way.row
        expected: Callable[[float], Expected] | None = None
        if decision is not None and plan is not None and row is not None:
            expected = functools.partial(plan.expected, row, decision.estimates)
        pending = Pending(
            self._shared,
            work,
            way,
            peer,
            boundary,
            specs,
            Moments(begun_s, decided_s, headed_s, self.times.backend(way)),
            codec=self._codec,
            expected=expected,
            decision=decision,
            deadline_s=due_s,
            arithmetic=arithmetic,
            weights=weights,
            rounded_because=rounded,
        )
        if row is not None and work.whole_model and self.times.built(way):
            self.times.record_duration(headed_s - decided_s, row.head_s * pending.scale)
        return pending

    def snapshot(self) -> dict[str, Any]:
        """Return what has happened so far and what is known now, as plain data."""
        return {
            **self.ledger.snapshot(),
            "slowdown": self.times.slowdown().value,
            "pings": self._keeper.pings,
            "fitted_codecs": {fitted.name: fitted.stats() for fitted in fitted_codecs()},
            "servers": [peer.snapshot(self.local.epoch) for peer in self.servers.peers],
        }

    # --- a model that has changed ---

    def successor(self, model: nn.Module) -> Engine:
        """Trace a model, and return the engine that runs it from now on in place of this one.

        It keeps the servers with what is known of their links, the account, and the threads for requests. Calls that
        are under way end here.

        Raises:
            TraceError: the model cannot be traced; this engine goes on.
            PartitionError: the model does not have the partition point that was asked for, and the module does not
                fall back to the device; this engine goes on.
        """
        args, kwargs = example = self.times.example
        graph = trace(model, *args, leaf_modules=self.options.leaf_modules, verify=self.options.verify, **kwargs)
        same, peers = graph.fingerprint == self.graph.fingerprint, self.servers.peers
        options = dataclasses.replace(
            self.options,
            example=example,
            device_profiles=self.times.profiles if same else (),
            server_profiles=tuple(peers[0].profiles.by_backend.values()) if same and peers else (),
        )
        point, astray = self._point_in(graph)
        new = Engine(graph, [peer.transport for peer in peers], options, earlier=self)
        new.codec = Lossless() if isinstance(self.codec, Lossless) else self.codec
        new.servers.inherit(self.servers)
        new._setup.inherit(self._setup)
        new._keeper.pings = self._keeper.pings
        new.fix(point)
        new._asked, new._astray = self._asked, astray
        with self._closing:
            new._closed = self._closed
            self._successor = new
        self.ending.exchange(new._bell)
        self.local.close()
        return new

    def _point_in(self, graph: LayerGraph) -> tuple[PartitionPoint | None, Failure | None]:
        """Return the point of another graph that is called as what was asked for, and why it is another; None: auto."""
        asked = self._asked
        try:
            if not isinstance(asked, tuple):
                return None if asked is None else graph.point(asked), None
            index = {layer.name: layer.index for layer in graph.layers}
            return graph.point_of([index[name] for name in asked]), None
        except (PartitionError, KeyError):
            text = (
                f"the model has no partition point {short(asked, 100)} any more since it was traced anew; assign "
                "another to split.partition"
            )
            if not self.options.falls_back:
                raise PartitionError(text) from None
            return graph.points[-1], Failure("changed", text)

    # --- streams ---

    def stream(self) -> Stream:
        """Return what runs the calls of ``submit()`` beside each other; the first call of this method makes it.

        Raises:
            ServerUnavailableError: the module has been closed.
        """
        if self.ending.stream is None:
            with self._closing:
                if self.ending.stream is None and not self._closed and self._successor is None:
                    self.ending.stream = Stream(MOST_IN_FLIGHT, stoppable=self.parts.stoppable)
        if self._successor is not None:
            return self._successor.stream()
        stream = self.ending.stream
        if self._closed or stream is None:
            raise ServerUnavailableError("the SplitModule has been closed; make a new one")
        return stream

    # --- the end ---

    def close(self) -> None:
        """End all threads and connections. Closing twice, or from two threads at once, is harmless."""
        with self._closing:
            # Hold the lock only to set the flag; the closes below may re-enter close(), in this thread and in others.
            self._closed = True
        if self._successor is not None:
            self._successor.close()
        self.ending.end()
        self.local.close()
        self.servers.close()

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child: threads, locks and connections stay with the parent."""
        self._closing = threading.Lock()
        for part in (
            self.local,
            self.times,
            self.servers,
            self.ledger,
            self.ending,
            self._connector,
            self._keeper,
            self._setup,
            self._learner,
            self.changes,
        ):
            part.reset_after_fork()
        if isinstance(self.codec, Lossless):
            self.codec.reset_after_fork()


def _name_of(point: PartitionPoint | None, graph: LayerGraph) -> str | tuple[str, ...] | None:
    """Return a name of a partition point that means the same in another trace of the model."""
    if point is None or point.index in (0, len(graph.layers)):
        return None if point is None else "device" if point.index else "server"
    return point.name if point.layers is None else tuple(graph.layers[i].name for i in point.layers)


# Weak, so that a module which nobody holds any more is collected and ends its threads.
_open: weakref.WeakSet[Engine] = weakref.WeakSet()


def _reset_after_fork() -> None:
    for engine in list(_open):
        engine.reset_after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)
