"""What one call wants computed, whatever the cut: the model's result, or the rest of it from some tensors on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from torchsurgeon.runtime.parts import Parts, Run, Tail
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec


class Work(Protocol):
    """One call, to be cut anywhere."""

    def head(self, point: PartitionPoint) -> Run:
        """What computes the tensors that cross at ``point``; called without arguments."""

    def crossing(self, point: PartitionPoint) -> tuple[TensorSpec, ...]:
        """What these tensors are."""

    def tail(self, names: tuple[str, ...]) -> Tail:
        """What computes the result from these tensors."""

    def whole(self) -> Run:
        """What computes the result; called without arguments."""

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        """The result, from the tensors of a server's answer."""

    def scale(self) -> float:
        """How many times the example's bytes the call has."""


class ModelCall:
    """A call of the model with its arguments."""

    def __init__(self, parts: Parts, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._parts, self._args, self._kwargs = parts, args, kwargs

    def head(self, point: PartitionPoint) -> Run:
        run = self._parts.head(point)
        return lambda: run(*self._args, **self._kwargs)

    def crossing(self, point: PartitionPoint) -> tuple[TensorSpec, ...]:
        return point.tensors

    def tail(self, names: tuple[str, ...]) -> Tail:
        return self._parts.tail(names)

    def whole(self) -> Run:
        run = self._parts.whole()
        return lambda: run(*self._args, **self._kwargs)

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        return self._parts.graph.unflatten_output(outputs)

    def scale(self) -> float:
        given = (*self._args, *self._kwargs.values())
        size_bytes = sum(value.nbytes for value in given if isinstance(value, Tensor))
        return _ratio(size_bytes, self._parts.input_bytes)


class TailCall:
    """The rest of the model from the tensors ``names`` on; the result is a tuple in the order of the outputs."""

    def __init__(self, parts: Parts, names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
        self._parts, self._names, self._tensors = parts, names, tensors

    def head(self, point: PartitionPoint) -> Run:
        run, _ = self._parts.middle(self._names, point)
        return lambda: run(*self._tensors)

    def crossing(self, point: PartitionPoint) -> tuple[TensorSpec, ...]:
        return self._parts.middle(self._names, point)[1]

    def tail(self, names: tuple[str, ...]) -> Tail:
        return self._parts.tail(names, flat=True)

    def whole(self) -> Run:
        run = self._parts.tail(self._names, flat=True)
        return lambda: run(self._tensors)

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        return tuple(outputs[spec.name] for spec in self._parts.graph.outputs)

    def scale(self) -> float:
        graph = self._parts.graph
        example = sum(graph.values[name].size_bytes for name in self._names)
        return _ratio(sum(tensor.nbytes for tensor in self._tensors), example)


def _ratio(size_bytes: int, example_bytes: int) -> float:
    return size_bytes / example_bytes if size_bytes and example_bytes else 1.0
