"""Rows of machines: the planned cuts are the best there are, and a chain of servers gives the model's own answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsurgeon as ts
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable, Finding
from torchsurgeon.planning import Objective
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


def table_of(drawn: list[tuple[int, str, float, float, float, float | None]], measure: str) -> CodecTable:
    """A table of codecs: point, name, share of the bytes, seconds of encoding and decoding, and what surely changes."""
    rows = []
    for index, name, share, encode_s, decode_s, bound in drawn:
        size_bytes = GRAPH.points[index].size_bytes * share
        cost = CodecCost(name, size_bytes, encode_s, decode_s, bound is None, within_budget=True)
        found = () if bound is None else (Finding(measure, bound / 2, bound, 0.03, 300, True),)
        rows.append(CodecRow(index, GRAPH.points[index].name, 1.0, cost, None, found))
    return CodecTable("Sequential", GRAPH.fingerprint, 1, 300, "", tuple(rows))


CODECS = st.lists(
    st.tuples(
        st.integers(0, COUNT - 1),
        st.sampled_from(["int8", "int4", "fitted:x@2", "fitted:x@1"]),
        st.floats(0.05, 1.0),
        st.floats(0.0, 0.5),
        st.floats(0.0, 0.5),
        # Of whole parts of the budget, since the plan rounds what is used up to these.
        st.none() | st.integers(1, 10).map(lambda tenths: tenths * 0.003),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda row: row[:2],
)


def every_chain(
    stages: list[LayerProfile],
    links: list[ts.Link],
    loads: list[float],
    table: CodecTable,
    weights: dict[str, float],
    adds: bool,
) -> Iterator[tuple[float, list[tuple[int, str]]]]:
    """Give each chain that keeps the budget, added up plainly: its value, and the cut and codec of each link."""
    answer = GRAPH.outputs[0].size_bytes
    ways = [(k, "raw", float(GRAPH.points[k].size_bytes), 0.0, 0.0, 0.0) for k in range(COUNT)]
    for row in table.rows:
        cost, used = row.cost, row.findings[0].bound / 0.03 if row.findings else 0.0
        ways.append((row.point, cost.codec, cost.size_bytes, cost.encode_s, cost.decode_s, used))
    for crossed in range(len(stages)):
        for chosen in itertools.product(ways, repeat=crossed):
            cuts = [way[0] for way in chosen]
            used = [way[5] for way in chosen if way[5]]
            if cuts != sorted(cuts) or (sum(used) > 1 + 1e-9 if adds else len(used) > 1):
                continue
            stage_s = []
            for i, (begin, end) in enumerate(itertools.pairwise([0, *cuts, COUNT])):
                seconds = float(stages[i].samples_s[0][begin:end].sum())
                seconds += chosen[i][3] if i < crossed else 0.0
                stage_s.append(seconds + (chosen[i - 1][4] if i else 0.0))
            loaded_s = [seconds * load for seconds, load in zip(stage_s, loads, strict=False)]
            sizes = [way[2] for way in chosen]
            requests = list(zip(links, sizes, strict=False))
            transfers = [s for link, size in requests for s in (link.uplink_s(size), link.downlink_s(answer))]
            found = {
                "latency": sum(loaded_s) + sum(link.request_s(size, answer) for link, size in requests),
                "throughput": max([*loaded_s, *transfers]),
                "server_time": sum(stage_s[1:]),
            }
            yield sum(weight * found[name] for name, weight in weights.items()), [way[:2] for way in chosen]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(PROFILES, min_size=1, max_size=3),
    st.lists(LINKS, min_size=2, max_size=2),
    st.lists(st.floats(0.2, 5.0), min_size=3, max_size=3),
    CODECS,
    st.sampled_from([{"latency": 1.0}, {"throughput": 1.0}, {"latency": 1.0, "server_time": 0.5}]),
    st.sampled_from(["top-1 changed", "cosine"]),
)
def test_with_codecs_it_is_the_best_of_all_chains_that_keep_the_budget(
    stages, links, loads, drawn, weights, measure
) -> None:
    links, loads = links[: len(stages) - 1], loads[: len(stages)]
    if measure == "cosine":
        drawn = [(*row[:5], None if row[5] is None else 0.9) for row in drawn]
    table = table_of(drawn, measure)
    if measure == "cosine":
        findings = (Finding("cosine", 0.9995, 0.9995, 0.999, 300, True),)
        rows = [dataclasses.replace(row, findings=findings if row.findings else ()) for row in table.rows]
        table = dataclasses.replace(table, rows=tuple(rows))
    every = list(every_chain(stages, links, loads, table, weights, measure != "cosine"))
    plan = ts.plan(GRAPH, stages=stages, links=links, objective=weights, loads=loads, codecs=table)
    assert plan.value == pytest.approx(min(value for value, _ in every), rel=1e-9, abs=1e-12)
    used = [row.budget_used for row in plan.rows if row.budget_used]
    assert plan.budget_used == pytest.approx(sum(used))
    assert sum(used) <= 1 + 1e-9 if measure != "cosine" else len(used) <= 1
    own = list(zip((point.index for point in plan.points), plan.codecs, strict=True))
    assert plan.value == pytest.approx(next(value for value, chosen in every if chosen == own))


def test_two_codecs_share_the_budget_and_the_plan_says_so() -> None:
    stages = [profile_of([1e-3, 1e-3, 5.0, 5.0, 5.0, 5.0]), profile_of([1e-3, 1e-3, 1e-3, 1e-3, 5.0, 5.0])]
    stages.append(profile_of([1e-3] * COUNT))
    links = [ts.Link("narrow", 1e3, 1e5, 0.01)] * 2
    halves = [(2, "int8", 0.25, 0.0, 0.0, 0.015), (4, "int8", 0.25, 0.0, 0.0, 0.0147)]
    both = ts.plan(GRAPH, stages=stages, links=links, codecs=table_of(halves, "top-1 changed"))
    assert [(point.index, codec) for point, codec in zip(both.points, both.codecs, strict=True)] == [
        (2, "int8"), (4, "int8")
    ]  # fmt: skip
    assert both.budget_used == pytest.approx(0.99)
    text = both.explain()
    assert "cut after 1 as int8, 5 bytes up" in text
    assert "top-1 changed: 0.8% (≤ 1.5%)" in text
    assert "the codecs use 99% of the accuracy budget" in text
    assert "the sum of what each uses alone; codec.measure_together()" in text
    more = [(2, "int8", 0.25, 0.0, 0.0, 0.018), (4, "int8", 0.25, 0.0, 0.0, 0.015)]
    one = ts.plan(GRAPH, stages=stages, links=links, codecs=table_of(more, "top-1 changed"))
    assert sorted(one.codecs) == ["int8", "raw"]
    # What two means lose cannot be added.
    means = ts.plan(GRAPH, stages=stages, links=links, codecs=table_of(halves, "a score of mine"))
    assert sorted(means.codecs) == ["int8", "raw"]
    assert "measure_together" not in means.explain()


def test_a_chain_takes_no_constraints() -> None:
    one, link = profile_of([1.0] * COUNT), ts.Link("some", 2e4, 1e5, 0.01)
    with pytest.raises(ts.PlanError, match="takes no device=, server=, link= or constraints"):
        ts.plan(GRAPH, stages=[one, one], links=[link], raw_input=False)
    with pytest.raises(ts.PlanError, match="must be a measured CodecTable"):
        ts.plan(GRAPH, stages=[one, one], links=[link], codecs="codecs.json")


def test_a_chain_takes_links_by_name_and_refuses_what_it_would_not_count() -> None:
    one = profile_of([1.0] * COUNT)
    by_name = ts.plan(GRAPH, stages=[one, one], links=["lte"])
    assert by_name == ts.plan(GRAPH, stages=[one, one], links=[ts.Link.parse("lte")])
    for more, message in (
        ({"load": 2.0}, "takes loads=, one for each machine; got load=2.0"),
        ({"slowdown": 2.0}, "takes loads=.*slowdown=2.0"),
        ({"loads": [1.0, "slow"]}, r"loads must be positive numbers; got \[1.0, 'slow'\]"),
        ({"loads": 2.0}, "loads must be a list, .*; got 2.0"),
        ({"links": "lte"}, "links must be a list, .*; got 'lte'"),
        ({"links": [3]}, 'each of links must be a Link, or a text such as "lte"; got 3'),
        ({"stages": one}, "stages must be a list"),
    ):
        with pytest.raises(ts.PlanError, match=message):
            ts.plan(GRAPH, **({"stages": [one, one], "links": ["lte"]} | more))
    with pytest.raises(ts.LinkError, match="no link 'lta'"):
        ts.plan(GRAPH, stages=[one, one], links=["lta"])
    with pytest.raises(ts.PlanError, match="plan takes a traced model; got Sequential"):
        ts.plan(GRAPH.model, stages=[one, one], links=["lte"])


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
        ([one, one], [link], Objective(throughput=1.0, in_flight=4), None),
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
