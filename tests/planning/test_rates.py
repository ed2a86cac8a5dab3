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
from torchsurgeon.planning import Frontier
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


# --- students ---


def students(head_s: float = 1e-3) -> list[CodecRow]:
    """A student at two rates, of which the lower one breaks the budget."""
    rows = [
        row("fitted:small-01234567@2", 40.0, changed(0.01, 0.0298)),
        row("fitted:small-01234567@1", 20.0, changed(0.06, 0.09)),
    ]
    return [dataclasses.replace(one, cost=dataclasses.replace(one.cost, head_share=head_s / 0.62)) for one in rows]


def test_a_student_is_a_row_with_seconds_of_its_own_beside_the_models() -> None:
    frontier = Frontier.build(GRAPH, DEVICE, SERVER, table(*RATES, *students()))
    (found,) = [r for r in frontier.rows if r.student]
    assert (found.index, found.codec, found.lossless) == (CUT, "fitted:small-01234567@2", False)
    assert found.head_s == pytest.approx(1e-3), "its share of the whole model's seconds on the device"
    assert found.tail_s == pytest.approx(2e-3)
    assert not found.raw_input
    assert found.budget_used == pytest.approx(0.0298 / 0.03)
    own = [r for r in frontier.rows if r.index == CUT and not r.student]
    assert {r.codec for r in own} >= {"raw", "fitted:cut-01234567@1"}
    assert [r.head_s for r in own] == [pytest.approx(0.02)] * len(own)
    assert Frontier.from_json(frontier.to_json()).rows == frontier.rows


def test_a_plan_takes_a_student_where_it_is_the_quickest_and_says_so() -> None:
    link = ts.Link("slow", 1e5, 1e6, 0.01)
    plan = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, codecs=table(*RATES, *students()))
    assert plan.row.student
    assert plan.terms.head_s == pytest.approx(1e-3)
    assert plan.explain().startswith("Sequential: a student in place of the layers up to 1 as fitted:small-01234567@2")
    assert plan.runner_up is not None
    assert not plan.runner_up.row.student
    late = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, codecs=table(*RATES, *students(head_s=1.0)))
    assert not late.row.student
    slowed = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, slowdown=2.0, codecs=table(*students()))
    assert slowed.terms.head_s == pytest.approx(2e-3)


def test_another_student_at_the_same_cut_is_another_way() -> None:
    link = ts.Link("slow", 1e5, 1e6, 0.01)
    second = row("fitted:second-89abcdef@2", 60.0, changed(0.01, 0.0224))
    second = dataclasses.replace(second, cost=dataclasses.replace(second.cost, head_share=2e-3 / 0.62))
    plan = ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, codecs=table(*students(), second))
    assert plan.runner_up is not None
    assert (plan.codec, plan.runner_up.row.codec) == ("fitted:small-01234567@2", "fitted:second-89abcdef@2")


def test_the_energy_of_a_student_is_that_of_its_seconds() -> None:
    metered = profile_of([0.02, 0.0, 0.3, 0.3], [0.2, 0.0, 3.0, 3.0])
    (found,) = [r for r in Frontier.build(GRAPH, metered, SERVER, table(*students())).rows if r.student]
    watts = 6.2 / 0.62
    assert found.device_j == pytest.approx(watts * (1e-3 + 1e-4))


def test_a_chain_uses_no_student() -> None:
    link = ts.Link("slow", 1e5, 1e6, 0.01)
    plan = ts.plan(GRAPH, stages=[DEVICE, SERVER], links=[link], codecs=table(*students()))
    assert not any(r.student for r in plan.rows)
