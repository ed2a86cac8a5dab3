"""A plan is the best of all ways there are that keep its constraints: all closed sets of layers with all codecs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from brute_force import Problem

import torchsurgeon as ts
from torchsurgeon.planning import Frontier, sets

torch.set_num_threads(1)
GRAPHS, PARTS, QUESTIONS = 2000, 20, 3


@pytest.mark.parametrize("part", range(PARTS))
def test_a_plan_is_the_best_way_that_keeps_its_constraints(part: int) -> None:
    for seed in range(part, GRAPHS, PARTS):
        problem = Problem(seed)
        for _ in range(QUESTIONS):
            objective, limits = problem.question()
            asked = f"seed {seed}: {objective} under {limits}"
            least = problem.least(objective, limits)
            if least is None:
                with pytest.raises(ts.InfeasibleError):
                    problem.plan(objective, limits)
                continue
            plan = problem.plan(objective, limits)
            assert plan.value == pytest.approx(least, rel=1e-6, abs=1e-9), asked


@pytest.mark.parametrize(
    "objective",
    ["latency", "energy", {"energy": 1.0, "server_time": 10.0}, {"latency": 1.0, "energy": 0.4, "server_time": 0.1}],
    ids=str,
)
def test_minimum_cuts_find_the_best_of_every_weighted_sum(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joules that are in no proportion to seconds make four columns, and the best of their sums may be on no three."""
    monkeypatch.setattr(sets, "_MOST_SETS", 1)
    asked = [problem for problem in (Problem(seed, 11) for seed in range(120)) if problem.codecs is None]
    for problem in asked:
        plan = problem.plan(objective, {})
        assert plan.frontier.exact
        assert plan.value == pytest.approx(problem.least(objective, {}), rel=1e-6, abs=1e-9)


def test_a_frontier_is_exact_for_the_objective_that_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(problem for problem in map(Problem, range(100)) if len(problem.across) > 5)
    build = functools.partial(Frontier.build, problem.graph, problem.device, problem.server)
    assert build().exact
    monkeypatch.setattr(sets, "_MOST_ROWS", 0)
    assert not build().exact, "only those on the hull are left, and the best throughput need not be one"
    assert problem.plan("latency", {}).frontier.exact
    assert problem.plan("throughput", {}).frontier.exact
    monkeypatch.setattr(sets, "_MOST_SETS", 1)
    assert problem.plan("latency", {}).frontier.exact
    assert not problem.plan("throughput", {}).frontier.exact
    monkeypatch.setattr(sets, "_MOST_CUTS", 0)
    assert not problem.plan("latency", {}).frontier.exact


def test_what_a_constraint_costs_and_the_runner_up_are_those_of_all_ways() -> None:
    for seed in range(GRAPHS, GRAPHS + 50):
        problem = Problem(seed)
        for _ in range(QUESTIONS):
            objective, limits = problem.question()
            if problem.least(objective, limits) is None:
                continue
            plan = problem.plan(objective, limits)
            for name, value in plan.prices.items():
                others = {key: limit for key, limit in limits.items() if key != name}
                assert value == pytest.approx(problem.least(objective, others), rel=1e-6, abs=1e-9), (seed, name)
            row = plan.row
            chosen = tuple(range(row.index)) if row.layers is None else row.layers
            others_least = problem.least(objective, limits, but=chosen)
            assert (plan.runner_up is None) == (others_least is None), (seed, limits)
            if plan.runner_up is not None and not isinstance(objective, dict):
                found = {"latency": "latency_s", "energy": "energy_j", "throughput": "interval_s"}.get(objective)
                if found:
                    assert getattr(plan.runner_up, found) == pytest.approx(others_least, rel=1e-6, abs=1e-9), seed


def test_what_would_be_possible_under_other_constraints_is_that_of_all_ways() -> None:
    told = 0
    for seed in range(GRAPHS, GRAPHS + 100):
        problem = Problem(seed)
        for _ in range(QUESTIONS):
            objective, limits = problem.question()
            if problem.least(objective, limits) is not None:
                continue
            with pytest.raises(ts.InfeasibleError) as raised:
                problem.plan(objective, limits)
            for name in limits:
                others = {key: limit for key, limit in limits.items() if key != name}
                kept = [way for way in problem.ways if way.keeps(others)]
                measure = {
                    "latency_s": lambda way: way.latency,
                    "energy_j": lambda way: way.energy,
                    "memory_bytes": lambda way: way.memory_bytes,
                    "min_layers": lambda way: -len(way.layers),
                }.get(name, lambda way, objective=objective: way.value(objective))
                least = min(map(measure, kept), default=None)
                ours = raised.value.least[name]
                if least is None or ours is None:
                    assert least is ours, (seed, name, limits)
                else:
                    assert ours == pytest.approx(abs(least), rel=1e-6, abs=1e-9), (seed, name, limits)
                told += 1
    assert told


def test_a_view_of_an_input_is_an_input_that_must_not_leave_the_device() -> None:
    class Viewed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(12, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.flatten(1)))

    graph = ts.trace(Viewed().eval(), torch.rand(1, 3, 4))
    device, server = ts.profile(graph, repeats=2, meter=None), ts.profile(graph, repeats=2, meter=None)
    plan = ts.plan(graph, device=device, server=server, link="lte", objective="server_time", raw_input=False)
    cuts = {row.name for row in plan.rows}
    assert cuts == {"first", "second"}
