"""What a ``SplitModule`` does when it is called: one call, a stream of calls, or the rest of a call begun elsewhere."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.adapting import Decision
from torchsurgeon.errors import ServerUnavailableError, TraceError, short
from torchsurgeon.models.threads import without_gradients
from torchsurgeon.module.deadlines import Deadlines
from torchsurgeon.module.tracers import refuse_tracers
from torchsurgeon.module.wrapped import Wrapped, signature_of_model
from torchsurgeon.planning import Row
from torchsurgeon.runtime import Done, Engine, Inference, ModelCall, Pending, TailCall
from torchsurgeon.runtime.stream import Answering, in_order
from torchsurgeon.tracing.call import call_of
from torchsurgeon.tracing.layout import same_layout
from torchsurgeon.tracing.structure import is_mapping, with_tensors

if TYPE_CHECKING:
    from typing_extensions import Self


class Calls(Wrapped):
    """A module whose calls an engine runs between this device and its servers."""

    deadline_s: float | None
    _engine: Engine
    _end: weakref.finalize[Any, Any]
    _deadlines: Deadlines

    def prepare(self) -> Self:
        """Do now what the first call would do before its inference, and return the module.

        A model that has changed since it was traced is traced anew. Device and servers read all their weights, so that
        no change of these is missed.

        Raises:
            ServerError: with ``fallback="error"``, no server could be made ready.
            TraceError: the model has changed, and cannot be traced any more.
            PartitionError: with ``fallback="error"``, the model has changed, and cannot be cut there any more.
        """
        self._engine.renew_in_full()
        if self._engine.local.departed() is not None:
            self._replace_engine(self.model, wanted=True)
        self._engine.prepare()
        return self

    @signature_of_model
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for this call.

        Raises:
            TraceError: a tracer, a compiler or a transform of ``torch.func`` makes the call.
        """
        refuse_tracers(args, kwargs)
        deadline_s = self._deadlines.now(self.deadline_s)
        if self._engine.changes.noticed and deadline_s is None:
            self._replace_engine(self.model, wanted=False)
        engine = self._engine
        return without_gradients(engine.run, ModelCall(engine.parts, args, kwargs), deadline_s)

    def map(self, calls: Iterable[Any], depth: int = 4) -> Iterator[Any]:
        """Yield the answers to ``calls``, in their order, while up to ``depth`` of them are in flight.

        The head of one call runs while those before it are on the uplink or on the server. What counts in a stream is
        how many answers come in a second. So where the objective is latency, ``"auto"`` chooses the cut with the
        highest rate of answers that ``depth`` calls in flight allow. A deadline counts from the moment at which a
        call's head begins.

        Args:
            calls: each what the constructor takes as an example: a tensor, a tuple or a mapping. The iterator takes the
                next call as soon as fewer than ``depth`` are in flight. It copies the call's tensors at that moment, so
                that the caller may overwrite them afterwards.
            depth: how many calls may be in flight, 1 to 16.

        Raises:
            AdaptError: the depth is not within 1 to 16.
            TypeError: ``calls`` is a single call.
            Exception: whatever ``calls`` or a call raises, after the answers before it; it ends the iterator. Closing
                the iterator gives up the calls in flight.
        """
        if isinstance(calls, torch.Tensor) or is_mapping(calls):
            raise TypeError(
                f"map takes an iterable of calls; got one {type(calls).__name__}. Give a list of tensors, tuples or "
                "dicts, or batch.split(1) for one call per sample"
            )
        self._engine.stream()  # raises if the module has been closed
        deadline_s = self._deadlines.now(self.deadline_s)
        begins = (self._beginning(*call_of(call), deadline_s, depth) for call in calls)
        return in_order(begins, depth, stoppable=self._engine.parts.stoppable)

    def submit(self, *args: Any, **kwargs: Any) -> Answering:
        """Return the future answer of a call that runs in other threads.

        The call's tensors are copied before this returns. Heads run one after the other. Up to 16 calls are in flight;
        further ones wait, and can be cancelled meanwhile. A deadline counts from the beginning of the call's head.

        Args:
            *args: the call's positional arguments.
            **kwargs: its keyword arguments.

        Raises:
            ServerUnavailableError: the module has been closed.
        """
        return self._engine.stream().submit(self._beginning(args, kwargs, self._deadlines.now(self.deadline_s), None))

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's answer to this call without blocking the event loop; otherwise like ``submit()``."""
        future = self.submit(*args, **kwargs)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled_because is None:
                raise
            # Nobody has cancelled this task, so it must not look so.
            raise ServerUnavailableError(future.cancelled_because) from None

    def _beginning(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], deadline_s: float | None, in_flight: int | None
    ) -> Callable[[], Pending | Done]:
        """Return the function that begins a call in another thread, with its own copy of the call's tensors."""
        refuse_tracers(args, kwargs)
        if in_flight is not None and self._engine.changes.noticed and deadline_s is None:
            self._replace_engine(self.model, wanted=False)
        engine = self._engine
        # Copied, because a camera's buffer may hold the next frame before this one has been sent.
        args, kwargs = without_gradients(with_tensors, same_layout, (args, dict(kwargs)))
        work = ModelCall(engine.parts, args, kwargs)
        return functools.partial(engine.started, work, deadline_s, in_flight=in_flight)

    def finish(self, names: tuple[str, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Finish an inference that another machine has begun, and return the tensors of the model's result.

        A server calls this when the model that it serves is a SplitModule, which makes it the middle of a chain of
        machines. It receives boundary tensors, runs the layers from there to its own cut, and asks its own server for
        the rest. If the tensors already lie beyond its own cut, it passes them on to its server as they are.

        Args:
            names: the names of the given tensors, as the graph's partition points list them.
            *tensors: the tensors, in the same order.

        Returns:
            The result's tensors, in the order of ``graph.outputs``.

        Raises:
            PartitionError: the tensors do not determine the result.
        """
        engine = self._engine
        engine.parts.tail(names, flat=True)
        return tuple(without_gradients(engine.run, TailCall(engine.parts, names, tensors)))

    def deadline(self, deadline_s: float | None) -> AbstractContextManager[None]:
        """Give the calls within this context a deadline, instead of the constructor's.

        It holds for the thread or task that entered the context. When the server's answer would come too late, the rest
        of the model is started on the device early enough to be in time. If every way of answering would miss the
        deadline with 99 % confidence, a call raises ``DeadlineError`` at once, except for an occasional call that runs
        all the same, so that recovery is noticed. With ``fallback="error"``, a call without an answer by the deadline
        raises ``ServerUnavailableError``.

        Args:
            deadline_s: the seconds after a call within which its answer is due; None for no deadline.

        Raises:
            DeadlineError: ``deadline_s`` is not a positive number.
        """
        return self._deadlines.within(deadline_s)

    # --- what happened ---

    @property
    def last(self) -> Inference | None:
        """The inference that ended last, in any thread; None before the first."""
        return self._engine.ledger.last

    @property
    def decisions(self) -> list[Decision[Row]]:
        """The latest decisions of ``"auto"``, at most 256, the newest at the end."""
        return list(self._engine.servers.decisions)

    def stats(self) -> dict[str, Any]:
        """Return what has happened so far and what is known now, as plain data.

        The dict holds the number of ``inferences``, ``rows`` (by cut), ``degraded`` (by reason), ``bits`` (how many
        answers were the same bits, and how many to rounding), ``sent_bytes``, ``received_bytes``, the device's
        ``slowdown``, ``pings``, and ``servers``: for each one the state of its breaker, the estimates of link and load,
        its bytes, and under ``bits`` whether its answers have the same bits as this device's for certain, with what
        differs under ``inexact_because``. ``bits`` is None before the first handshake.
        """
        return self._engine.snapshot()

    def close(self) -> None:
        """End threads and connections. Afterwards, calls that need a server raise. Closing twice is harmless."""
        self._engine.close()
        self._end.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- a model that changes ---

    def _set_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TraceError(
                f"split.model must be an nn.Module in evaluation mode; got {short(model)}; to end a SplitModule, close "
                "and drop it"
            )
        self._replace_engine(model, wanted=True)
        super()._set_model(model)

    def _replace_engine(self, model: nn.Module, *, wanted: bool) -> None:
        """Trace a model, and have later calls run on that trace; calls under way end on the old one.

        Args:
            model: the present model, or another.
            wanted: True to do so now, and raise what goes wrong; False to do so only where the model has changed and
                has stayed the same since. What goes wrong then is in ``last.degraded``.
        """
        changes = self._engine.changes
        if not wanted and not changes.due(self._engine.local):
            return
        with changes.tracing():
            # Another thread may have done it meanwhile.
            earlier = self._engine
            if not wanted and not changes.due(earlier.local):
                return
            try:
                engine = earlier.successor(model)
            except Exception as error:
                if wanted or by_signal_handler(error):
                    raise
                changes.refused(error)
                return
            changes.traced()
            self._engine = engine

    def _is_read_by_model(self, name: str) -> bool:
        # What libraries keep for themselves on modules begins with an underscore.
        return not name.startswith("_") and name in self._engine.graph.reading.names

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._engine.moved(fn)
        return super()._apply(fn, recurse)
