"""Runs head and tail of a cut as if a network lay between them, and compares with the whole model bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from torchsurgeon.cutting.partition import cut
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.tracing.structure import flatten
from torchsurgeon.tracing.tracer import trace


def leaves(value: Any) -> list[Any]:
    return [leaf for _, leaf in flatten(value)[0]]


def copied(value: Any) -> Any:
    """``value`` with every tensor in memory of its own, of the same strides."""
    found, structure = flatten(value)
    return structure.rebuild({path: fresh(leaf) if isinstance(leaf, torch.Tensor) else leaf for path, leaf in found})


def is_dense(tensor: torch.Tensor) -> bool:
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """What the wire makes of a tensor: the same layout in other memory when dense, row-major otherwise."""
    if not is_dense(tensor):
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())


def layout(tensor: torch.Tensor) -> list[int]:
    """Strides, where they mean something."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def assert_same(actual: Any, expected: Any, where: str, *, strides: bool = True) -> None:
    ours, structure = flatten(actual)
    theirs, wanted = flatten(expected)
    assert structure == wanted, f"{where}: structure {structure} instead of {wanted}"
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        at = f"{where}, output {'.'.join(path)!r}"
        assert type(a) is type(b) or isinstance(b, nn.Parameter), f"{at}: {type(a)} instead of {type(b)}"
        if not isinstance(b, torch.Tensor):
            assert a == b, at
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{at}: {a.dtype} {a.shape} instead of {b.dtype} {b.shape}"
        assert torch.equal(bits(a), bits(b)), f"{at}: {(bits(a) != bits(b)).sum()} bytes of {bits(b).numel()} differ"
        if strides and is_dense(b):
            assert layout(a) == layout(b), f"{at}: strides {a.stride()} instead of {b.stride()}"


def check_point(
    graph: LayerGraph,
    point: PartitionPoint,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Any,
    batch: int | None,
) -> None:
    where = f"point {point.index} ({point.name})"
    partition = cut(graph, point)
    before = copied([args, dict(kwargs)])
    boundary = partition.head(*args, **kwargs)
    assert_same([args, dict(kwargs)], before, f"{where}, the head's inputs")
    assert isinstance(boundary, tuple)
    assert len(boundary) == len(point.tensors)
    for spec, tensor in zip(point.tensors, boundary, strict=True):
        shape = spec.shape if batch is None else spec.at_batch(batch)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, shape), (
            f"{where}: {spec} is {tensor.shape} {tensor.dtype}"
        )
    sent = [fresh(tensor) for tensor in boundary]
    kept = [fresh(tensor) for tensor in sent]
    output = partition.tail(*sent)
    assert_same(sent, kept, f"{where}, the tail's inputs")
    assert_same(output, expected, where, strides=all(map(is_dense, boundary)))


def check(
    model: nn.Module,
    *args: Any,
    batches: Iterable[tuple[Any, ...]] = (),
    points: slice = slice(None),
    leaf_modules: Iterable[Any] = (),
    at_least: int = 2,
    **kwargs: Any,
) -> LayerGraph:
    """Trace ``model`` and check ``points`` with the example and with each further call in ``batches``."""
    model.eval()
    with torch.no_grad():
        graph = trace(model, *args, leaf_modules=tuple(leaf_modules), **kwargs)
        assert len(graph.points) >= at_least, [p.index for p in graph.points]
        assert graph.points[0].tensors == graph.inputs
        assert graph.points[-1].tensors == graph.outputs
        assert graph.points[-1].index == len(graph.layers)
        for call in [args, *batches]:
            expected = model(*copied(list(call)), **copied(kwargs))
            first = next(t for t in leaves(call) + leaves(kwargs) if isinstance(t, torch.Tensor))
            batch = first.shape[0] if graph.batch_free else None
            for point in graph.points[points]:
                check_point(graph, point, call, kwargs, expected, batch)
    return graph


def in_threads(count: int, work: Any) -> list[Any]:
    """Run ``work(i)`` in ``count`` threads at once; returns the results, raises the first error."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            with torch.no_grad():
                results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
