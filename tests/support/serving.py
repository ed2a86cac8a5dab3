"""A model behind a real server on this machine, and the same model split against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from partitions import assert_same, copied
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


@contextmanager
def split(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[ts.SplitModule]:
    """``model`` split against a server that holds it too, over loopback; it starts with everything on the server."""
    registry = ModelRegistry()
    try:
        registry.add("model", model, args, kwargs)
        example = args or kwargs
        with (
            Server(create_app(registry)) as server,
            ts.SplitModule(model, example, server=server.url, name="model", partition=0) as module,
        ):
            yield module
    finally:
        registry.close()


def points_in(graph: ts.LayerGraph, *parts: str) -> list[ts.PartitionPoint]:
    """Both ends, and the last point inside each of the named parts of the model."""
    found = [graph.points[0], graph.points[-1]]
    for part in parts:
        inside = [p for p in graph.points if p.name == part or p.name.startswith(f"{part}.")]
        assert inside, f"no point in {part!r}; there are {[p.name for p in graph.points]}"
        found.append(inside[-1])
    return found


def spread(graph: ts.LayerGraph, count: int = 5) -> list[ts.PartitionPoint]:
    """Both ends and points evenly between."""
    last = len(graph.points) - 1
    return [graph.points[round(i * last / (count - 1))] for i in range(count)]


def check_split(module: ts.SplitModule, points: Sequence[ts.PartitionPoint], *calls: Arguments) -> None:
    """At each of ``points`` and for each call, the split model's answer is the model's own, bit for bit."""
    with torch.no_grad():
        for args, kwargs in calls:
            expected = module.model(*copied(list(args)), **copied(dict(kwargs)))
            for point in points:
                module.partition = point.index
                assert_same(module(*args, **kwargs), expected, f"point {point.index} ({point.name})", strides=False)
