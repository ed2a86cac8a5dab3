"""SplitModule: a model whose head runs here and whose tail runs on a server."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchsurgeon.adapting import Decision, check_deadline
from torchsurgeon.codec import Codec, CodecTable, find_codec
from torchsurgeon.errors import BackendError, CodecError, PlanError, ServerUnavailableError
from torchsurgeon.link import Link
from torchsurgeon.planning import Battery, Objective, Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime import Backend, Done, Engine, Inference, ModelCall, Options, Pending, TailCall
from torchsurgeon.runtime.compiled import compiler
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.stream import in_order
from torchsurgeon.tracing.call import call_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.tracing.tracer import trace
from torchsurgeon.transport import Transport

Server = str | Transport

# By the module's id, so that modules that call each other keep their own.
_deadlines: contextvars.ContextVar[Mapping[int, float | None]] = contextvars.ContextVar("deadlines")


class SplitModule(nn.Module):
    """Wrap ``model`` so that calling it runs a part here and the rest on a tail server, and gives the model's own
    answer.

    Args:
        model: the model, in eval mode. It is not changed; its parameters are shared.
        example: what the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword ones.
        server: URL of a server started with ``torchsurgeon serve``, or a :class:`~torchsurgeon.transport.Transport`;
            or several, in the order of preference. Not needed with ``partition="device"``.
        name: the model's name on that server.
        partition: ``"auto"`` to choose anew at every inference, by measured layer times of both sides and by what link,
            server and device are like at the moment. Or where to cut, as a
            :class:`~torchsurgeon.tracing.PartitionPoint` of this model; ``"device"`` or ``"server"`` for everything
            on one side, a partition index, or the name of the last layer to run here.
        objective: what ``"auto"`` makes small: ``"latency"``, ``"energy"``, …, an
            :class:`~torchsurgeon.Objective`, or ``Objective.battery(level)``. Energy needs a ``device_profile``
            with joules, given or metered here, and a ``link`` with a radio. What is given and does not tell it raises
            :class:`~torchsurgeon.errors.PlanError`; what turns out not to warns once with
            :class:`~torchsurgeon.runtime.UnknownEnergyWarning`, and latency is made small.
        codecs: what codecs measured to cost; ``"auto"`` then chooses among them too, lossy ones only where they kept an
            accuracy budget. Without it everything is sent under ``codec``.
        fallback: ``"local"`` to run the rest of the model here when no server answers well or in time, ``"error"`` to
            raise then.
        deadline_s: when an answer is due, counted from the call; see :meth:`deadline`.
        on_replan: called with the :class:`~torchsurgeon.adapting.Decision` when ``"auto"`` changes the cut.
        link: the link, when it is known; measured at the first call otherwise (``"auto"`` only).
        device_profile, server_profile: layer times, when they are known; measured otherwise (``"auto"`` only).
        codec: the codec of the boundary tensors, by name: ``"raw"`` or ``"zstd"``, or one that loses something
            (``"int8+zstd"``), which makes the answer another than the model's own. ``"auto"`` takes of ``raw`` and
            ``zstd`` the one that is quicker from end to end. Assign ``codec`` to change it.
        answer_codec: the codec that the server is asked to answer with.
        compile: True to compile heads and tails with ``torch.compile``, or the name of one of its backends; their
            answers are the model's own to within rounding.
        backend: in its place, what makes the callable that runs the head, and the tail where it runs here, from its
            module; eager PyTorch by default.
        timeout_s: an inference that takes the server longer has failed.
        leaf_modules: passed to :func:`~torchsurgeon.tracing.trace`.

    The first call, or :meth:`prepare`, shakes hands with the servers, so that only one with the same graph and weights
    is asked, and measures what ``"auto"`` needs. With ``fallback="local"`` a call never fails because of a server:
    ``last.degraded`` says what was wrong, and a :class:`~torchsurgeon.runtime.MismatchWarning` that a server holds
    another model. With ``fallback="error"`` it raises :class:`~torchsurgeon.errors.ModelMismatchError` then,
    :class:`~torchsurgeon.errors.ServerUnavailableError` for a server that is down, slow or gone in mid-answer, and
    what else servers raise. A model that is put into training mode, or gets other submodules, hooks or plain
    attributes, raises :class:`~torchsurgeon.errors.TraceError`. Inference only: no gradients, and ``train()`` leaves it
    in evaluation mode. May be called from several threads at once. Close it, or use it in a ``with`` statement, to end
    its threads and connections.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        server: Server | Sequence[Server] | None = None,
        name: str = "model",
        partition: str | int | PartitionPoint = "auto",
        objective: str | Mapping[str, float] | Objective | Battery = "latency",
        codecs: CodecTable | None = None,
        fallback: Literal["local", "error"] = "local",
        deadline_s: float | None = None,
        on_replan: Callable[[Decision[Row]], object] | None = None,
        link: Link | None = None,
        device_profile: LayerProfile | None = None,
        server_profile: LayerProfile | None = None,
        codec: str = "raw",
        answer_codec: str = "raw",
        compile: bool | str = False,
        backend: Backend | None = None,
        timeout_s: float = 30.0,
        leaf_modules: Sequence[str | type[nn.Module]] = (),
    ) -> None:
        super().__init__()
        if fallback not in ("local", "error"):
            raise PlanError(f'there is no fallback {fallback!r}: use "local" to answer here, or "error" to raise')
        if compile and backend is not None:
            raise BackendError("compile= and backend= each say what runs the heads and tails: give one of them")
        if deadline_s is not None:
            check_deadline(deadline_s, 0.0, "")
        self.training = False
        self.model = model
        args, kwargs = call_of(example)
        self.graph: LayerGraph = trace(model, *args, leaf_modules=leaf_modules, **kwargs)
        self.name = name
        self.deadline_s = deadline_s
        given = [server] if isinstance(server, (str, Transport)) else server or ()
        self._engine = Engine(
            self.graph,
            list(given),
            Options(
                name=name,
                example=(args, kwargs),
                falls_back=fallback == "local",
                objective=objective if isinstance(objective, Battery) else Objective.of(objective),
                codec=_codec(codec),
                answer_codec=find_codec(answer_codec),
                codecs=codecs,
                backend=compiler(compile) if compile else backend,
                link=link,
                device_profile=device_profile,
                server_profile=server_profile,
                timeout_s=timeout_s,
                on_replan=on_replan,
            ),
        )
        self._end = weakref.finalize(self, self._engine.abandon)
        self.partition = partition

    # --- where to cut ---

    @property
    def partition(self) -> PartitionPoint | None:
        """The partition point in use; None while ``"auto"`` has not chosen yet. Assign what the constructor takes."""
        return self._engine.servers.point

    @partition.setter
    def partition(self, wanted: str | int | PartitionPoint) -> None:
        if isinstance(wanted, PartitionPoint):
            choice: PartitionPoint | None = wanted
        else:
            choice = None if wanted == "auto" else self.graph.point(wanted)
        if not self._engine.servers.peers and (choice is None or choice != self.graph.points[-1]):
            raise ServerUnavailableError(
                f'partition {wanted!r} needs a server: give server="http://host:port", or partition="device"'
            )
        self._engine.fix(choice)

    @property
    def codec(self) -> Codec | Lossless:
        """The codec of the boundary tensors. Assign a name; raises :class:`~torchsurgeon.wire.CodecError`."""
        return self._engine.codec

    @codec.setter
    def codec(self, wanted: str | Codec | Lossless) -> None:
        self._engine.codec = _codec(str(wanted))

    @property
    def link(self) -> Link | None:
        """The link as it was given, or measured to begin with; None before that. ``stats`` has what it is like now."""
        return self._engine.servers.link

    @property
    def device_profile(self) -> LayerProfile | None:
        """Layer times here, as given or measured."""
        return self._engine.times.profile

    @property
    def server_profile(self) -> LayerProfile | None:
        """Layer times on the (first) server, as given or as it told them."""
        return next((peer.profile for peer in self._engine.servers.peers), None)

    # --- running ---

    def prepare(self) -> SplitModule:
        """Do now what the first call would do before its inference, and return the module.

        With ``fallback="error"`` it raises what the call would raise.
        """
        self._engine.prepare()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for this call."""
        engine = self._engine
        with torch.no_grad():
            return engine.run(ModelCall(engine.parts, args, kwargs), self._deadline_now())

    def map(self, calls: Iterable[Any], depth: int = 4) -> Iterator[Any]:
        """Return the answers to ``calls``, in their order, while up to ``depth`` of them are in flight.

        Each of ``calls`` is what the constructor takes as an example: a tensor, a tuple or a dict. The head of one runs
        while those before it are on the uplink or on the server, and ``"auto"`` cuts for the rate of answers where it
        otherwise would for latency. A call is taken from ``calls`` when less than ``depth`` are in flight and the next
        answer is not there yet. Its tensors are copied then, so whoever makes the calls may use them again. A deadline
        counts from when a call's head begins.

        What ``calls`` or a call raises comes after the answers before it, and ends the iterator. Closing the iterator
        gives up what is in flight. Raises :class:`~torchsurgeon.errors.AdaptError` for a depth that is not 1 to 16.
        """
        if isinstance(calls, (torch.Tensor, Mapping)):
            raise TypeError(
                f"map takes an iterable of calls, not one {type(calls).__name__}: give a list of tensors, tuples or "
                "dicts, or batch.split(1) for a call for each sample"
            )
        self._engine.stream()  # raises when closed
        deadline_s = self._deadline_now()
        return in_order((self._beginning(*call_of(call), deadline_s, True) for call in calls), depth)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return the future answer of this call, which runs beside the thread that asks for it.

        Heads run one after the other; up to 16 calls are in flight, and more wait, in which time they can be cancelled.
        The call's tensors are copied now.
        A deadline counts from when the call's head begins. After :meth:`close` it raises
        :class:`~torchsurgeon.errors.ServerUnavailableError`.
        """
        return self._engine.stream().submit(self._beginning(args, kwargs, self._deadline_now(), False))

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for this call, without blocking the event loop; as :meth:`submit`."""
        return await asyncio.wrap_future(self.submit(*args, **kwargs))

    def _beginning(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], deadline_s: float | None, streamed: bool
    ) -> Callable[[], Pending | Done]:
        engine = self._engine
        # A camera's buffer may hold the next frame before this one has been sent.
        args, kwargs = pytree.tree_map_only(torch.Tensor, _copied, (args, dict(kwargs)))
        work = ModelCall(engine.parts, args, kwargs)
        return functools.partial(engine.started, work, deadline_s, streamed=streamed)

    def finish(self, names: tuple[str, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the model's result, in the order of ``graph.outputs``, from the tensors ``names``.

        The layers up to this module's own cut run here, the rest on its server. So a server that is given a SplitModule
        is the middle of a chain. Tensors that lie beyond the cut are passed on as they are.

        Raises :class:`~torchsurgeon.errors.PartitionError` when they do not determine the result.
        """
        engine = self._engine
        engine.parts.tail(names, flat=True)
        with torch.no_grad():
            return tuple(engine.run(TailCall(engine.parts, names, tensors)))

    @contextlib.contextmanager
    def deadline(self, deadline_s: float | None) -> Iterator[None]:
        """Within this context, calls of this module are due ``deadline_s`` after they began; None for no deadline.

        It holds for the thread or task that entered it, and goes before the constructor's. When the server's answer
        would come too late the rest of the model runs here, started in time. A call that surely cannot be in time
        whatever is done raises :class:`~torchsurgeon.errors.DeadlineError` at once, which names the best that can be;
        now and then such a call runs all the same, to find out whether that still holds. With
        ``fallback="error"`` a call that is not answered by then raises
        :class:`~torchsurgeon.errors.ServerUnavailableError`.
        """
        if deadline_s is not None:
            check_deadline(deadline_s, 0.0, "")
        token = _deadlines.set({**_deadlines.get({}), id(self): deadline_s})
        try:
            yield
        finally:
            _deadlines.reset(token)

    def _deadline_now(self) -> float | None:
        within = _deadlines.get(None)
        return self.deadline_s if within is None else within.get(id(self), self.deadline_s)

    # --- what happened ---

    @property
    def last(self) -> Inference | None:
        """The inference that ended last, in any thread; None before the first."""
        return self._engine.ledger.last

    @property
    def decisions(self) -> list[Decision[Row]]:
        """The last decisions of ``"auto"`` (256 at most), the newest at the end."""
        return list(self._engine.servers.decisions)

    def stats(self) -> dict[str, Any]:
        """Return what happened so far and what is known now, as plain data.

        ``inferences`` in all, ``rows`` by cut, ``degraded`` by reason, bytes sent and received, ``slowdown`` of the
        device, ``pings``, and for each of the ``servers`` its breaker, the estimates of link and load, and its bytes.
        """
        return self._engine.snapshot()

    def close(self) -> None:
        """End threads and connections. Closing twice is harmless; calls that need the server raise afterwards."""
        self._engine.close()

    def __enter__(self) -> SplitModule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- being an nn.Module ---

    def train(self, mode: bool = True) -> SplitModule:
        """Stay in evaluation mode, as a frozen part of whatever module is trained around it: it gives answers only."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> SplitModule:
        self._engine.moved(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a SplitModule holds connections and cannot be copied or saved; copy its model and wrap that")

    def extra_repr(self) -> str:
        where = self.partition.name if self.partition is not None else "auto"
        return f"name={self.name!r}, partition={where!r}"


@torch.no_grad()
def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def _codec(name: str) -> Codec | Lossless:
    if isinstance(name, CodecTable):
        raise CodecError('codec takes a name such as "int8+zstd"; give a measured table as codecs=')
    return Lossless() if name == Lossless.name else find_codec(name)
