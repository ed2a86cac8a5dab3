"""Heads, middles and tails of one model, each cut when it is first asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends import Backend as NamedBackend
from torchsurgeon.backends import BuiltPart, Part
from torchsurgeon.codec.fitted import FittedCodec
from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import PartitionError
from torchsurgeon.models.watching import WatchedWeights
from torchsurgeon.runtime.auto import AutoBackend
from torchsurgeon.runtime.compiled import Compiled
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec

# Parts hold no weights of their own, so this only bounds what a long run over many cuts leaves behind.
_MOST_PARTS = 512

Backend = Callable[[nn.Module], Callable[..., Any]] | NamedBackend | AutoBackend
Run = Callable[..., Any]
T = TypeVar("T")


class Tail:
    """The rest of the model after some tensors, run on this device.

    Args:
        segment: the part.
        run: what runs it; None for eager PyTorch.
    """

    def __init__(self, segment: Segment, run: Run | None) -> None:
        self._segment, self._run = segment, run

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the model returns."""
        return self._segment(*tensors) if self._run is None else self._run(*tensors)

    def until(self, stopped: Callable[[], bool], tensors: Sequence[Tensor]) -> Any:
        """Return what the model returns, or None if ``stopped()`` becomes true first.

        ``stopped`` is asked between two layers; under a backend, only before the first.
        """
        if self._run is None:
            return self._segment.until(stopped, tensors)
        return None if stopped() else self._run(*tensors)

    @property
    def tried(self) -> bool:
        """Whether nothing is left to compile."""
        return not isinstance(self._run, Compiled | _Built) or self._run.tried

    @property
    def outdated(self) -> bool:
        """Whether a call has found that the weights have changed since a backend built it."""
        return isinstance(self._run, _Built) and self._run.outdated

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Compile it for tensors like these, if its backend compiles."""
        if isinstance(self._run, Compiled | _Built):
            self._run.compile(*tensors)


class _Built:
    """A head, a tail or the whole model that a backend runs, called as PyTorch's part of the model is called.

    Args:
        built: the part as the backend runs it.
        flatten: turns the arguments of a call into the part's tensors; None where these are the arguments.
        result: turns the part's results into what the call returns; None where these are returned, as a tuple.
        otherwise: answers calls for which the trace does not hold, and the one that finds the weights changed; where it
            is None, the former raise ``TypeError``, and eager PyTorch runs the part for the latter.
    """

    def __init__(
        self,
        built: BuiltPart,
        flatten: Callable[..., Sequence[Tensor]] | None = None,
        result: Run | None = None,
        otherwise: Run | None = None,
    ) -> None:
        self._built, self._flatten, self._result, self._otherwise = built, flatten, result, otherwise

    @property
    def tried(self) -> bool:
        return self._built.tried

    @property
    def runs_by(self) -> str:
        """The name of the backend that runs it now."""
        built = self._built
        return built.backend.name if built.tried and built.reason is None and not built.outdated else "eager"

    @property
    def outdated(self) -> bool:
        """Whether a call has found that the weights have changed since the backend built it."""
        return self._built.outdated

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have the backend build it for calls like this one, if that has not been tried."""
        self._built.build(*(args if self._flatten is None else self._flatten(args, kwargs)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            tensors = args if self._flatten is None else self._flatten(args, kwargs)
        except TypeError as error:
            if self._otherwise is None or by_signal_handler(error):
                raise
            return self._otherwise(*args, **kwargs)
        found = self._built(*tensors)
        if self._built.outdated and self._otherwise is not None:
            # The part keeps a parameter that was replaced.
            return self._otherwise(*args, **kwargs)
        return tuple(found) if self._result is None else self._result(*found)


class _Middle:
    """What lies between two cuts, run by a backend once a thread has built it for the first call's tensors.

    A machine in the middle of a chain answers requests, so no call waits until it is built.
    """

    def __init__(self, built: BuiltPart) -> None:
        self._built = built
        self._asked = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self._asked:
            # Two threads may both ask. It is built once.
            self._asked = True
            copies, threads = [tensor.clone() for tensor in tensors], torch.get_num_threads()
            thread = threading.Thread(
                target=self._build, args=(copies, threads), name="torchsurgeon-build", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # there can be no more threads
                thread.start()
        return tuple(self._built(*tensors))

    def _build(self, tensors: Sequence[Tensor], threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                self._built.build(*tensors)
        except Exception:
            # What the model raises for these tensors is told to whoever sent them. It is built for others later.
            self._asked = False


class Parts:
    """Heads, middles and tails of a traced model. Thread-safe.

    Args:
        graph: the traced model.
        backend: what runs the parts; None for eager PyTorch.
        watch: as ``BuiltPart`` takes it.

    Attributes:
        graph: the traced model.
        input_bytes: the bytes of the example's inputs.
        generation: is another number once parts may have to be built anew.
    """

    def __init__(
        self, graph: LayerGraph, backend: Backend | None, watch: Callable[[], WatchedWeights] | None = None
    ) -> None:
        if isinstance(backend, NamedBackend):
            backend.check(graph)
        self.graph = graph
        self.input_bytes = sum(spec.size_bytes for spec in graph.inputs)
        self.generation = 0
        self._backend, self._watch = backend, watch
        # Every call asks what the backend is, and the class of one is an abstract one, which takes long to tell.
        self._auto = backend if isinstance(backend, AutoBackend) else None
        self._named = backend if isinstance(backend, NamedBackend) else None
        self._known: dict[Any, Any] = {}
        # Which reasons of the backend the user has been told, for all parts together.
        self._said: set[str] = set()

    @property
    def stoppable(self) -> bool:
        """Whether a tail can be stopped midway, when its answer is no longer wanted."""
        return self._backend is None

    @property
    def exported(self) -> bool:
        """Whether even the whole model runs as it was traced, and not by the model's own code."""
        return self._named is not None or self._auto is not None

    @property
    def auto(self) -> AutoBackend | None:
        """What chooses the backend of each part; None where there is no choice."""
        return self._auto

    @property
    def backends(self) -> tuple[NamedBackend, ...]:
        """The backends of torchsurgeon that may run parts, besides eager PyTorch."""
        if self._auto is not None:
            return tuple(self._auto.candidates.values())
        return () if self._named is None else (self._named,)

    def clear(self) -> None:
        """Forget all parts, so that they are cut again; for a model whose tensors were replaced."""
        self._known.clear()
        self.generation += 1

    def whole(self) -> Run:
        """Return the whole model, as the backend runs it."""
        graph = self.graph
        named = self._of_head(graph.points[-1])

        def make() -> Run:
            if named is not None:
                part = BuiltPart(Part.head(graph, graph.points[-1]), named, self._said, self._watch)
                return _Built(part, graph.tensors_of_call, self._build_output, otherwise=graph.model)
            own = self._own
            return graph.model if own is None else own(graph.model)

        return self._get(("whole", _name(named)), make)

    def head(self, point: PartitionPoint, student: FittedCodec | None = None) -> Run:
        """Return the head, which is called like the model and returns the boundary tensors of ``point``.

        Args:
            point: where the model is cut.
            student: the codec whose student is the head, in place of the model's own layers. Where backends are chosen,
                that of the whole model runs it.
        """
        named = self._of_head(point if student is None else self.graph.points[-1])
        if student is not None and student.student is not None:
            key: tuple[Any, ...] = "student", student.name, _name(named)
            return self._get(key, lambda: self._made_student(student, point, named))
        key = *point.place, _name(named)
        # It is asked for at every inference, so what would make one is not even prepared where it is known.
        found = self._known.get(key)
        return self._get(key, lambda: self._made_head(point, named)) if found is None else found

    def _made_head(self, point: PartitionPoint, named: NamedBackend | None) -> Run:
        if named is not None:
            part = BuiltPart(Part.head(self.graph, point), named, self._said, self._watch)
            return _Built(part, self.graph.tensors_of_call)
        head, own = cut(self.graph, point).head, self._own
        return head if own is None else own(head)

    def _made_student(self, student: FittedCodec, point: PartitionPoint, named: NamedBackend | None) -> Run:
        assert student.student is not None
        if named is not None:
            segment = student.student.segment(self.graph, point.index)
            part = BuiltPart(Part.student(self.graph, point, segment), named, self._said, self._watch)
            return _Built(part, self.graph.tensors_of_call)
        module, own = student.student.module(self.graph, point.index), self._own
        return module if own is None else own(module)

    def tail(self, names: tuple[str, ...], *, flat: bool = False) -> Tail:
        """Return the rest of the model after the tensors ``names``; ``flat`` is that of ``tail_for()``."""
        named, own = self._of_tail(names), self._own

        def make() -> Tail:
            segment = tail_for(self.graph, names, flat=flat)
            if named is not None:
                part = BuiltPart(Part.tail(self.graph, names), named, self._said, self._watch)
                return Tail(segment, _Built(part, result=None if flat else self._build_output))
            return Tail(segment, None if own is None else own(segment))

        return self._get(("tail", names, flat, _name(named)), make)

    def ready(self, point: PartitionPoint, student: FittedCodec | None = None) -> bool:
        """Return whether the head of a point, or the whole model at the last one, runs by its backend already."""
        if self._backend is None:
            return True
        head = self.whole() if point == self.graph.points[-1] else self.head(point, student)
        return not isinstance(head, Compiled | _Built) or head.tried

    def backend_of(self, point: PartitionPoint, student: FittedCodec | None = None) -> str:
        """Return what runs the head of a point, or the whole model at the last one, as ``Inference.backend`` says it.

        A part that its backend has not built yet, or does not take, runs in eager PyTorch.
        """
        if not self.exported:
            return "eager" if self._backend is None else "own"
        head = self.whole() if point == self.graph.points[-1] else self.head(point, student)
        return head.runs_by if isinstance(head, _Built) else "eager"

    def compile(
        self,
        point: PartitionPoint,
        example: tuple[tuple[Any, ...], Mapping[str, Any]],
        student: FittedCodec | None = None,
    ) -> None:
        """Compile head and tail of ``point`` for calls like ``example``, if the backend compiles and has not yet.

        What was built before the weights changed is built anew.
        """
        head, tail = self._ends(point, student)
        if _outdated(head, tail):
            self.clear()
            head, tail = self._ends(point, student)
        args, kwargs = example
        if isinstance(head, Compiled | _Built) and not head.tried:
            head.compile(*args, **kwargs)
        if tail is not None and not tail.tried:
            tail.compile(head(*args, **kwargs) if student is None else self.graph.tensors_of_call(args, kwargs))

    def due(self, point: PartitionPoint, student: FittedCodec | None = None) -> bool:
        """Return whether head or tail of a point has to be built, for the first time or anew; asked at every call."""
        head, tail = self._ends(point, student)
        untried = isinstance(head, Compiled | _Built) and not head.tried
        return untried or (tail is not None and not tail.tried) or _outdated(head, tail)

    def forget_outdated(self, point: PartitionPoint, student: FittedCodec | None = None) -> bool:
        """Forget all parts if the weights have changed since head or tail of a point were built; return whether so."""
        if not _outdated(*self._ends(point, student)):
            return False
        self.clear()
        return True

    def _ends(self, point: PartitionPoint, student: FittedCodec | None) -> tuple[Run, Tail | None]:
        """Return what the device runs before the cut, and what it runs behind it where no answer comes.

        Behind a student it begins anew, so that is the whole model; at the last point nothing is behind.
        """
        if point == self.graph.points[-1]:
            return self.whole(), None
        behind = point.tensors if student is None else self.graph.inputs
        return self.head(point, student), self.tail(tuple(spec.name for spec in behind))

    def middle(self, names: tuple[str, ...], point: PartitionPoint) -> tuple[Run, tuple[TensorSpec, ...]]:
        """Return what turns the tensors ``names`` into those of ``point``, and the specs of its results.

        Tensors that lie beyond the point are passed on as they are. Where a backend is chosen among several, eager
        PyTorch runs it, since what it takes by each is not measured.
        """
        named = self._named

        def make() -> tuple[Run, tuple[TensorSpec, ...]]:
            try:
                part = Part.middle(self.graph, names, point)
            except PartitionError:
                return _passed_on, tuple(self.graph.values[name] for name in names)
            run = part.segment if named is None else _Middle(BuiltPart(part, named, self._said, self._watch))
            return run, point.tensors

        return self._get(("middle", names, *point.place), make)

    @property
    def _own(self) -> Callable[[nn.Module], Callable[..., Any]] | None:
        """The function of the user, or the compiler, that turns a module into what runs it; None without one."""
        if self._backend is None or isinstance(self._backend, NamedBackend | AutoBackend):
            return None
        return self._backend

    def _of_head(self, point: PartitionPoint) -> NamedBackend | None:
        return self._named if self._auto is None else self._auto.of_head(point)

    def _of_tail(self, names: tuple[str, ...]) -> NamedBackend | None:
        return self._named if self._auto is None else self._auto.of_tail(names)

    def _build_output(self, *tensors: Tensor) -> Any:
        """Return the model's result from its output tensors."""
        return self.graph.steps[-1].target.build(*tensors)

    def _get(self, key: Any, make: Callable[[], T]) -> T:
        found: T | None = self._known.get(key)
        if found is None:
            if len(self._known) >= _MOST_PARTS:
                self.clear()
            # Where two threads make it at once, both get the first: what one of them builds, the other runs.
            found = self._known.setdefault(key, make())
        return found


def _outdated(head: Run, tail: Tail | None) -> bool:
    """Return whether a call has found that the weights have changed since a backend built one of both."""
    return (isinstance(head, _Built) and head.outdated) or (tail is not None and tail.outdated)


def _name(backend: NamedBackend | None) -> str:
    return "" if backend is None else backend.name


def _passed_on(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors
