"""What one call computes, whatever the cut: the model's result from its inputs, or from tensors inside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from torchsurgeon.codec.fitted import FittedCodec
from torchsurgeon.runtime.parts import Parts, Run, Tail
from torchsurgeon.tracing.reading import PLAIN
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec
from torchsurgeon.tracing.structure import flatten


class Work(Protocol):
    """One call, which can be cut at any point.

    Attributes:
        whole_model: whether it begins with the model's inputs, so that all layers before a cut run here.
    """

    whole_model: bool

    def head(self, point: PartitionPoint, student: FittedCodec | None = None) -> Run:
        """Return a function without arguments that computes the tensors crossing at ``point``.

        Args:
            point: where the call is cut.
            student: the codec whose student computes them in place of the model's own layers, where the call begins
                with the model's inputs.
        """

    def crossing(self, point: PartitionPoint) -> tuple[TensorSpec, ...]:
        """Return the specs of the tensors crossing at ``point``."""

    def tail(self, names: tuple[str, ...]) -> Tail:
        """Return what computes the result from the tensors ``names``."""

    def anew(self) -> tuple[Tail, Sequence[Tensor]]:
        """Return what computes the result from the tensors that the call began with, and these tensors."""

    def whole(self) -> Run:
        """Return a function without arguments that computes the result."""

    def uncut(self) -> Run | None:
        """Return a function that calls the model itself, as it is now; None for a call that begins inside the model."""

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        """Return the result from the tensors of a server's answer."""

    def scale(self) -> float:
        """Return the call's bytes over the example's."""


class ModelCall:
    """A call of the model with its arguments; the methods are those of ``Work``."""

    whole_model = True

    def __init__(self, parts: Parts, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._parts, self._args, self._kwargs = parts, args, kwargs
        self._scale = 0.0

    def head(self, point: PartitionPoint, student: FittedCodec | None = None) -> Run:
        run = self._parts.head(point, student)
        return lambda: run(*self._args, **self._kwargs)

    def crossing(self, point: PartitionPoint) -> tuple[TensorSpec, ...]:
        return point.tensors

    def tail(self, names: tuple[str, ...]) -> Tail:
        return self._parts.tail(names)

    def anew(self) -> tuple[Tail, Sequence[Tensor]]:
        graph = self._parts.graph
        names = tuple(spec.name for spec in graph.inputs)
        return self._parts.tail(names), graph.tensors_of_call(self._args, self._kwargs)

    def whole(self) -> Run:
        run = self._parts.whole()
        return lambda: run(*self._args, **self._kwargs)

    def uncut(self) -> Run | None:
        return lambda: self._parts.graph.model(*self._args, **self._kwargs)

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        return self._parts.graph.unflatten_output(outputs)

    def scale(self) -> float:
        if not self._scale:
            size_bytes = 0
            for value in (*self._args, *self._kwargs.values()):
                if isinstance(value, Tensor):
                    size_bytes += value.nbytes
                elif not isinstance(value, PLAIN):
                    size_bytes += sum(one.nbytes for _, one in flatten(value)[0] if isinstance(one, Tensor))
            self._scale = _ratio(size_bytes, self._parts.input_bytes)
        return self._scale


class TailCall:
    """The rest of the model after the tensors ``names``; the methods are those of ``Work``.

    Its result is a tuple in the order of the graph's outputs.
    """

    whole_model = False

    def __init__(self, parts: Parts, names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
        self._parts, self._names, self._tensors = parts, names, tensors

    def head(self, point: PartitionPoint, student: FittedCodec | None = None) -> Run:
        run, _ = self._parts.middle(self._names, point)
        return lambda: run(*self._tensors)

    def crossing(self, point: PartitionPoint) -> tuple[TensorSpec, ...]:
        return self._parts.middle(self._names, point)[1]

    def tail(self, names: tuple[str, ...]) -> Tail:
        return self._parts.tail(names, flat=True)

    def anew(self) -> tuple[Tail, Sequence[Tensor]]:
        return self._parts.tail(self._names, flat=True), self._tensors

    def whole(self) -> Run:
        run = self._parts.tail(self._names, flat=True)
        return lambda: run(self._tensors)

    def uncut(self) -> Run | None:
        return None

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        return tuple(outputs[spec.name] for spec in self._parts.graph.outputs)

    def scale(self) -> float:
        graph = self._parts.graph
        example = sum(graph.values[name].size_bytes for name in self._names)
        return _ratio(sum(tensor.nbytes for tensor in self._tensors), example)


def _ratio(size_bytes: int, example_bytes: int) -> float:
    return size_bytes / example_bytes if size_bytes and example_bytes else 1.0
