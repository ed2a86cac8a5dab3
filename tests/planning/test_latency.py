"""The plan's latencies are the sums they claim to be, and its choice is the least of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.profiling import LayerProfile


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    layers = nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10), nn.Linear(10, 1000))
    return ts.trace(layers.eval(), torch.rand(1, 100))


def profile_of(graph: ts.LayerGraph, seconds: list[float]) -> LayerProfile:
    names = tuple(layer.name for layer in graph.layers)
    samples = np.array([seconds])
    return LayerProfile("Sequential", graph.fingerprint, 1, names, samples, samples.sum(axis=1), {})


def terms_of(graph: ts.LayerGraph, device: LayerProfile, server: LayerProfile, link: ts.Link) -> list[ts.Terms]:
    """The predicted terms of every partition point, in their order."""
    frontier = ts.Frontier.build(graph, device, server)
    rows = ts.plan(graph, device=device, server=server, link=link).rows
    return [frontier.terms(row, link) for row in sorted(rows, key=lambda row: row.index)]


def test_terms_are_those_of_the_arithmetic(graph: ts.LayerGraph) -> None:
    device, server = profile_of(graph, [4.0, 1.0, 2.0, 3.0]), profile_of(graph, [0.4, 0.1, 0.2, 0.3])
    link = ts.Link("test", 8e3, 16e3, 0.5)
    terms = terms_of(graph, device, server, link)
    # Boundaries of 100, 1000, 1000, 10 floats; the answer is 1000 floats, 4000 bytes, 2 s of downlink.
    assert [t.head_s for t in terms] == [0, 4, 5, 7, 10]
    assert [t.uplink_s for t in terms] == pytest.approx([0.65, 4.25, 4.25, 0.29, 0])
    assert [t.tail_s for t in terms] == pytest.approx([1.0, 0.6, 0.5, 0.3, 0])
    assert [t.downlink_s for t in terms] == pytest.approx([2.25, 2.25, 2.25, 2.25, 0])
    assert [t.latency_s for t in terms] == pytest.approx([3.9, 11.1, 12.0, 9.84, 10])
    assert ts.plan(graph, device=device, server=server, link=link).point.index == 0


def test_the_choice_moves_with_the_link(graph: ts.LayerGraph) -> None:
    device, server = profile_of(graph, [0.4, 0.1, 0.2, 3.0]), profile_of(graph, [0.04, 0.01, 0.02, 0.03])

    def chosen(link: ts.Link) -> int:
        return ts.plan(graph, device=device, server=server, link=link).point.index

    assert [chosen(ts.Link("test", rate, 1e9, 0.0)) for rate in (1e3, 2e3, 1e9)] == [3, 3, 0]
    assert chosen(ts.Link("far", 1e9, 1e9, 10.0)) == 4


def test_of_equal_points_the_one_with_least_device_work_wins() -> None:
    layers = nn.Sequential(nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 1000), nn.Linear(1000, 10))
    graph = ts.trace(layers.eval(), torch.rand(1, 100))
    # Points 1 and 2 both send 10 floats and cost nothing but that.
    device, server = profile_of(graph, [0.0, 0.0, 1.0, 1.0]), profile_of(graph, [1e-9, 0.0, 0.0, 0.0])
    plan = ts.plan(graph, device=device, server=server, link=ts.Link("test", 1e3, 1e9, 0.0))
    assert plan.terms.latency_s == pytest.approx(0.32, rel=1e-3)
    assert plan.point.index == 1


def test_a_profile_of_another_model_is_refused(graph: ts.LayerGraph) -> None:
    mine = profile_of(graph, [1.0] * 4)
    other = LayerProfile("Other", "00", 1, ("a",), np.ones((1, 1)), np.ones(1), {})
    for device, server in ((mine, other), (other, mine)):
        with pytest.raises(ts.ProfileError, match="Other"):
            ts.plan(graph, device=device, server=server, link=ts.Link("test", 1e6, 1e6, 0.0))
