"""Codecs at several rates in a plan: each rate is a row, and a plan says how much of the accuracy budget it uses."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable, Finding
from torchsurgeon.planning import Frontier, HeadCosts
from torchsurgeon.profiling import LayerEnergy, LayerProfile

torch.set_num_threads(1)
BUDGET = "at most 3.00% of predictions change; with 0.95 confidence"


def graph_of() -> ts.LayerGraph:
    torch.manual_seed(0)
    layers = nn.Linear(100, 40), nn.ReLU(), nn.Linear(40, 60), nn.Linear(60, 10)
    return ts.trace(nn.Sequential(*layers).eval(), torch.rand(1, 100))


GRAPH = graph_of()
CUT = GRAPH.point("1").index


def profile_of(seconds: list[float], joules: list[float] | None = None) -> LayerProfile:
    samples, names = np.array([seconds]), tuple(layer.name for layer in GRAPH.layers)
    made = LayerProfile("Sequential", GRAPH.fingerprint, 1, names, samples, samples.sum(axis=1), {})
    if joules is None:
        return made
    whole = float(sum(joules))
    spread = np.zeros((len(joules), 2))
    return dataclasses.replace(made, energy=LayerEnergy("drawn", 0.0, np.array(joules), spread, (whole,) * 3))


DEVICE, SERVER = profile_of([0.02, 0.0, 0.3, 0.3]), profile_of([1e-3, 1e-4, 1e-3, 1e-3])


def changed(estimate: float, bound: float) -> Finding:
    return Finding("top-1 changed", estimate, bound, 0.03, 210, bound <= 0.03)


def row(codec: str, size_bytes: float, finding: Finding | None = None, *, point: int = CUT, coding_s: float = 1e-4):
    cost = CodecCost(codec, size_bytes, coding_s, coding_s, finding is None, finding is None or finding.kept)
    return CodecRow(point, GRAPH.points[point].name, 160.0, cost, None, () if finding is None else (finding,))


RATES = (
    row("fitted:cut-01234567@4", 100.0, changed(0.0, 0.0142)),
    row("fitted:cut-01234567@2", 60.0, changed(0.005, 0.0224)),
    row("fitted:cut-01234567@1", 30.0, changed(0.01, 0.0298)),
    row("fitted:cut-01234567@0.5", 15.0, changed(0.06, 0.09)),
)
QUALITIES = (
    row("png", 320.0, point=0),
    row("webp-95", 200.0, changed(0.005, 0.0224), point=0),
    row("webp-80", 120.0, changed(0.01, 0.0298), point=0),
)


def table(*rows: CodecRow) -> CodecTable:
    return CodecTable("Sequential", GRAPH.fingerprint, 1, 210, BUDGET, rows)


def test_every_rate_and_quality_within_the_budget_is_a_row() -> None:
    frontier = Frontier.build(GRAPH, DEVICE, SERVER, table(*RATES, *QUALITIES))
    at_cut = [(r.codec, r.size_bytes) for r in frontier.rows if r.index == CUT]
    assert at_cut == [
        ("raw", 160.0),
        ("fitted:cut-01234567@4", 100.0),
        ("fitted:cut-01234567@2", 60.0),
        ("fitted:cut-01234567@1", 30.0),
    ]
    assert [r.codec for r in frontier.rows if r.index == 0] == ["raw", "png", "webp-95", "webp-80"]
    used = [r.budget_used for r in frontier.rows if r.index == CUT]
    assert used == sorted(used)
    assert used == pytest.approx([0, 0.0142 / 0.03, 0.0224 / 0.03, 0.0298 / 0.03])


def test_a_row_that_costs_no_less_and_changes_no_less_is_left_out() -> None:
    worse = row("fitted:cut-01234567@1.5", 61.0, changed(0.01, 0.0298))
    frontier = Frontier.build(GRAPH, DEVICE, SERVER, table(*RATES, worse))
    assert worse.cost.codec not in {r.codec for r in frontier.rows}


def test_the_least_cost_decides_and_where_costs_are_equal_the_budget() -> None:
    frontier = Frontier.build(GRAPH, DEVICE, SERVER, table(*RATES))
    slow, quick = ts.Link("slow", 1e4, 1e6, 0.01), ts.Link("quick", 1e6, 1e6, 0.01)
    assert frontier.best(slow).codec == "fitted:cut-01234567@1"
    # Over the quick link the device is the slowest stage, whatever is sent.
    encoded = [row("raw", 160.0), *RATES]
    streams = {"device": DEVICE, "server": SERVER, "link": quick, "objective": "throughput"}
    assert ts.plan(GRAPH, **streams, codecs=table(*encoded), min_layers=CUT).codec == "raw"
    for link in (slow, quick):
        for objective in ("latency", "throughput"):
            least = frontier.costs(link, objective=objective).min()
            best = frontier.best(link, objective=objective)
            assert frontier.costs(link, objective=objective)[frontier.rows.index(best)] == least


def test_a_frontier_with_rates_is_read_back_as_it_was() -> None:
    frontier = Frontier.build(GRAPH, DEVICE, SERVER, table(*RATES))
    assert Frontier.from_json(frontier.to_json()).rows == frontier.rows


def test_a_plan_explains_what_the_codec_changes_and_how_surely() -> None:
    link = ts.Link("slow", 2e3, 1e6, 0.01)
    plan = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, codecs=table(*RATES, *QUALITIES))
    assert plan.codec == "fitted:cut-01234567@1"
    text = plan.explain()
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    (changes,) = [line for line in cells if line[0] == "top-1 changed"]
    assert changes[1:3] == ["1.0% (≤ 3.0%)", "–"]
    (used,) = [line for line in cells if line[0] == "budget used"]
    assert used[1:3] == ["99%", "0%"]
    assert (
        "fitted:cut-01234567@1: top-1 changed was 1.0% in 210 measured, so it is surely at most 3.0% in all; the limit "
        "is 3.0%, of which 99% is used" in text
    )
    assert f"the budget: {BUDGET}" in text
    exact = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link)
    assert "budget" not in exact.explain()


def test_a_codec_of_which_nothing_was_measured_counts_as_using_all_of_the_budget() -> None:
    unknown = CodecRow(CUT, "1", 160.0, CodecCost("int8", 20.0, 1e-4, 1e-4, False, True))
    plan = ts.plan(
        GRAPH, device=DEVICE, server=SERVER, link=ts.Link("slow", 2e3, 1e6, 0.01), codecs=table(unknown, *RATES)
    )
    assert (plan.codec, plan.row.budget_used) == ("int8", 1.0)
    assert "what the codec changes was not measured, only that it is within the budget" in plan.explain()


@pytest.mark.parametrize(
    ("finding", "used"),
    [
        (changed(0.0, 0.0142), 0.0142 / 0.03),
        (Finding("cosine", 0.9996, 0.9995, 0.999, 100, True), 0.5),
        (Finding("accepted", 1.0, 0.995, 0.99, 600, True), 0.5),
        (Finding("boxes_matched", 0.99, 0.98, 0.95, 60, True), 0.4),
        # Where the estimate decides, the bound may be beyond the limit.
        (Finding("top-1 changed", 0.01, 0.09, 0.03, 32, True), 1 / 3),
        (Finding("top-1 changed", 0.06, 0.12, 0.03, 100, False), 4.0),
        (Finding("top-1 changed", 0.0, 0.0, 0.0, 10, True), 0.0),
        (Finding("a score of mine", 3.0, 2.5, 2.0, 60, True), None),
    ],
)
def test_what_is_used_of_a_limit(finding: Finding, used: float | None) -> None:
    assert finding.used == (used if used is None else pytest.approx(used))


# --- another head ---


def student(**options: float) -> HeadCosts:
    costs = {"head_s": 1e-3, **options}
    behind = (
        row("raw", 160.0, changed(0.005, 0.0224)),
        row("fitted:small-01234567@2", 40.0, changed(0.01, 0.0298)),
        row("fitted:small-01234567@1", 20.0, changed(0.06, 0.09)),
    )
    return HeadCosts("small", CUT, costs.pop("head_s"), behind, **costs)


def test_another_head_is_a_row_with_costs_of_its_own_beside_the_models() -> None:
    frontier = Frontier.build(GRAPH, DEVICE, SERVER, table(*RATES), heads=[student()])
    behind = {r.codec: r for r in frontier.rows if r.head}
    assert set(behind) == {"raw", "fitted:small-01234567@2"}
    for found in behind.values():
        assert (found.index, found.head, found.head_s, found.lossless) == (CUT, "small", 1e-3, False)
        assert found.tail_s == pytest.approx(2e-3)
        assert not found.raw_input
    assert behind["raw"].budget_used == pytest.approx(0.0224 / 0.03)
    assert {r.codec for r in frontier.rows if r.index == CUT and not r.head} >= {"raw", "fitted:cut-01234567@1"}
    assert Frontier.from_json(frontier.to_json()).rows == frontier.rows


def test_a_plan_takes_another_head_where_it_is_the_quickest_and_says_so() -> None:
    link = ts.Link("slow", 1e5, 1e6, 0.01)
    plan = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, codecs=table(*RATES), heads=[student()])
    assert (plan.row.head, plan.codec) == ("small", "fitted:small-01234567@2")
    assert plan.terms.head_s == 1e-3
    assert plan.explain().startswith("Sequential: small in place of the layers up to 1 as fitted:small-01234567@2")
    assert plan.runner_up is not None
    assert plan.runner_up.row.head == ""
    late = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, codecs=table(*RATES), heads=[student(head_s=1.0)])
    assert late.row.head == ""


def test_the_energy_and_memory_of_another_head_count() -> None:
    metered = profile_of([0.02, 0.0, 0.3, 0.3], [0.2, 0.0, 3.0, 3.0])
    link = ts.Link("slow", 1e5, 1e6, 0.01, radio=ts.Radio(1e-7, 1e-7, 0.1))
    plan = ts.plan(GRAPH, device=metered, server=SERVER, link=link, objective="energy", heads=[student(device_j=1e-3)])
    watts = 6.2 / 0.62
    assert plan.row.head == "small"
    assert plan.row.device_j == pytest.approx(1e-3 + watts * 1e-4)
    unmetered = Frontier.build(GRAPH, metered, SERVER, heads=[student()])
    assert not unmetered.has_energy


def test_heads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ts.PlanError, match="needs a name"):
        HeadCosts("", CUT, 1e-3, ())
    with pytest.raises(ts.PlanError, match="head_s of head 'small' must be zero or positive; got -1"):
        student(head_s=-1.0)
    with pytest.raises(ts.PlanError, match="between the model's layers, at a point from 1 to 3; got 0"):
        Frontier.build(GRAPH, DEVICE, SERVER, heads=[dataclasses.replace(student(), point=0)])
    with pytest.raises(ts.PartitionError, match="no partition point"):
        Frontier.build(GRAPH, DEVICE, SERVER, heads=[dataclasses.replace(student(), point=77)])
