"""Cutting a model, and running both of its sides, beside what torch.fx offers for it."""

from __future__ import annotations

import pytest
from torch import fx
from torch.fx.passes.split_module import split_module

import torchsurgeon as ts
from benchmarks.support.networks import Network
from benchmarks.support.side_by_side import SideBySide


def halves(followed: fx.GraphModule) -> fx.GraphModule:
    """Both halves by torch.fx's own pass."""
    half = len(followed.graph.nodes) // 2
    part = {node: int(i >= half) for i, node in enumerate(followed.graph.nodes)}
    return split_module(followed, followed, part.__getitem__)


def one_half(followed: fx.GraphModule) -> fx.GraphModule:
    """The head alone, as an fx module that is generated for it."""
    nodes = list(followed.graph.nodes)[: len(followed.graph.nodes) // 2]
    half = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        copies[node] = half.node_copy(node, copies.__getitem__)
    half.output(copies[nodes[-1]])
    return fx.GraphModule(followed, half)


@pytest.mark.benchmark(group="cutting in the middle")
@pytest.mark.parametrize("name", ["resnet50", "chain of 1600"])
def test_cutting(name: str, side_by_side: SideBySide, network: Network) -> None:
    model, x = network(name)
    graph, followed = ts.trace(model, x), fx.symbolic_trace(model)
    side_by_side(
        {
            "fx.GraphModule, one side": lambda: one_half(followed),
            "fx split_module, both sides": lambda: halves(followed),
            "torchsurgeon, both sides": lambda: ts.cut(graph, len(graph.layers) // 2),
        }
    )


@pytest.mark.benchmark(group="running both sides")
@pytest.mark.parametrize("name", ["mobilenet_v3_large", "chain of 200"])
def test_running_both_sides(name: str, side_by_side: SideBySide, network: Network) -> None:
    model, x = network(name)
    graph, by_fx = ts.trace(model, x), halves(fx.symbolic_trace(model))
    part = ts.cut(graph, len(graph.layers) // 2)
    side_by_side(
        {
            "the model": lambda: model(x),
            "fx split_module": lambda: by_fx(x),
            "torchsurgeon": lambda: part.tail(*part.head(x)),
        }
    )
