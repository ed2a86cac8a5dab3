"""A part of a traced model as a backend takes it: tensors by name go in, tensors by name come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from torchsurgeon.cutting.partition import Head, between, cut, middle_for, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A head, a tail, what lies between two cuts, or a whole model.

    Attributes:
        graph: the traced model.
        segment: the part as a module, which takes ``inputs`` and returns the tuple of ``outputs``.
        inputs: the tensors that it takes.
        outputs: the tensors that it returns.
        numbers: the places of those inputs that carry a number of the model's Python code. What a backend builds has
            the example's numbers fixed in it.
        batch_free: whether the model takes other batch sizes than the example's.
        own: whether the segment consists of the model's own layers. A student's stand in their place.
    """

    graph: LayerGraph
    segment: Segment
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    numbers: frozenset[int]
    batch_free: bool
    own: bool = True

    @classmethod
    def head(cls, graph: LayerGraph, point: PartitionPoint) -> Part:
        """Return the part from the model's inputs to the boundary tensors of a point.

        Args:
            graph: the traced model.
            point: where it is cut; the last point for the whole model.
        """
        head = cut(graph, point).head
        assert isinstance(head, Head)
        return cls(graph, head.segment, graph.inputs, point.tensors, frozenset(), graph.batch_free)

    @classmethod
    def student(cls, graph: LayerGraph, point: PartitionPoint, segment: Segment) -> Part:
        """Return a student, which computes the boundary tensors of a point in place of the model's own layers.

        Args:
            graph: the traced model.
            point: where it is cut.
            segment: the student, which takes the model's input tensors.
        """
        return cls(graph, segment, graph.inputs, point.tensors, frozenset(), graph.batch_free, own=False)

    @classmethod
    def tail(cls, graph: LayerGraph, names: Sequence[str]) -> Part:
        """Return the part from named tensors to the model's output tensors.

        Args:
            graph: the traced model.
            names: the names of the tensors, in the order in which the part takes them.

        Raises:
            PartitionError: as ``tail_for()`` raises it.
        """
        return cls.of_tail(graph, names, tail_for(graph, names, flat=True))

    @classmethod
    def of_tail(cls, graph: LayerGraph, names: Sequence[str], segment: Segment) -> Part:
        """Return the part of a tail that has been cut already, with ``flat=True``.

        Args:
            graph: the traced model.
            names: the names of the tensors, in the order in which the tail takes them.
            segment: the tail.
        """
        return cls(graph, segment, _specs(graph, names), graph.outputs, _numbers(graph, names), graph.batch_free)

    @classmethod
    def middle(cls, graph: LayerGraph, names: Sequence[str], point: PartitionPoint) -> Part:
        """Return the part from named tensors to the boundary tensors of a point.

        Args:
            graph: the traced model.
            names: the names of the tensors, in the order in which the part takes them.
            point: where the part ends.

        Raises:
            PartitionError: as ``middle_for()`` raises it.
        """
        segment = middle_for(graph, names, point)
        return cls(graph, segment, _specs(graph, names), point.tensors, _numbers(graph, names), graph.batch_free)

    def before(self) -> Segment:
        """Return what computes this part's inputs from the model's inputs."""
        return between(self.graph, [spec.name for spec in self.graph.inputs], [spec.name for spec in self.inputs])

    def after(self) -> Segment | None:
        """Return what computes the model's output tensors from this part's outputs; None where these are the same."""
        if self.outputs == self.graph.outputs:
            return None
        return tail_for(self.graph, [spec.name for spec in self.outputs], flat=True)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of ``outputs``; one that is an input's too, since it is passed on, ends in ``:out``."""
        taken = {spec.name for spec in self.inputs}
        return tuple(f"{spec.name}:out" if spec.name in taken else spec.name for spec in self.outputs)

    @property
    def computed_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs without those that carry numbers."""
        return tuple(spec for i, spec in enumerate(self.inputs) if i not in self.numbers)

    def computed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors without those that carry numbers."""
        return [tensor for i, tensor in enumerate(tensors) if i not in self.numbers]

    def with_another_sample(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like these for a batch with one sample more, which repeats the first one."""
        return [self._grown(spec, tensor) for spec, tensor in zip(self.inputs, tensors, strict=True)]

    @staticmethod
    def _grown(spec: TensorSpec, tensor: Tensor) -> Tensor:
        for dim, step in enumerate(spec.batch_step):
            if step:
                size = tensor.shape[dim]
                places = torch.arange(size + step, device=tensor.device) % size
                tensor = tensor.index_select(dim, places)
        return tensor


def _specs(graph: LayerGraph, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    return tuple(graph.values[name] for name in names)


def _numbers(graph: LayerGraph, names: Sequence[str]) -> frozenset[int]:
    return frozenset(i for i, name in enumerate(names) if graph.value(name).restore is not None)
