"""Rows of machines: the planned cuts are the best there are, and a chain of servers gives the model's own answer."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsurgeon as ts
from torchsurgeon.profiling import LayerEnergy, LayerProfile
from torchsurgeon.serve import ModelRegistry, Server, create_app

torch.set_num_threads(1)
COUNT = 6


def graph_of() -> ts.LayerGraph:
    widths = [30, 200, 5, 80, 3, 40, 10]
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    return ts.trace(layers.eval(), torch.rand(1, 30))


GRAPH = graph_of()


def profile_of(seconds: list[float], joules: list[float] | None = None) -> LayerProfile:
    samples = np.array([seconds])
    made = LayerProfile(
        "Sequential",
        GRAPH.fingerprint,
        1,
        tuple(layer.name for layer in GRAPH.layers),
        samples,
        samples.sum(axis=1),
        {},
    )
    if joules is None:
        return made
    whole = float(sum(joules))
    energy = LayerEnergy("recorded", 0.0, np.array(joules), np.zeros((COUNT, 2)), (whole, whole, whole))
    return dataclasses.replace(made, energy=energy)


PROFILES = st.builds(profile_of, *(st.lists(st.floats(1e-3, 5.0), min_size=COUNT, max_size=COUNT) for _ in range(2)))
LINKS = st.builds(
    lambda up, trip: ts.Link("drawn", up, 1e5, trip, radio=ts.Radio(1e-6, 1e-6, 0.5)),
    st.floats(1e3, 1e5),
    st.floats(0.0, 1.0),
)


def costs(
    cuts: tuple[int, ...], stages: list[LayerProfile], links: list[ts.Link], loads: list[float]
) -> dict[str, float]:
    """What a chain costs, added up plainly."""
    latency_s = server_s = 0.0
    slowest_s, joules, begin = 0.0, float(stages[0].energy.layer_j[: cuts[0]].sum()), 0
    answer = GRAPH.outputs[0].size_bytes
    for i, (stage, end) in enumerate(zip(stages, cuts, strict=True)):
        seconds = float(stage.samples_s[0][begin:end].sum())
        latency_s += seconds * loads[i]
        slowest_s = max(slowest_s, seconds * loads[i])
        server_s += seconds if i else 0.0
        begin = end
        if end == COUNT:
            break
        size = GRAPH.points[end].size_bytes
        latency_s += links[i].request_s(size, answer)
        slowest_s = max(slowest_s, links[i].uplink_s(size), links[i].downlink_s(answer))
        joules += links[i].request_j(size, answer) if i == 0 else 0.0
    return {"latency": latency_s, "throughput": slowest_s, "server_time": server_s, "energy": joules}


@settings(deadline=None, max_examples=80)
@given(
    st.lists(PROFILES, min_size=1, max_size=4),
    st.lists(LINKS, min_size=3, max_size=3),
    st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4),
    st.sampled_from(["latency", "throughput", "server_time", "energy", "sum"]),
)
def test_the_plan_is_the_best_of_all_chains(stages, links, loads, wanted) -> None:
    links, loads = links[: len(stages) - 1], loads[: len(stages)]
    weights = {"latency": 1.0, "energy": 0.3, "server_time": 0.5} if wanted == "sum" else {wanted: 1.0}
    every = [
        sum(weight * costs(cuts, stages, links, loads)[name] for name, weight in weights.items())
        for cuts in itertools.product(range(COUNT + 1), repeat=len(stages))
        if list(cuts) == sorted(cuts) and cuts[-1] == COUNT
    ]
    plan = ts.plan(GRAPH, stages=stages, links=links, objective=weights, loads=loads)
    assert plan.value == pytest.approx(min(every), rel=1e-9, abs=1e-12)
    cuts = (*(point.index for point in plan.points), *[COUNT] * (len(stages) - len(plan.points)))
    assert sum(w * costs(cuts, stages, links, loads)[n] for n, w in weights.items()) == pytest.approx(plan.value)
    assert plan.latency_s == pytest.approx(costs(cuts, stages, links, loads)["latency"])
    assert plan.interval_s == pytest.approx(costs(cuts, stages, links, loads)["throughput"])


def test_a_chain_of_two_machines_is_the_ordinary_plan() -> None:
    device, server = profile_of([0.1, 0.1, 9.0, 9.0, 9.0, 9.0]), profile_of([0.1] * COUNT)
    link = ts.Link("some", 1e3, 1e5, 0.01)
    chain, pair = (
        ts.plan(GRAPH, stages=[device, server], links=[link]),
        ts.plan(GRAPH, device=device, server=server, link=link),
    )
    assert chain.value == pytest.approx(pair.value)
    assert chain.points == (pair.point,)
    assert pair.point.name == "1"
    assert f"cut after {pair.point.name}" in chain.explain()


def test_a_chain_that_cannot_be_is_refused() -> None:
    one, link = profile_of([1.0] * COUNT), ts.Link("some", 2e4, 1e5, 0.01)
    for stages, links, objective, loads in (
        ([], [], "latency", None),
        ([one, one], [], "latency", None),
        ([one], [link], "latency", None),
        ([one, one], [link], "latency", [1.0]),
        ([one, one], [link], "latency", [1.0, 0.0]),
        ([one, one], [link], {"throughput": 1.0, "latency": 1.0}, None),
        ([one, one], [link], "energy", None),
    ):
        with pytest.raises(ts.PlanError):
            ts.plan(GRAPH, stages=stages, links=links, objective=objective, loads=loads)


def test_a_server_with_a_remote_of_its_own_is_the_middle_of_a_chain() -> None:
    model, x = GRAPH.model, torch.rand(1, 30)
    cloud, edge = ModelRegistry(), ModelRegistry()
    cloud.add("model", model, (x,))
    try:
        with (
            Server(create_app(cloud)) as far,
            ts.SplitModule(model, x, server=far.url, partition=4) as onward,
        ):
            edge.add("model", onward)
            with Server(create_app(edge)) as near, ts.SplitModule(model, x, server=near.url, partition=2) as split:
                for here, there in itertools.product(range(COUNT + 1), repeat=2):
                    split.partition, onward.partition = here, there
                    for batch in (torch.rand(1, 30), torch.rand(3, 30)):
                        assert torch.equal(split(batch), model(batch)), (here, there)
    finally:
        edge.close()
        cloud.close()


def test_a_chain_whose_last_server_is_down_says_so() -> None:
    model, x = GRAPH.model, torch.rand(1, 30)
    cloud, edge = ModelRegistry(), ModelRegistry()
    cloud.add("model", model, (x,))
    try:
        with Server(create_app(cloud)) as far:
            onward = ts.SplitModule(model, x, server=far.url, partition=4, timeout_s=5.0, fallback="error")
            edge.add("model", onward)
            onward(x)
        with (
            Server(create_app(edge)) as near,
            ts.SplitModule(model, x, server=near.url, partition=2, fallback="error") as split,
        ):
            with pytest.raises(ts.RequestRefusedError, match="ServerUnavailableError"):
                split(x)
            onward.partition = "device"
            assert torch.equal(split(x), model(x))
        onward.close()
    finally:
        edge.close()
        cloud.close()
