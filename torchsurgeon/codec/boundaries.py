"""One walk through a model for all calls of a sample: what crosses at each point, and the answers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchsurgeon.accuracy.scores import likeness
from torchsurgeon.cutting.partition import middle_for, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import PartitionError
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec

# As many calls run together at most. On a CPU, more of them gain nothing (measured on EfficientNet-Lite0).
_TOGETHER, _TOGETHER_ON_GPU = 16, 64
# The largest tensor of a batch takes at most this much.
_MOST_BYTES = 256 << 20
# Calls that run together give the same answers but for rounding. This tells rounding from a mistake.
_ALIKE = 0.999


class Walk:
    """Goes with all calls from point to point, so that the first layers run once and not once for each point.

    Args:
        graph: the traced model.
        calls: the input tensors of each call, in the order of ``graph.inputs``.

    Attributes:
        point: where it is; at first the point at which the inputs cross.
        boundaries: the boundary tensors of each call at that point.
        calls: the input tensors of each call.
    """

    def __init__(self, graph: LayerGraph, calls: Sequence[Sequence[Tensor]]) -> None:
        self.graph, self.calls = graph, calls
        self.point = graph.points[0]
        self.boundaries: list[list[Tensor]] = [list(call) for call in calls]
        self._whole = tail_for(graph, _names(self.point), flat=True)
        # By number of calls, the first so many of them as one call, at the point where these were needed last.
        self._joined: dict[int, tuple[PartitionPoint, list[Tensor]]] = {}

    def answers(self) -> Iterator[dict[str, Tensor]]:
        """Give the model's own answer to each call, by name."""
        for call in self.calls:
            yield named(self.graph.outputs, self._whole(*call))

    def to(self, point: PartitionPoint) -> list[list[Tensor]]:
        """Go on to ``point``, which lies behind the last one, and return its boundary tensors for each call."""
        head = middle_for(self.graph, _names(self.graph.points[0]), point)
        middle = self._between(self.point, point)
        if middle is None or not _same(middle, self.boundaries[0], head, self.calls[0]):
            middle, self.boundaries = head, [list(call) for call in self.calls]
        for i, tensors in enumerate(self.boundaries):
            self.boundaries[i] = list(middle(*tensors))
        self.point = point
        return self.boundaries

    def joined(self, count: int) -> list[Tensor]:
        """Return the boundary tensors of the first ``count`` calls as those of one call."""
        start = self.graph.points[0]
        point, tensors = self._joined.get(count, (start, []))
        middle = self._between(point, self.point)
        if not tensors or middle is None:
            pairs = zip(start.tensors, zip(*self.calls[:count], strict=True), strict=True)
            tensors = [some[0] if (dim := batch_dim(spec)) is None else torch.cat(some, dim) for spec, some in pairs]
            middle = middle_for(self.graph, _names(start), self.point)
        tensors = list(middle(*tensors))
        self._joined[count] = self.point, tensors
        return tensors

    def _between(self, point: PartitionPoint, other: PartitionPoint) -> Segment | None:
        """Return what leads from one point to a later one.

        It is None where only the inputs do: where a view crosses at the first and what it is a view of at the second.
        """
        try:
            return middle_for(self.graph, _names(point), other)
        except PartitionError:
            return None


class Tails:
    """Answers several calls from their boundary tensors, together where the model takes batches of any size.

    Args:
        walk: where the model is cut, and what crosses there.
        answers: the model's own answers. They show whether calls can be joined at this point.
    """

    def __init__(self, walk: Walk, answers: Sequence[dict[str, Tensor]]) -> None:
        self._walk, self._graph, self._point = walk, walk.graph, walk.point
        self._tail = tail_for(walk.graph, _names(walk.point), flat=True)
        self._numbers: dict[int, list[Tensor]] = {}
        self.together = self._most_together(walk.boundaries)
        if self.together > 1 and not self._joins(walk.boundaries, answers):
            self.together = 1

    def __call__(self, boundaries: Sequence[Sequence[Tensor]]) -> list[dict[str, Tensor]]:
        """Return the answer behind the boundary tensors of each call, by name."""
        answers = []
        left = list(boundaries)
        while left:
            # Few sizes occur, so that the numbers among the tensors are found for few of them.
            count = min(self.together, 1 << (len(left).bit_length() - 1))
            some, left = left[:count], left[count:]
            answers += self._together(some) if count > 1 else [self._alone(some[0])]
        return answers

    def _alone(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return named(self._graph.outputs, self._tail(*tensors))

    def _together(self, boundaries: Sequence[Sequence[Tensor]]) -> list[dict[str, Tensor]]:
        numbers = self._numbers_for(len(boundaries))
        joined = []
        for i, spec in enumerate(self._point.tensors):
            dim = batch_dim(spec)
            joined.append(numbers[i] if dim is None else torch.cat([one[i] for one in boundaries], dim))
        outputs = self._tail(*joined)
        dims = map(batch_dim, self._graph.outputs)
        parts = [output.chunk(len(boundaries), dim) for output, dim in zip(outputs, dims, strict=True)]
        return [named(self._graph.outputs, one) for one in zip(*parts, strict=True)]

    def _numbers_for(self, count: int) -> list[Tensor]:
        """Return the boundary tensors of ``count`` joined calls; only those are read that have no batch dimension.

        Such a tensor may hold the batch size, so those of a single call do not fit.
        """
        if count not in self._numbers:
            any_number = any(batch_dim(spec) is None for spec in self._point.tensors)
            self._numbers[count] = self._walk.joined(count) if any_number else []
        return self._numbers[count]

    def _most_together(self, boundaries: Sequence[Sequence[Tensor]]) -> int:
        """Return how many calls may run together; 1 where the model's batch or that of a tensor is not free."""
        graph = self._graph
        # Without a batch dimension, only what no codec and no call changes can be taken from another run.
        for i, spec in enumerate(self._point.tensors):
            if batch_dim(spec) is None and (
                spec.dtype.is_floating_point
                or spec.dtype.is_complex
                or not all(torch.equal(one[i], boundaries[0][i]) for one in boundaries)
            ):
                return 1
        if not graph.batch_free or any(batch_dim(spec) is None for spec in graph.outputs):
            return 1
        largest = max((s.size_bytes for layer in graph.layers[self._point.index :] for s in layer.outputs), default=1)
        on_gpu = boundaries[0] and boundaries[0][0].is_cuda
        most = min(_TOGETHER_ON_GPU if on_gpu else _TOGETHER, _MOST_BYTES // max(1, largest), len(boundaries))
        return 1 << max(0, most.bit_length() - 1)

    def _joins(self, boundaries: Sequence[Sequence[Tensor]], answers: Sequence[dict[str, Tensor]]) -> bool:
        """Return whether two calls that run together get their own answers."""
        try:
            found = self._together(boundaries[:2])
        except Exception:
            # What a model raises for a batch that it does not take can be anything.
            return False
        return all(
            [one.shape for one in got.values()] == [one.shape for one in own.values()]
            and likeness(list(got.values()), list(own.values())) > _ALIKE
            for got, own in zip(found, answers[:2], strict=True)
        )


def _names(point: PartitionPoint) -> list[str]:
    return [spec.name for spec in point.tensors]


def _same(middle: Segment, tensors: Sequence[Tensor], head: Segment, inputs: Sequence[Tensor]) -> bool:
    """Return whether two parts of a model give the same from what each of them is given."""
    try:
        found = middle(*tensors)
    except Exception:
        # A part that begins with a piece of an opaque structure may fail, in any way, where it has to pass it on.
        return False
    return all(map(torch.equal, found, head(*inputs)))


def named(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of their specs."""
    return dict(zip((spec.name for spec in specs), tensors, strict=True))


def batch_dim(spec: TensorSpec) -> int | None:
    """Return the dimension that is the batch and nothing else but its multiple; None where there is no such one."""
    growing = [dim for dim, step in enumerate(spec.batch_step) if step]
    if len(growing) != 1 or spec.shape[growing[0]] != spec.batch_step[growing[0]] * spec.example_batch:
        return None
    return growing[0]
