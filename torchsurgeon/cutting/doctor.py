"""Examine a model before it is split: how it was traced, what stayed whole and why, and where a cut can pay."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from torchsurgeon.cutting.partition import check_shapes, tail_for
from torchsurgeon.errors import PartitionError
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.tracing.structure import flatten
from torchsurgeon.tracing.tracer import trace

_MOST_BLOCKS = 24
_TOP = "(top level)"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What ``examine()`` found out about a model.

    Attributes:
        graph: the traced model.
        trace_s: seconds that tracing took.
        points_per_block: how many partition points lie in each block. A block is a module at such a depth of the
            module tree that at most 24 blocks are listed; a point lies in the block of the layer before it.
        worthwhile: the points that send fewer bytes than the input and than every earlier point. With a faster server,
            no other point between the two ends can have the lowest latency.
        too_big: how many points between the ends send more bytes than the input.
        free_sizes: by input, whether each of its dimensions may have another size than in the example.
        repeatable: whether two runs on the example gave the same bits.
        notes: the warnings that tracing gave.
    """

    graph: LayerGraph
    trace_s: float
    points_per_block: Mapping[str, int]
    worthwhile: tuple[PartitionPoint, ...]
    too_big: int
    free_sizes: Mapping[str, tuple[bool, ...]]
    repeatable: bool
    notes: tuple[str, ...]


def examine(
    model: nn.Module,
    *args: Any,
    leaf_modules: Collection[str | type[nn.Module]] = (),
    verify: bool = True,
    **kwargs: Any,
) -> Diagnosis:
    """Trace a model and find out what a user should know before splitting it. The model is run twice on the example.

    Args:
        model: the model, in eval mode.
        *args: the positional arguments that the model is called with.
        leaf_modules: modules to keep whole, as one layer each, by path or class.
        verify: whether to run the model and what was traced, and compare, as ``trace()`` does.
        **kwargs: the keyword arguments that the model is called with.

    Raises:
        TraceError: as ``trace()`` raises it.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begin = time.perf_counter()
        graph = trace(model, *args, leaf_modules=leaf_modules, verify=verify, **kwargs)
        trace_s = time.perf_counter() - begin
    inputs = graph.tensors_of_call(args, kwargs)
    start_bytes = graph.points[0].size_bytes
    between = graph.points[1:-1]
    return Diagnosis(
        graph,
        trace_s,
        _points_per_block(between),
        _worthwhile(between, start_bytes),
        sum(point.size_bytes > start_bytes for point in between),
        {spec.name: _free_sizes(graph, inputs, i) for i, spec in enumerate(graph.inputs)},
        _repeatable(model, args, kwargs),
        tuple(dict.fromkeys(str(warning.message) for warning in caught)),
    )


def _points_per_block(points: tuple[PartitionPoint, ...]) -> Mapping[str, int]:
    for depth in (3, 2, 1):
        blocks = Counter(".".join(point.name.split(".")[:-1][:depth]) or _TOP for point in points)
        if len(blocks) <= _MOST_BLOCKS:
            break
    return blocks


def _worthwhile(points: tuple[PartitionPoint, ...], start_bytes: int) -> tuple[PartitionPoint, ...]:
    found = []
    least = start_bytes
    for point in points:
        if point.size_bytes < least:
            least = point.size_bytes
            found.append(point)
    return tuple(found)


def _free_sizes(graph: LayerGraph, inputs: list[torch.Tensor], which: int) -> tuple[bool, ...]:
    """Return whether each dimension of one input may have another size.

    Each dimension is tried alone, with one more and with twice as many; the batch in all inputs together.
    """
    tail = tail_for(graph, [spec.name for spec in graph.inputs])
    names = [spec.name for spec in graph.inputs]
    batch = len({t.shape[0] if t.dim() else -1 for t in inputs}) == 1

    def works(dim: int, size: int) -> bool:
        def grown(i: int, tensor: torch.Tensor) -> torch.Tensor:
            if i != which and not (dim == 0 and batch):
                return tensor
            return tensor.new_empty([size if d == dim else n for d, n in enumerate(tensor.shape)])

        try:
            check_shapes(graph, tail, names, [grown(i, t) for i, t in enumerate(inputs)])
        except PartitionError:
            return False
        return True

    if graph.value_dependent:
        return (False,) * inputs[which].dim()
    return tuple(works(dim, 2 * n) and works(dim, n + 1) for dim, n in enumerate(inputs[which].shape))


def _repeatable(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    with torch.no_grad():
        first, second = (flatten(model(*args, **kwargs))[0] for _ in range(2))
    if len(first) != len(second):
        return False
    return all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for (_, a), (_, b) in zip(first, second, strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )
