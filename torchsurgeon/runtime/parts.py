"""Heads, middles and tails of one model, each cut when it is first asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from torchsurgeon.codec.fitted import FittedCodec
from torchsurgeon.cutting.partition import cut, middle_for, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import PartitionError
from torchsurgeon.runtime.compiled import Compiled
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec

# Parts hold no weights of their own, so this only bounds what a long run over many cuts leaves behind.
_MOST_PARTS = 512

Backend = Callable[[nn.Module], Callable[..., Any]]
Run = Callable[..., Any]
T = TypeVar("T")


class Tail:
    """The rest of the model after some tensors, run on this device.

    Args:
        segment: the part.
        backend: what makes the callable that runs it; None for eager PyTorch.
    """

    def __init__(self, segment: Segment, backend: Backend | None) -> None:
        self._segment = segment
        self._run: Run | None = None if backend is None else backend(segment)

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

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Compile it for tensors like these, if its backend compiles."""
        if isinstance(self._run, Compiled):
            self._run.compile(*tensors)


class Parts:
    """Heads, middles and tails of a traced model. Thread-safe.

    Attributes:
        graph: the traced model.
        input_bytes: the bytes of the example's inputs.
    """

    def __init__(self, graph: LayerGraph, backend: Backend | None) -> None:
        self.graph = graph
        self.input_bytes = sum(spec.size_bytes for spec in graph.inputs)
        self._backend = backend
        self._known: dict[Any, Any] = {}

    @property
    def stoppable(self) -> bool:
        """Whether a tail can be stopped midway, when its answer is no longer wanted."""
        return self._backend is None

    def clear(self) -> None:
        """Forget all parts, so that they are cut again; for a model whose tensors were replaced."""
        self._known.clear()

    def whole(self) -> Run:
        """Return the whole model, as the backend runs it."""
        return self._get("whole", lambda: self._with_backend(self.graph.model))

    def head(self, point: PartitionPoint, student: FittedCodec | None = None) -> Run:
        """Return the head, which is called like the model and returns the boundary tensors of ``point``.

        Args:
            point: where the model is cut.
            student: the codec whose student is the head, in place of the model's own layers.
        """
        if student is not None and student.student is not None:
            make = functools.partial(student.student.module, self.graph, point.index)
            return self._get(("student", student.name), lambda: self._with_backend(make()))
        return self._get((point.index, point.layers), lambda: self._with_backend(cut(self.graph, point).head))

    def tail(self, names: tuple[str, ...], *, flat: bool = False) -> Tail:
        """Return the rest of the model after the tensors ``names``; ``flat`` is that of ``tail_for()``."""
        return self._get(("tail", names, flat), lambda: Tail(tail_for(self.graph, names, flat=flat), self._backend))

    def compile(
        self,
        point: PartitionPoint,
        example: tuple[tuple[Any, ...], Mapping[str, Any]],
        student: FittedCodec | None = None,
    ) -> None:
        """Compile head and tail of ``point`` for calls like ``example``, if the backend compiles and has not yet."""
        head = self.whole() if point == self.graph.points[-1] else self.head(point, student)
        if isinstance(head, Compiled) and not head.tried:
            args, kwargs = example
            head.compile(*args, **kwargs)
            if head is not self._known.get("whole"):
                self.tail(tuple(spec.name for spec in point.tensors)).compile(head(*args, **kwargs))

    def middle(self, names: tuple[str, ...], point: PartitionPoint) -> tuple[Run, tuple[TensorSpec, ...]]:
        """Return what turns the tensors ``names`` into those of ``point``, and the specs of its results.

        Tensors that lie beyond the point are passed on as they are.
        """

        def make() -> tuple[Run, tuple[TensorSpec, ...]]:
            try:
                return middle_for(self.graph, names, point), point.tensors
            except PartitionError:
                return _passed_on, tuple(self.graph.values[name] for name in names)

        return self._get(("middle", names, point.index, point.layers), make)

    def _with_backend(self, module: nn.Module) -> Run:
        return module if self._backend is None else self._backend(module)

    def _get(self, key: Any, make: Callable[[], T]) -> T:
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MOST_PARTS:
                self._known.clear()
            found = self._known[key] = make()
        return found


def _passed_on(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors
