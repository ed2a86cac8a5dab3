"""SplitModule: a model whose head runs on this device and whose tail runs on a server."""

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
from torchsurgeon.errors import (
    AdaptError,
    BackendError,
    CodecError,
    LinkError,
    PlanError,
    ProfileError,
    ServerUnavailableError,
    TraceError,
    is_finite,
    short,
)
from torchsurgeon.link import Link
from torchsurgeon.planning import Battery, Objective, Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime import Backend, Done, Engine, Inference, ModelCall, Options, Pending, TailCall
from torchsurgeon.runtime.compiled import compiler
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.stream import in_order
from torchsurgeon.tracing.call import call_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.layout import same_layout
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.tracing.tracer import trace
from torchsurgeon.transport import Transport

# The URL of a server, or a transport to it.
ServerAddress = str | Transport

# The deadlines in seconds that ``deadline()`` has set in this thread or task, by the id() of the SplitModule. One
# SplitModule may call another, so each has a deadline of its own.
_deadlines: contextvars.ContextVar[Mapping[int, float | None]] = contextvars.ContextVar("deadlines")


class SplitModule(nn.Module):
    """A model of which a part runs on this device and the rest on a server, with the model's own answer.

    The first call, or ``prepare()``, compares the graph and the weights with each server's, so that only a server that
    holds the same model is asked, and measures what ``"auto"`` needs. Later calls choose where to cut the model.

    With ``fallback="local"`` no call fails because of a server: the device runs the rest of the model when no server
    answers well or in time, and ``last.degraded`` says why. With ``fallback="error"`` such a call raises.

    It is for inference only: there are no gradients, and ``train()`` leaves it in evaluation mode. Several threads may
    call it at once. Close it, or use it in a ``with`` statement, to end its threads and connections.

    Args:
        model: the model, in evaluation mode. It is not changed, and its parameters are shared.
        example: what the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword ones.
        server: the URL of a server started with ``torchsurgeon serve``, or a ``Transport``; or several of these, the
            preferred one first. Not needed with ``partition="device"``.
        name: the model's name on the server.
        partition: where to cut. ``"auto"`` chooses at every call, from measured layer times of both sides and the state
            of link, server and device. Or a fixed cut: the name of the last layer that runs on the device, the index of
            a partition point, a ``PartitionPoint`` of this model, or ``"device"`` or ``"server"`` for everything on one
            side.
        objective: what ``"auto"`` minimizes: ``"latency"``, ``"energy"``, …, an ``Objective``, or
            ``Objective.battery(level)``. Energy needs a device profile with joules, given or metered, and a ``link``
            with a radio. If these turn out to be missing, latency is minimized, with one ``UnknownEnergyWarning``.
        codecs: measured codecs, for ``"auto"`` to choose among. Lossy ones are used only where they kept an accuracy
            budget. Without this argument everything is sent under ``codec``.
        fallback: ``"local"`` to let the device answer when no server does, ``"error"`` to raise.
        deadline_s: the seconds after a call within which its answer is due; see ``deadline()``.
        on_replan: a function that is called with the ``Decision`` when ``"auto"`` changes the cut.
        link: the link, if it is known. Otherwise ``"auto"`` measures it.
        device_profile: the layer times of this device, if they are known. Otherwise ``"auto"`` measures them.
        server_profile: the layer times of the server, if they are known. Otherwise ``"auto"`` asks the server.
        codec: the codec of the boundary tensors: ``"raw"``, ``"zstd"``, or a lossy one such as ``"int8+zstd"``, with
            which the answer is no longer the model's own. ``"auto"`` takes whichever of ``raw`` and ``zstd`` is quicker
            from end to end. May be assigned later.
        answer_codec: the codec in which the server is asked to answer.
        compile: True to compile heads and tails with ``torch.compile``, or the name of one of its backends. Answers
            then equal the model's own to within rounding.
        backend: instead of ``compile``, a function from a module (a head, or a tail that runs on the device) to the
            callable that runs it. By default, modules run in eager PyTorch.
        exact: True to use only answers that have the model's own bits for certain. A server whose processor, number of
            threads, PyTorch or settings differ from this device's is then not asked, as if it held another model.
            docs/runtime.md lists what is compared. By default such answers, which are the same to rounding, are used,
            and ``last.bits`` says so.
        timeout_s: the longest that a server may take for one inference.
        leaf_modules: modules to keep whole, as ``trace()`` takes them.

    Attributes:
        model: the model. Another may be assigned: it is traced at once, and answers from then on.
        name: the model's name on the server.
        exact: as given.
        deadline_s: as given; may be assigned.

    Raises:
        TraceError: the model cannot be traced. With ``fallback="error"``, calls raise it, too, when the model has been
            put into training mode or has got other code, submodules, hooks or attributes since it was traced. With
            ``fallback="local"`` the model itself then answers, with one ``ChangedModelWarning``, until it has been
            traced anew (docs/runtime.md says when).
        PlanError: ``fallback`` is neither ``"local"`` nor ``"error"``, or energy is to be saved with a given profile or
            link that does not tell it.
        BackendError: both ``compile`` and ``backend`` are given, ``torch.compile`` has no such backend,
            ``backend`` is no function, or one of them is given with ``exact``.
        CodecError: there is no such codec, ``codecs`` is no measured table, or a codec is lossy and ``exact`` is given.
        LinkError: ``link`` is no ``Link``.
        ProfileError: a profile is no ``LayerProfile``.
        AdaptError: ``timeout_s`` is not a positive number.
        DeadlineError: ``deadline_s`` is not a positive number.
        ServerUnavailableError: no server is given, and ``partition`` needs one. With ``fallback="error"``, calls raise
            it when no server answers.
        ModelMismatchError: raised by calls with ``fallback="error"`` when the server holds another model. With
            ``fallback="local"`` there is one ``MismatchWarning`` instead.
        ArithmeticMismatchError: likewise, when the server holds the same model, but cannot give the same bits, and
            ``exact`` is given. It is a ``ModelMismatchError``.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        server: ServerAddress | Sequence[ServerAddress] | None = None,
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
        exact: bool = False,
        timeout_s: float = 30.0,
        leaf_modules: Sequence[str | type[nn.Module]] = (),
    ) -> None:
        super().__init__()
        if fallback not in ("local", "error"):
            raise PlanError(
                f'fallback must be "local", for the device to answer, or "error", to raise; got {short(fallback)}'
            )
        if compile and backend is not None:
            raise BackendError("compile= and backend= both say what runs the heads and tails; give only one of them")
        if deadline_s is not None:
            check_deadline(deadline_s, 0.0, "")
        if not (is_finite(timeout_s) and timeout_s > 0):
            raise AdaptError(f"timeout_s must be a positive number of seconds; got {short(timeout_s)}")
        if backend is not None and not callable(backend):
            raise BackendError(
                f"backend must be a function from a module to what runs it; got {short(backend)}; compile= takes the "
                "name of a backend of torch.compile"
            )
        _check_measured(link, device_profile, server_profile, codecs)
        if exact:
            _check_exact((codec, answer_codec), codecs, compiled=bool(compile) or backend is not None)
        self.training = False
        self.model = model
        args, kwargs = call_of(example)
        graph = trace(model, *args, leaf_modules=leaf_modules, **kwargs)
        self.name = name
        self.exact = exact
        self.deadline_s = deadline_s
        given = [server] if isinstance(server, (str, Transport)) else _addresses(server)
        self._engine = Engine(
            graph,
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
                exact=exact,
                leaf_modules=leaf_modules,
            ),
        )
        # Ends the threads of a module that is collected without having been closed.
        self._end = weakref.finalize(self, self._engine.abandon)
        self.partition = partition

    # --- the model ---

    @property
    def graph(self) -> LayerGraph:
        """The traced model. It is another one once the model has changed and has been traced anew."""
        return self._engine.graph

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model" and "_engine" in self.__dict__:
            self._replace_engine(_a_model(value), wanted=True)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "model":
            raise TraceError(
                "a SplitModule cannot be without a model; assign another to split.model, or close and drop the "
                "SplitModule"
            )
        super().__delattr__(name)

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
                if wanted:
                    raise
                changes.refused(error)
                return
            changes.traced()
            self._end.detach()
            self._engine, self._end = engine, weakref.finalize(self, engine.abandon)

    # --- where to cut ---

    @property
    def partition(self) -> PartitionPoint | None:
        """The partition point in use; None before ``"auto"`` has chosen. Assign whatever the constructor takes."""
        return self._engine.servers.point

    @partition.setter
    def partition(self, wanted: str | int | PartitionPoint) -> None:
        choice = None if wanted == "auto" else self.graph.point(wanted)
        if not self._engine.servers.peers and (choice is None or choice != self.graph.points[-1]):
            raise ServerUnavailableError(
                f'partition {short(wanted)} needs a server: give server="http://host:port", or partition="device"'
            )
        self._engine.fix(choice)

    @property
    def codec(self) -> Codec | Lossless:
        """The codec of the boundary tensors. Assign its name.

        Raises:
            CodecError: there is no codec of the assigned name, or it is lossy and the module is exact.
        """
        return self._engine.codec

    @codec.setter
    def codec(self, wanted: str | Codec | Lossless) -> None:
        if self.exact:
            _check_exact((str(wanted),), None, compiled=False)
        self._engine.codec = _codec(str(wanted))

    @property
    def link(self) -> Link | None:
        """The link as given, or as first measured; None before that. ``stats()`` tells its present state."""
        return self._engine.servers.link

    @property
    def device_profile(self) -> LayerProfile | None:
        """Layer times of this device, as given or measured; None before that."""
        return self._engine.times.profile

    @property
    def server_profile(self) -> LayerProfile | None:
        """Layer times of the first server, as given or as it sent them; None before that."""
        return next((peer.profile for peer in self._engine.servers.peers), None)

    # --- running ---

    def prepare(self) -> SplitModule:
        """Do now what the first call would do before its inference, and return the module.

        A model that has changed since it was traced is traced anew.

        Raises:
            ServerError: with ``fallback="error"``, no server could be made ready.
            TraceError: the model has changed, and cannot be traced any more.
            PartitionError: with ``fallback="error"``, the model has changed, and cannot be cut there any more.
        """
        if self._engine.local.departed() is not None:
            self._replace_engine(self.model, wanted=True)
        self._engine.prepare()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for this call."""
        deadline_s = self._deadline_now()
        if self._engine.changes.noticed and deadline_s is None:
            self._replace_engine(self.model, wanted=False)
        engine = self._engine
        with torch.no_grad():
            return engine.run(ModelCall(engine.parts, args, kwargs), deadline_s)

    def map(self, calls: Iterable[Any], depth: int = 4) -> Iterator[Any]:
        """Yield the answers to ``calls``, in their order, while up to ``depth`` of them are in flight.

        The head of one call runs while those before it are on the uplink or on the server. What counts in a stream is
        how many answers come in a second. So where the objective is latency, ``"auto"`` chooses the cut with the
        highest rate of answers. A deadline counts from the moment at which a call's head begins.

        Args:
            calls: each what the constructor takes as an example: a tensor, a tuple or a dict. The iterator takes the
                next call as soon as fewer than ``depth`` are in flight. It copies the call's tensors at that moment, so
                that the caller may overwrite them afterwards.
            depth: how many calls may be in flight, 1 to 16.

        Raises:
            AdaptError: the depth is not within 1 to 16.
            TypeError: ``calls`` is a single call.
            Exception: whatever ``calls`` or a call raises, after the answers before it; it ends the iterator. Closing
                the iterator gives up the calls in flight.
        """
        if isinstance(calls, (torch.Tensor, Mapping)):
            raise TypeError(
                f"map takes an iterable of calls; got one {type(calls).__name__}. Give a list of tensors, tuples or "
                "dicts, or batch.split(1) for one call per sample"
            )
        self._engine.stream()  # raises if the module has been closed
        deadline_s = self._deadline_now()
        return in_order((self._beginning(*call_of(call), deadline_s, True) for call in calls), depth)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return the future answer of a call that runs in other threads.

        The call's tensors are copied before this returns. Heads run one after the other. Up to 16 calls are in flight;
        further ones wait, and can be cancelled meanwhile. A deadline counts from the beginning of the call's head.

        Args:
            *args: the call's positional arguments.
            **kwargs: its keyword arguments.

        Raises:
            ServerUnavailableError: the module has been closed.
        """
        return self._engine.stream().submit(self._beginning(args, kwargs, self._deadline_now(), False))

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's answer to this call without blocking the event loop; otherwise like ``submit()``."""
        return await asyncio.wrap_future(self.submit(*args, **kwargs))

    def _beginning(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], deadline_s: float | None, streamed: bool
    ) -> Callable[[], Pending | Done]:
        """Return the function that begins a call in another thread, with its own copy of the call's tensors."""
        if streamed and self._engine.changes.noticed and deadline_s is None:
            self._replace_engine(self.model, wanted=False)
        engine = self._engine
        # Copied, because a camera's buffer may hold the next frame before this one has been sent.
        args, kwargs = pytree.tree_map_only(torch.Tensor, _copied, (args, dict(kwargs)))
        work = ModelCall(engine.parts, args, kwargs)
        return functools.partial(engine.started, work, deadline_s, streamed=streamed)

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
        with torch.no_grad():
            return tuple(engine.run(TailCall(engine.parts, names, tensors)))

    @contextlib.contextmanager
    def deadline(self, deadline_s: float | None) -> Iterator[None]:
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

    def __enter__(self) -> SplitModule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- being an nn.Module ---

    def train(self, mode: bool = True) -> SplitModule:
        """Stay in evaluation mode, whatever ``mode`` says, as a frozen part of a larger module that is trained."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> SplitModule:
        self._engine.moved(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a SplitModule holds connections, so it is neither copied nor saved; copy or save its .model, and wrap that"
        )

    def extra_repr(self) -> str:
        """Return the model's name and the cut, for ``repr``."""
        where = self.partition.name if self.partition is not None else "auto"
        return f"name={self.name!r}, partition={where!r}"


@torch.no_grad()
def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return same_layout(tensor)


def _a_model(value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TraceError(
            f"split.model must be an nn.Module in evaluation mode; got {short(value)}; to end a SplitModule, close and "
            "drop it"
        )
    return value


def _addresses(servers: object) -> Sequence[ServerAddress]:
    found = [] if servers is None else servers
    if not isinstance(found, Sequence) or not all(isinstance(one, (str, Transport)) for one in found):
        raise ServerUnavailableError(
            'server must be a URL such as "http://127.0.0.1:8000", a Transport, or a list of these; got '
            f"{short(servers)}"
        )
    return found


def _check_measured(link: object, device: object, server: object, codecs: object) -> None:
    """Raise where an argument that was measured beforehand is of another type, such as the name of its file."""
    if not isinstance(link, Link | None):
        raise LinkError(f'link must be a Link; got {short(link)}; Link.parse() makes one of a text such as "lte"')
    for name, profile in (("device_profile", device), ("server_profile", server)):
        if not isinstance(profile, LayerProfile | None):
            raise ProfileError(
                f"{name} must be a LayerProfile; got {short(profile)}; LayerProfile.load() reads one from a file"
            )
    if not isinstance(codecs, CodecTable | None):
        raise CodecError(f"codecs must be a measured CodecTable; got {short(codecs)}; codec= takes the name of a codec")


def _check_exact(names: Sequence[str], table: CodecTable | None, *, compiled: bool) -> None:
    """Raise where an argument changes the bits of answers, although the module is to be exact."""
    if compiled:
        raise BackendError(
            "compile= and backend= run the heads and tails in another way than the model, so that answers are the same "
            "to rounding only; leave them out, or leave out exact=True"
        )
    lossy = [name for name in names if name != Lossless.name and not find_codec(name).lossless]
    if table is not None:
        lossy += {row.cost.codec for row in table.rows if row.cost.within_budget and not row.cost.lossless}
    if lossy:
        raise CodecError(
            f"exact=True asks for the model's own bits, and codecs change them: {', '.join(sorted(lossy))[:200]}. "
            'Take "raw", "zstd" or "auto", a table measured without an accuracy budget, or leave out exact=True'
        )


def _codec(name: str) -> Codec | Lossless:
    if isinstance(name, CodecTable):
        raise CodecError('codec takes a name such as "int8+zstd"; give a measured table as codecs=')
    return Lossless() if name == Lossless.name else find_codec(name)
