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


def test_terms_are_those_of_the_arithmetic(graph: ts.LayerGraph) -> None:
    device, server = profile_of(graph, [4.0, 1.0, 2.0, 3.0]), profile_of(graph, [0.4, 0.1, 0.2, 0.3])
    link = ts.Link("test", 8e3, 16e3, 0.5)
    estimates = ts.estimate(graph, device, server, link)
    # Boundaries of 100, 1000, 1000, 10 floats; the answer is 1000 floats, 4000 bytes, 2 s of downlink.
    assert [e.head_s for e in estimates] == [0, 4, 5, 7, 10]
    assert [e.uplink_s for e in estimates] == pytest.approx([0.65, 4.25, 4.25, 0.29, 0])
    assert [e.tail_s for e in estimates] == pytest.approx([1.0, 0.6, 0.5, 0.3, 0])
    assert [e.downlink_s for e in estimates] == pytest.approx([2.25, 2.25, 2.25, 2.25, 0])
    assert [e.latency_s for e in estimates] == pytest.approx([3.9, 11.1, 12.0, 9.84, 10])
    assert ts.best(estimates).point.index == 0


def test_the_choice_moves_with_the_link(graph: ts.LayerGraph) -> None:
    device, server = profile_of(graph, [0.4, 0.1, 0.2, 3.0]), profile_of(graph, [0.04, 0.01, 0.02, 0.03])
    chosen = [
        ts.best(ts.estimate(graph, device, server, ts.Link("test", rate, 1e9, 0.0))).point.index
        for rate in (1e3, 2e3, 1e9)
    ]
    assert chosen == [3, 3, 0]
    far = ts.Link("far", 1e9, 1e9, 10.0)
    assert ts.best(ts.estimate(graph, device, server, far)).point.index == 4


def test_of_equal_points_the_one_with_least_device_work_wins(graph: ts.LayerGraph) -> None:
    free = profile_of(graph, [0.0, 1e-9, 0.0, 0.0])
    estimates = ts.estimate(graph, free, free, ts.Link("test", 1e9, 1e9, 0.0))
    tie = [e for e in estimates if e.point.index in (1, 2)]
    assert ts.best([tie[1]]) is tie[1]
    assert ts.best([tie[0], tie[0]]) is tie[0]
    with pytest.raises(ts.PartitionError):
        ts.best([])


def test_a_profile_of_another_model_is_refused(graph: ts.LayerGraph) -> None:
    mine = profile_of(graph, [1.0] * 4)
    other = LayerProfile("Other", "00", 1, ("a",), np.ones((1, 1)), np.ones(1), {})
    for pair in ((mine, other), (other, mine)):
        with pytest.raises(ts.ProfileError, match="Other"):
            ts.estimate(graph, *pair, ts.Link("test", 1e6, 1e6, 0.0))
