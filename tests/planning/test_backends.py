"""Plans over several backends: each head and each tail runs by the one that is quickest for it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.link import Link
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.profiling.parts import PartTimes

LINK = Link("test", 20e6, 40e6, 0.01)


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(900, 10)]
    return ts.trace(nn.Sequential(*layers).eval(), torch.rand(1, 3, 64, 64))


def profile_of(graph: ts.LayerGraph, layer_s: list[float], backend: str = "eager") -> ts.LayerProfile:
    seconds = np.array([layer_s])
    names = tuple(layer.name for layer in graph.layers)
    return ts.LayerProfile(
        "Sequential", graph.fingerprint, 1, names, seconds, seconds.sum(axis=1), {"backend": backend, "device": "test"}
    )


def fused(graph: ts.LayerGraph, layer_s: list[float], head_s: list[float], backend: str) -> ts.LayerProfile:
    plain = profile_of(graph, layer_s, backend)
    heads, whole_s = np.array(head_s), sum(layer_s)
    parts = PartTimes((2,), heads, np.maximum(whole_s - heads, 0.0), np.array([[0.03, 0.05]]))
    return dataclasses.replace(plain, parts=parts)


@pytest.fixture(scope="module")
def devices(graph: ts.LayerGraph) -> list[ts.LayerProfile]:
    # Quick at the beginning, and quick at the end.
    return [
        profile_of(graph, [4e-3, 1e-3, 8e-3, 1e-3, 1e-3]),
        profile_of(graph, [1e-3, 1e-3, 2e-3, 8e-3, 8e-3], "other"),
    ]


def test_each_head_and_tail_counts_with_its_quickest_backend(
    graph: ts.LayerGraph, devices: list[ts.LayerProfile]
) -> None:
    costs = LayerCosts(graph, devices, devices)
    for row in costs.rows():
        heads = {one.backend: one.head_s[row.index] for one in devices}
        tails = {one.backend: one.tail_s[row.index] for one in devices}
        assert row.head_s == pytest.approx(min(heads.values()))
        assert row.tail_s == pytest.approx(min(tails.values()))
        if row.index > 0:
            assert heads[row.backend] == min(heads.values())
        if not row.on_device:
            assert tails[row.server_backend] == min(tails.values())
    assert {row.backend for row in costs.rows()} == {"eager", "other"}


def test_the_plan_is_the_best_over_all_cuts_and_backends(graph: ts.LayerGraph, devices: list[ts.LayerProfile]) -> None:
    servers = [one.scaled(0.2) for one in devices]
    found = ts.plan(graph, device=devices, server=servers, link=LINK)
    alone = [
        ts.plan(graph, device=device, server=server, link=LINK).value
        for device, server in itertools.product(devices, servers)
    ]
    assert found.value <= min(alone) + 1e-12
    text = found.explain()
    assert "device's backend" in text
    assert "server's backend" in text
    assert found.device_only.head_s == pytest.approx(min(one.total_s for one in devices))
    assert found.server_only is not None
    assert found.server_only.tail_s == pytest.approx(min(one.total_s for one in servers))


def test_eager_alone_is_not_mentioned(graph: ts.LayerGraph, devices: list[ts.LayerProfile]) -> None:
    assert "backend" not in ts.plan(graph, device=devices[0], server=devices[0], link=LINK).explain()


def test_heads_of_a_fused_profile_are_those_that_were_measured(graph: ts.LayerGraph) -> None:
    head_s = [0.0, 5e-3, 2e-3, 6e-3, 6e-3, 7e-3]  # a longer head may be quicker
    device = fused(graph, [1e-3, 2e-3, 1e-3, 2e-3, 1e-3], head_s, "fusing")
    frontier = ts.Frontier.build(graph, device, device)
    assert all(row.head_s == pytest.approx(head_s[row.index]) for row in frontier.rows)
    found = ts.plan(graph, device=device, server=device.scaled(0.1), link=LINK)
    assert "interpolated" in found.explain()


def test_a_frontier_keeps_its_backends_in_a_file(
    graph: ts.LayerGraph, devices: list[ts.LayerProfile], tmp_path: Path
) -> None:
    frontier = ts.Frontier.build(graph, devices, devices)
    frontier.save(tmp_path / "frontier.json")
    assert ts.Frontier.load(tmp_path / "frontier.json").rows == frontier.rows


def test_backends_without_joules_are_left_out_where_energy_counts(
    graph: ts.LayerGraph, devices: list[ts.LayerProfile]
) -> None:
    energy = ts.LayerEnergy("test", 1.0, np.full(5, 0.01), np.full((5, 2), 0.01), (0.05, 0.05, 0.05))
    metered = dataclasses.replace(devices[0], energy=energy)
    link = Link.parse("wifi")
    found = ts.plan(graph, device=[metered, devices[1]], server=devices, link=link, objective="energy")
    assert {row.backend for row in found.rows} == {"eager"}
    assert found.terms.device_j is not None
    with pytest.raises(ts.PlanError, match="energy"):
        ts.plan(graph, device=devices, server=devices, link=link, objective="energy")


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "must be a LayerProfile"), (["x"], "must be a LayerProfile"), ("x", "must be a LayerProfile")],
)
def test_what_is_no_profile_is_refused(graph: ts.LayerGraph, given: object, message: str) -> None:
    with pytest.raises(ts.ProfileError, match=message):
        LayerCosts(graph, given, given)  # type: ignore[arg-type]


def test_two_profiles_of_one_backend_are_refused(graph: ts.LayerGraph, devices: list[ts.LayerProfile]) -> None:
    with pytest.raises(ts.ProfileError, match="'other' twice"):
        ts.plan(graph, device=[*devices, devices[1]], server=devices, link=LINK)


def test_a_limit_on_memory_needs_it_for_every_backend(graph: ts.LayerGraph, devices: list[ts.LayerProfile]) -> None:
    known = dataclasses.replace(devices[0], memory_bytes=np.full(5, 1000, dtype=np.int64))
    ts.plan(graph, device=known, server=devices, link=LINK, memory_bytes=1e9)
    with pytest.raises(ts.PlanError, match="eager PyTorch"):
        ts.plan(graph, device=[known, devices[1]], server=devices, link=LINK, memory_bytes=1e9)
