"""The frontier's best is the best of all there is: all partition points, all codecs, all closed sets of layers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from partitions import check_point, copied
from random_programs import example, operation, possible
from small_models import CASES, model
from torch import nn

import torchsurgeon as ts
from torchsurgeon.adapting import Decider, Estimates, LinkEstimate, LoadEstimate, Quantity
from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable
from torchsurgeon.cutting.partition import cut
from torchsurgeon.planning import Frontier, Objective, sets
from torchsurgeon.planning.mincut import MinimumCut
from torchsurgeon.planning.rows import LayerCosts, lower_hull
from torchsurgeon.profiling import LayerEnergy, LayerProfile

torch.set_num_threads(1)
# Shrinking whole models takes minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
SEEDS = st.integers(0, 2**32)
SECONDS = st.floats(1e-4, 10.0)


class Random(nn.Module):
    """Layers on one tensor of a width of their own each, that read the sum of earlier ones; the last layer reads all
    that nothing else does."""

    def __init__(self, reads: list[list[int]], widths: list[int]) -> None:
        super().__init__()
        self.reads = reads
        self.parts = nn.ModuleList(
            nn.Linear(sum(widths[j] for j in r), w) for r, w in zip(reads, widths[1:], strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for read, part in zip(self.reads, self.parts, strict=True):
            values.append(part(values[read[0]] if len(read) == 1 else torch.cat([values[j] for j in read], 1)))
        unread = set(range(len(values))) - {j for read in self.reads for j in read}
        return torch.cat([values[j] for j in sorted(unread)], 1) if len(unread) > 1 else values[-1]


@st.composite
def graphs(draw: st.DrawFn, least: int, most: int, reach: int = 100) -> ts.LayerGraph:
    count = draw(st.integers(least, most))
    reads = [sorted(draw(st.sets(st.integers(max(0, i - reach), i), min_size=1, max_size=2))) for i in range(count)]
    widths = draw(st.lists(st.integers(1, 40), min_size=count + 1, max_size=count + 1))
    return ts.trace(Random(reads, widths).eval(), torch.rand(1, widths[0]))


def profile_of(graph: ts.LayerGraph, seconds: list[float], joules: list[float] | None = None) -> LayerProfile:
    samples = np.array([seconds])
    names = tuple(layer.name for layer in graph.layers)
    energy = None
    if joules is not None:
        whole = float(sum(joules))
        energy = LayerEnergy("recorded", 0.0, np.array(joules), np.zeros((len(joules), 2)), (whole, whole, whole))
    made = LayerProfile("Random", graph.fingerprint, graph.batch, names, samples, samples.sum(axis=1), {})
    return dataclasses.replace(made, energy=energy, memory_bytes=np.full(len(names), 1000))


@st.composite
def problems(
    draw: st.DrawFn, least: int, most: int, reach: int = 100
) -> tuple[ts.LayerGraph, LayerProfile, LayerProfile]:
    graph = draw(graphs(least, most, reach))
    count = len(graph.layers)
    device, server, joules = (draw(st.lists(SECONDS, min_size=count, max_size=count)) for _ in range(3))
    return graph, profile_of(graph, device, joules), profile_of(graph, server)


LINKS = st.builds(
    lambda up, trip: ts.Link("drawn", up, 1e6, trip, radio=ts.Radio(3e-7, 1e-7, 0.5, 1.0, 0.2)),
    st.floats(1e3, 1e6),
    st.floats(0, 2),
)
FACTORS = st.floats(0.1, 10.0)


def closed_sets(graph: ts.LayerGraph) -> list[tuple[int, ...]]:
    count, found = len(graph.layers), []
    needs = graph.closure.needs
    for flags in itertools.product((0, 1), repeat=count):
        inside = {i for i in range(count) if flags[i]}
        if all(inside.issuperset(needs[i]) for i in inside):
            found.append(tuple(sorted(inside)))
    return found


@settings(deadline=None, max_examples=40, phases=PHASES)
@given(
    problems(2, 7),
    LINKS,
    FACTORS,
    FACTORS,
    st.sampled_from(["latency", "energy", "throughput", "server_time", "sum", Objective(throughput=1.0, in_flight=3)]),
)
def test_best_is_that_of_all_closed_sets_of_layers(problem, link, load, slowdown, wanted) -> None:
    graph, device, server = problem
    objective = Objective(latency=1.0, energy=0.5, throughput=2.0) if wanted == "sum" else wanted
    frontier = Frontier.build(graph, device, server)
    costs = LayerCosts(graph, device, server)
    everything = Frontier("all", "", 1, 0, frontier.answer_bytes, tuple(costs.row_of(s) for s in closed_sets(graph)))
    everything = dataclasses.replace(
        everything,
        rows=tuple(
            dataclasses.replace(r, on_device=True, size_bytes=0.0) if r.index == len(graph.layers) else r
            for r in everything.rows
        ),
    )
    ours = frontier.costs(link, load, slowdown, objective).min()
    assert ours == pytest.approx(everything.costs(link, load, slowdown, objective).min(), rel=1e-9)
    chosen = frontier.best(link, load, slowdown, objective)
    assert frontier.costs(link, load, slowdown, objective)[frontier.rows.index(chosen)] == ours


@settings(deadline=None, max_examples=40, phases=PHASES)
@given(problems(2, 7), LINKS, FACTORS, FACTORS, st.integers(1, 20))
def test_answers_of_a_stream_come_no_oftener_than_what_is_in_flight_allows(
    problem, link, load, slowdown, in_flight
) -> None:
    graph, device, server = problem
    frontier = Frontier.build(graph, device, server)
    terms = [frontier.terms(row, link, load, slowdown) for row in frontier.rows]
    expected = [max(one.interval_s, one.latency_s / in_flight) for one in terms]
    bounded = Objective(throughput=2.0, in_flight=in_flight)
    assert frontier.costs(link, load, slowdown, bounded) == pytest.approx([2.0 * one for one in expected])
    alone = frontier.costs(link, load, slowdown, Objective(throughput=1.0, in_flight=1))
    assert alone == pytest.approx(frontier.costs(link, load, slowdown, "latency"))
    assert str(bounded) == f"throughput with {in_flight} in flight"


@pytest.mark.parametrize("in_flight", [0, -1, 2.5, "4", True])
def test_a_number_in_flight_that_is_none_is_refused(in_flight) -> None:
    with pytest.raises(ts.PlanError, match=r"in_flight .* 1 or more; got"):
        Objective(throughput=1.0, in_flight=in_flight)
    with pytest.raises(ts.PlanError, match="needs a weight of throughput"):
        Objective(latency=1.0, in_flight=4)


@pytest.mark.parametrize("count", [2, 5, 20, 100])
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_the_lower_hull_holds_the_least_under_any_weights(count, columns) -> None:
    for seed in range(20):
        chance = np.random.default_rng(seed)
        costs = chance.exponential(size=(count, columns)) * 10.0 ** chance.integers(-3, 6, columns)
        corners, _ = lower_hull(costs)
        shares = (costs - costs.min(axis=0)) / np.ptp(costs, axis=0)
        for _ in range(100):
            weights = 10.0 ** chance.uniform(-8, 0, columns) * (chance.random(columns) < 0.8)
            sums = shares @ weights
            assert sums[corners].min() == pytest.approx(sums.min(), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(
    arrays(np.float64, st.tuples(st.integers(2, 30), st.just(4)), elements=st.integers(0, 4).map(float)),
    st.lists(st.tuples(*4 * [st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.3, 1.0])]).filter(any), min_size=20, max_size=20),
)
def test_the_lower_hull_holds_the_least_where_rows_tie_and_columns_are_alike(costs, weighings) -> None:
    corners, _ = lower_hull(costs)
    scale = np.where(np.ptp(costs, axis=0) > 0, np.ptp(costs, axis=0), 1.0)
    for weights in weighings:
        sums = (costs - costs.min(axis=0)) / scale @ weights
        assert sums[corners].min() == pytest.approx(sums.min(), rel=1e-9, abs=1e-12)


def test_the_lower_hull_holds_what_only_tiny_weights_tell_from_another() -> None:
    costs = np.array([[1.0, 0.5, 0.5], [0.0, 0.5 + 1e-5, 0.5], [0.3, 0.0, 1.2], [0.3, 1.2, 0.0]])
    assert lower_hull(costs)[0] == [0, 1, 2, 3]
    assert (costs @ [1e-6, 1.0, 1.0]).argmin() == 0


@settings(deadline=None, max_examples=8, phases=PHASES)
@given(problems(25, 40, 6), LINKS, FACTORS, FACTORS)
def test_best_is_the_minimum_cut_of_large_graphs(problem, link, load, slowdown) -> None:
    graph, device, server = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "_MOST_SETS", 16)
        frontier = Frontier.build(graph, device, server)
        assert ts.plan(graph, device=device, server=server, link=link).frontier.exact
    units = sets.Units(LayerCosts(graph, device, server))
    weights = np.array([slowdown, 8 / link.uplink_bit_s, load, 0.0])
    whole = sets.Block(units, 0, len(units.layers))
    mask = MinimumCut(0, len(units.layers), units.needs, units.costs, units.tensors).best(weights)
    least = float((whole.costs([mask]) @ weights)[0]) + link.request_s(0, frontier.answer_bytes)
    device_only = slowdown * float(device.head_s[-1])
    assert frontier.costs(link, load, slowdown).min() == pytest.approx(min(least, device_only), rel=1e-6)


class Branches(nn.Module):
    """Two branches of which one shrinks and one, whose tensor is small from the start, is dear on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(inplace=True), nn.Linear(512, 2))
        self.small = nn.Sequential(nn.Linear(4, 512), nn.ReLU(inplace=True), nn.Linear(512, 64))
        self.join = nn.Linear(66, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.join(torch.cat([self.small(y), self.wide(x)], 1))


def test_a_cut_across_branches_is_found_and_gives_the_models_own_bits() -> None:
    model, x, y = Branches().eval(), torch.rand(3, 64), torch.rand(3, 4)
    graph = ts.trace(model, x, y)
    dear = {"small.0", "small.1", "small.2", "join"}
    device = profile_of(graph, [1.0 if layer.name in dear else 1e-3 for layer in graph.layers])
    server = profile_of(graph, [1e-3] * len(graph.layers))
    frontier = Frontier.build(graph, device, server)
    row = frontier.best(ts.Link("slow", 1e4, 1e6, 0.0))
    assert row.layers is not None
    assert {graph.layers[i].name for i in row.layers} == {"wide.0", "wide.1", "wide.2"}
    point = row.point(graph)
    assert {spec.name for spec in point.tensors} == {"y", "wide.2"}
    parts = cut(graph, point)
    assert torch.equal(parts.tail(*parts.head(x, y)), model(x, y))


@pytest.mark.parametrize("name", ["in_place_on_branches", "views_of_one_tensor"])
def test_every_closed_set_gives_the_models_own_bits(name: str) -> None:
    def in_place_on_branches(self: Any, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(a)
        c = a.relu_()
        return self.c(c) + b + a + self.b(x).tanh()

    def views_of_one_tensor(self: Any, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        first, second = a[:, :3], a[:, 3:]
        return torch.cat([first * 2, self.d(second)], 1) + a.view(-1, 6)

    made = model(
        {"in_place_on_branches": in_place_on_branches, "views_of_one_tensor": views_of_one_tensor}[name],
        **{key: nn.Linear(6, 6) for key in "abc"},
        d=nn.Linear(3, 3),
    )
    x = torch.randn(2, 6)
    graph = ts.trace(made, x)
    expected, tried = made(x.clone()), 0
    for layers in closed_sets(graph):
        point = graph.point_of(layers)
        parts = cut(graph, point)
        assert torch.equal(parts.tail(*(t.clone() for t in parts.head(x.clone()))), expected), layers
        tried += point.layers is not None
    assert tried


def test_a_set_that_is_not_closed_is_refused() -> None:
    graph = ts.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), torch.rand(1, 2))
    with pytest.raises(ts.PartitionError, match="need layers"):
        graph.point_of([1])
    with pytest.raises(ts.PartitionError, match="from 0 to 1; got 7"):
        graph.point_of([7])


def small() -> tuple[ts.LayerGraph, LayerProfile, LayerProfile]:
    graph = ts.trace(nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10)).eval(), torch.rand(1, 100))
    return graph, profile_of(graph, [0.4, 0.1, 0.2], [1.0, 2.0, 3.0]), profile_of(graph, [0.04, 0.01, 0.02])


def table_of(graph: ts.LayerGraph, *costs: tuple[int, CodecCost]) -> CodecTable:
    rows = tuple(CodecRow(point, graph.point(point).name, 1.0, cost) for point, cost in costs)
    return CodecTable("Sequential", graph.fingerprint, graph.batch, 1, "", rows)


def test_codecs_compete_and_lossy_ones_only_within_the_budget() -> None:
    graph, device, server = small()
    table = table_of(
        graph,
        (0, CodecCost("zstd", 100.0, 0.001, 0.002, True, True)),
        (0, CodecCost("int4", 1.0, 0.001, 0.002, False, False)),
        (1, CodecCost("int8", 10.0, 0.001, 0.002, False, True)),
    )
    frontier = Frontier.build(graph, device, server, table)
    assert {(row.index, row.codec) for row in frontier.rows} <= {
        (0, "raw"), (0, "zstd"), (1, "raw"), (1, "int8"), (2, "raw"), (3, "raw")
    }  # fmt: skip
    slow = ts.Link("slow", 3e3, 1e6, 0.0)
    assert frontier.best(slow).codec == "zstd"
    row = frontier.best(slow)
    terms = frontier.terms(row, slow, load=2.0, slowdown=3.0)
    assert terms.latency_s == pytest.approx(3 * 0.001 + 800 / 3e3 + 2 * (0.002 + 0.07) + 40 * 8 / 1e6)
    assert frontier.costs(slow, 2.0, 3.0).min() == pytest.approx(terms.latency_s)
    other = dataclasses.replace(table, fingerprint="00")
    with pytest.raises(ts.CodecError):
        Frontier.build(graph, device, server, other)


def test_what_the_device_takes_counts_its_radio_and_encoding() -> None:
    graph, device, server = small()
    table = table_of(graph, (1, CodecCost("zstd", 500.0, 0.07, 0.0, True, True)))
    radio = ts.Radio(1e-6, 2e-6, 0.5, tail_s=2.0, tail_w=0.25)
    link = ts.Link("radio", 1e5, 1e6, 0.1, radio=radio)
    row = next(r for r in LayerCosts(graph, device, server).rows(table) if r.codec == "zstd")
    frontier = Frontier.of(graph, [row])
    watts = 6.0 / 0.7
    sending, receiving = (0.1 + 0.5) * 500 * 8 / 1e5, (2.0 + 0.5) * 40 * 8 / 1e6
    wanted = 1.0 + 0.07 * watts + sending + receiving + 0.5
    assert frontier.terms(row, link).energy_j == pytest.approx(wanted)
    assert float(frontier.costs(link, objective="energy")[0]) == pytest.approx(wanted)
    assert float(frontier.costs(link.back_to_back(), objective="energy")[0]) == pytest.approx(wanted - 0.5)


def test_energy_that_nobody_metered_is_not_planned_for() -> None:
    graph, device, server = small()
    blind = dataclasses.replace(device, energy=None)
    with pytest.raises(ts.PlanError, match="no joules"):
        Frontier.build(graph, blind, server).best(ts.Link.parse("lte"), objective="energy")
    with pytest.raises(ts.LinkError, match="radio"):
        Frontier.build(graph, device, server).best(ts.Link("bare", 1e6, 1e6, 0.0), objective="energy")


SUM = Objective(latency=1.0, energy=0.5, throughput=2.0, server_time=3.0)
IN_FLIGHT = Objective(latency=0.3, throughput=1.0, in_flight=3)
OBJECTIVES = [Objective.of(name) for name in ("latency", "energy", "throughput", "server_time")] + [SUM, IN_FLIGHT]


def grown(frontier: Frontier, scale: float) -> Frontier:
    """The frontier of a model whose layers take so many times as long and as many joules, and give as many bytes."""
    amounts = ("head_s", "encode_s", "size_bytes", "tail_s", "decode_s", "device_j")
    rows = [dataclasses.replace(r, **{name: getattr(r, name) * scale for name in amounts}) for r in frontier.rows]
    return dataclasses.replace(frontier, rows=tuple(rows), answer_bytes=frontier.answer_bytes * scale)


@pytest.mark.parametrize("objective", ["latency", *OBJECTIVES], ids=str)
@settings(deadline=None, max_examples=20, phases=PHASES)
@given(problems(2, 5), LINKS, FACTORS, FACTORS, st.floats(1e-3, 1e3))
def test_a_call_of_another_size_costs_what_the_example_of_such_a_model_costs(
    objective, problem, link, load, slowdown, scale
) -> None:
    """Its seconds, joules and bytes grow alike; the link is the same, its round trip and the radio's tail included."""
    frontier = Frontier.build(*problem)
    expected = grown(frontier, scale).costs(link, load, slowdown, objective)
    assert frontier.costs(link, load, slowdown, objective, scale) == pytest.approx(expected)
    best = frontier.best(link, load, slowdown, objective, scale)
    assert expected[frontier.rows.index(best)] == pytest.approx(expected.min())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("scale", [0.25, 1.0, 8.0])
def test_what_a_call_of_another_size_costs_is_what_is_decided_by(objective: Objective, scale: float) -> None:
    frontier, sizes = Frontier.build(*small()), grown(Frontier.build(*small()), scale)
    decider = Decider(frontier.rows, lambda *known, **size: frontier.costs(*known, objective, **size))
    for bit_s in (1e3, 1e4, 1e5, 1e7):
        link = ts.Link("known", bit_s, 1e6, 0.3, radio=ts.Radio(3e-7, 1e-7, 0.5, 1.0, 2.0))
        up, down, trip, load, slowdown = (Quantity(one, 0.0, 0.0, 0.0) for one in (bit_s, 1e6, 0.3, 2.0, 3.0))
        known = Estimates(LinkEstimate(up, down, trip, link.radio), LoadEstimate(load, 0.0), slowdown, scale)
        decision = decider.decide(known)
        expected = sizes.costs(link, 2.0, 3.0, objective)
        assert decision.cost == pytest.approx(expected.min())
        assert expected[frontier.rows.index(decision.row)] == pytest.approx(expected.min())


def test_a_larger_call_waits_for_the_round_trip_and_in_the_queue_only_once() -> None:
    frontier = Frontier.build(*small())
    row = next(row for row in frontier.rows if not row.on_device)
    up, down = Quantity(1e6, 0.1, 0.1, 0.0), Quantity(2e6, 0.1, 0.1, 0.0)
    link = LinkEstimate(up, down, Quantity(0.3, 0.1, 0.1, 0.0), None)
    load = LoadEstimate(Quantity(1.5, 0.1, 0.1, 0.0), 0.2)
    once, often = (frontier.expected(row, link, load, 1.2, scale) for scale in (1.0, 8.0))
    assert once.round_trip_s == often.round_trip_s == pytest.approx(0.5)
    assert often.remote_s - 0.5 == pytest.approx(8 * (once.remote_s - 0.5))
    assert frontier.expected(row, link, load, 1.2) == once


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_sizes_that_cannot_be_are_refused(scale: float) -> None:
    frontier = Frontier.build(*small())
    with pytest.raises(ts.PlanError, match=r"scale must be a positive number; got (0.0|-1.0|nan|inf)"):
        frontier.costs(ts.Link.parse("lte"), scale=scale)
    with pytest.raises(ts.PlanError, match=r"load must be a positive number; got -1.0"):
        frontier.costs(ts.Link.parse("lte"), -1.0, -1.0, scale=scale)


@pytest.mark.parametrize("factors", [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf")), (1.0, 0.0)])
def test_loads_that_cannot_be_are_refused(factors: tuple[float, float]) -> None:
    frontier = Frontier.build(*small())
    with pytest.raises(ts.PlanError, match=r"(load|slowdown) must be a positive number; got (0.0|-1.0|nan|inf)"):
        frontier.best(ts.Link.parse("lte"), *factors)


def test_unknown_objectives_and_weights_that_cannot_be_are_refused() -> None:
    frontier = Frontier.build(*small())
    for wanted in ("speed", {"latency": -1.0}, {"latency": 0.0}, {"latency": float("nan")}, {"joy": 1.0}):
        with pytest.raises(ts.PlanError):
            frontier.best(ts.Link.parse("lte"), objective=wanted)  # type: ignore[arg-type]


def test_profiles_of_another_graph_or_batch_size_are_refused() -> None:
    graph, device, server = small()
    for pair in ((dataclasses.replace(device, batch=8), server), (device, dataclasses.replace(server, batch=8))):
        with pytest.raises(ts.ProfileError, match=r"batch size .*; got 8"):
            Frontier.build(graph, *pair)
    with pytest.raises(ts.ProfileError, match="fingerprint"):
        Frontier.build(graph, device, dataclasses.replace(server, fingerprint="00"))


def test_a_frontier_is_the_same_after_a_journey_as_json(tmp_path: Path) -> None:
    frontier = Frontier.build(*small())
    frontier.save(tmp_path / "frontier.json")
    read = Frontier.load(tmp_path / "frontier.json")
    assert read.rows == frontier.rows
    link = ts.Link.parse("wifi")
    for objective in ("latency", "energy", "throughput", "server_time"):
        assert read.best(link, 1.5, 2.0, objective) == frontier.best(link, 1.5, 2.0, objective)
    data = json.loads((tmp_path / "frontier.json").read_text())
    for damaged in ({}, [], {**data, "format": "other"}, {k: v for k, v in data.items() if k != "rows"}):
        with pytest.raises(ts.PlanError):
            Frontier.from_json(damaged)
    for name, value in itertools.product(
        ("head_s", "size_bytes", "tail_s"), (float("nan"), -1.0, 1e300, 10**400, "x", None)
    ):
        rows = [{**data["rows"][0], name: value}, *data["rows"][1:]]
        with pytest.raises(ts.PlanError, match="wrong value"):
            Frontier.from_json({**data, "rows": rows})
    for name, value in (
        ("index", 1.5), ("name", None), ("codec", 3), ("device_j", "much"), ("memory_bytes", "all"), ("lossless", 1),
        ("raw_input", "no"), ("on_device", None), ("layers", [0.5]), ("layers", 3), ("findings", [1]), ("student", 0),
        ("backend", None), ("server_backend", 5),
    ):  # fmt: skip
        rows = [{**data["rows"][0], name: value}, *data["rows"][1:]]
        with pytest.raises(ts.PlanError, match=f"wrong value: {name} must be .*; got"):
            Frontier.from_json({**data, "rows": rows})
    found = {"measure": "cosine", "estimate": 1.0, "bound": float("nan"), "limit": 0.9, "count": 40, "kept": True}
    with pytest.raises(ts.PlanError, match=r"wrong value: bound must be .*; got nan"):
        Frontier.from_json({**data, "rows": [{**data["rows"][0], "findings": [found]}, *data["rows"][1:]]})
    with pytest.raises(ts.PlanError, match="answer_bytes"):
        Frontier.from_json({**data, "answer_bytes": float("nan")})
    for text in ("[" * 100_000, "9" * 5_000):
        (tmp_path / "frontier.json").write_text(text)
        with pytest.raises(ts.PlanError, match="is not JSON"):
            Frontier.load(tmp_path / "frontier.json")
    with pytest.raises(ts.PlanError, match="cannot be read"):
        Frontier.load(tmp_path / "absent.json")


def some_closed_sets(graph: ts.LayerGraph, seed: int, most: int) -> list[list[int]]:
    """Closed sets that are no prefixes, drawn by adding layers whose needs are met in a random order."""
    rng, needs, found = np.random.default_rng(seed), graph.closure.needs, set()
    for _ in range(8):
        inside: set[int] = set()
        while len(inside) < len(needs) - 1:
            ready = [i for i in range(len(needs)) if i not in inside and inside.issuperset(needs[i])]
            inside.add(int(rng.choice(ready)))
            if max(inside) >= len(inside):
                found.add(tuple(sorted(inside)))
    return [list(layers) for layers in sorted(found)][:most]


@pytest.mark.filterwarnings("ignore::torchsurgeon.UnrepeatableWarning")
@pytest.mark.parametrize("name", CASES)
def test_cuts_across_the_branches_of_hard_models_give_their_bits(name: str) -> None:
    made, *args = CASES[name]()
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    args = args[:1] if len(args) == 2 and isinstance(args[-1], list) else args
    with torch.no_grad():
        graph = ts.trace(made.eval(), *args, **kwargs)
        expected = made(*copied(args), **copied(kwargs))
        for layers in some_closed_sets(graph, seed=0, most=30):
            if graph.closure.prefixes_only:
                with pytest.raises(ts.PartitionError, match="memory"):
                    graph.point_of(layers)
            else:
                batch = graph.inputs[0].example_batch if graph.batch_free else None
                check_point(graph, graph.point_of(layers), tuple(args), kwargs, expected, batch)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(operation, min_size=3, max_size=14), st.lists(st.integers(0, 15), min_size=1, max_size=3), st.integers(0)
)
def test_cuts_across_the_branches_of_random_programs_give_their_bits(operations, outputs, seed) -> None:
    program = possible(operations, outputs)
    with torch.no_grad():
        graph = ts.trace(program, *example())
        expected, batch = program(*example()), 4 if graph.batch_free else None
        for layers in some_closed_sets(graph, seed, most=12) if not graph.closure.prefixes_only else []:
            check_point(graph, graph.point_of(layers), example(), {}, expected, batch)


@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5", "maxvit_t"])
def test_cuts_across_the_branches_of_torchvision_models_give_their_bits(name: str) -> None:
    zoo = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "googlenet" else {}
    made, x = zoo.get_model(name, weights=None, **options).eval(), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        graph = ts.trace(made, x)
        expected = made(x)
        sets_of = some_closed_sets(graph, seed=1, most=10**6)
        for layers in sets_of[:: max(1, len(sets_of) // 6)]:
            check_point(graph, graph.point_of(layers), (x,), {}, expected, 1)
