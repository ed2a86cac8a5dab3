"""Simulated queues agree with what queueing theory says in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from torchsurgeon.errors import SimulationError
from torchsurgeon.simulate import (
    CONSTANT,
    EXPONENTIAL,
    SHAPES,
    Demand,
    Estimate,
    Shape,
    erlang_c,
    mean_wait_s,
    simulate_queue,
)
from torchsurgeon.simulate.formulas import response_percentile_s
from torchsurgeon.simulate.queue import Draws, waits_s

LONG = {"queries": 40_000, "replications": 20}
SERVICE_S = 0.02


@pytest.mark.parametrize(("servers", "utilization"), [(1, 0.5), (1, 0.8), (2, 0.7), (8, 0.8), (16, 0.9)])
def test_waits_with_poisson_arrivals_and_exponential_service_are_those_of_erlang(
    servers: int, utilization: float
) -> None:
    rate_per_s = servers * utilization / SERVICE_S
    found = simulate_queue(Demand.of(SERVICE_S), rate_per_s, servers, **LONG, seed=3)
    assert found.utilization == pytest.approx(utilization)
    exact_s = mean_wait_s(servers, utilization, SERVICE_S)
    assert found.mean_wait_s.value == pytest.approx(exact_s, rel=0.06)
    assert near(found.mean_wait_s, exact_s)
    assert (found.waits_s > 0).mean() == pytest.approx(erlang_c(servers, utilization), abs=0.02)
    for percentile in (50, 99):
        exact_s = response_percentile_s(servers, utilization, SERVICE_S, percentile)
        assert found.percentile_s(percentile).value == pytest.approx(exact_s, rel=0.06)


@pytest.mark.parametrize(
    ("service", "utilization"),
    [(CONSTANT, 0.8), (Shape.of_quantiles("uniform", [0, 1], [0, 1]), 0.7), (SHAPES["web-search-service"], 0.6)],
    ids=["M/D/1", "M/U/1", "web search"],
)
def test_waits_at_one_server_are_those_of_pollaczek_and_khinchine(service: Shape, utilization: float) -> None:
    found = simulate_queue(Demand.of(1.0), utilization, 1, service=service, **LONG, seed=5)
    exact_s = mean_wait_s(1, utilization, 1.0, service.variation)
    assert found.mean_wait_s.value == pytest.approx(exact_s, rel=0.06)
    assert near(found.mean_wait_s, exact_s)


def test_a_mix_of_kinds_waits_as_its_own_variation_says() -> None:
    """Two kinds of constant service times are one kind that varies, and Pollaczek and Khinchine count only that."""
    demand = Demand((0.9, 0.1), (0.5, 5.5))
    variation = ((0.9 * 0.5**2 + 0.1 * 5.5**2) / demand.mean_s**2 - 1) ** 0.5
    found = simulate_queue(demand, 0.6 / demand.mean_s, 1, service=CONSTANT, **LONG)
    assert found.mean_wait_s.value == pytest.approx(mean_wait_s(1, 0.6, demand.mean_s, variation), rel=0.06)


@pytest.mark.parametrize("share", [0.5, 0.004])
def test_inferences_on_devices_leave_the_servers_to_the_others(share: float) -> None:
    """A thinned Poisson process is one, so the servers cannot tell where the other inferences ran."""
    demand = Demand((1 - share, share), (0.0, 1.0))
    found = simulate_queue(demand, 0.8 / share, 1, **LONG)
    assert found.utilization == pytest.approx(0.8)
    assert found.mean_wait_s.value == pytest.approx(mean_wait_s(1, 0.8, 1.0), rel=0.08)


def test_one_server_is_simulated_alike_by_its_closed_form_and_by_the_loop() -> None:
    draws = Draws.draw(Demand.of(1.0), EXPONENTIAL, EXPONENTIAL, 2_000, 3, 0)
    rates = np.array([0.5, 0.9, 1.3])
    at_once = waits_s(draws, rates, 1)
    for column, rate in enumerate(rates):
        free_s = 0.0
        for query, (at, service_s) in enumerate(
            zip(draws.arrivals[:, column], draws.service_s[:, column], strict=True)
        ):
            begin_s = max(free_s, at / rate)
            assert at_once[query, column] == pytest.approx(begin_s - at / rate, abs=1e-9)
            free_s = begin_s + service_s


@pytest.mark.parametrize("many", [2, 100], ids=["a heap", "at once"])
def test_several_servers_are_those_of_a_plain_loop(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsurgeon.simulate.queue._MANY", many)
    draws = Draws.draw(Demand.of(1.0), EXPONENTIAL, EXPONENTIAL, 500, 2, 0)
    waits = waits_s(draws, np.array([2.5, 3.5]), 3)
    for column, rate in enumerate((2.5, 3.5)):
        free_s = [0.0, 0.0, 0.0]
        for query, (at, service_s) in enumerate(
            zip(draws.arrivals[:, column], draws.service_s[:, column], strict=True)
        ):
            first = min(range(3), key=free_s.__getitem__)
            begin_s = max(free_s[first], at / rate)
            assert waits[query, column] == pytest.approx(begin_s - at / rate, abs=1e-12)
            free_s[first] = begin_s + service_s


def test_a_seed_gives_the_same_times_again() -> None:
    first, again, other = (
        simulate_queue(Demand.of(1.0), 1.5, 2, queries=1_000, replications=2, seed=seed) for seed in (7, 7, 8)
    )
    assert np.array_equal(first.responses_s, again.responses_s)
    assert not np.array_equal(first.responses_s, other.responses_s)


def test_confidence_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    intervals = [Estimate.of(generator.normal(5, 2, 10)) for _ in range(2_000)]
    assert np.mean([each.low <= 5 <= each.high for each in intervals]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate_per_s": 0.0}, "rate of inferences must be a positive number per second; got 0.0"),
        ({"rate_per_s": float("nan")}, "rate of inferences"),
        ({"servers": 0}, "number of servers must be a whole number from 1 to 10,000, .*; got 0;"),
        ({"servers": 2.5}, "number of servers"),
        ({"queries": 10}, "number of queries must be a whole number from 1000 on; got 10"),
        ({"servers": 10**9}, r"from 1 to 10,000, .*; got 1000000000; .*settle\(\) takes any number"),
        ({"servers": 400, "queries": 1000}, "at least 20 for each server, .*; got 1000 for 400 .*; give queries=8000"),
        ({"replications": 1}, "number of replications"),
        ({"demand": Demand.of(0.0)}, "no inference reaches a server"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    given = {"demand": Demand.of(1.0), "rate_per_s": 1.0, "servers": 1} | arguments
    with pytest.raises(SimulationError, match=message):
        simulate_queue(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "service_s", "message"),
    [
        ((0.5, 0.4), (1.0, 1.0), "add up to 1; got 0.9"),
        ((1.5, -0.5), (1.0, 1.0), "share must be zero or a positive number; got -0.5"),
        ((1.0,), (float("inf"),), "service time must be zero or a positive number; got inf"),
        ((1.0,), (1.0, 2.0), "1 shares and 2 service times"),
        ((), (), "0 shares and 0 service times"),
    ],
)
def test_wrong_demands_are_refused(shares: tuple[float, ...], service_s: tuple[float, ...], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        Demand(shares, service_s)


@pytest.mark.parametrize("percentile", [1e-6, 50, 99.9999999999, 99.99999999999999])
@pytest.mark.parametrize(("servers", "utilization"), [(1, 0.0), (1, 1e-9), (1, 0.999999), (2, 0.5), (2, 0.500001)])
def test_percentiles_of_responses_are_found_to_both_ends(servers: int, utilization: float, percentile: float) -> None:
    one_s, short_s = (response_percentile_s(servers, utilization, s, percentile) for s in (1.0, 1e-12))
    assert short_s == pytest.approx(one_s * 1e-12)
    if servers == 1:
        # A response of a single server is exponential.
        exact_s = -math.log(1 - percentile / 100) / (1 - utilization)
        assert one_s == pytest.approx(exact_s, rel=1e-3)
    near_s = response_percentile_s(servers, min(utilization * 1.001, 0.9999991), 1.0, percentile)
    assert one_s <= near_s * (1 + 1e-3)


@pytest.mark.parametrize(
    ("service_s", "percentile", "message"),
    [
        (0.0, 99, "service time must be a positive number of seconds; got 0.0"),
        (math.nan, 99, "service time"),
        (1.0, 0, "percentile must be above 0 and below 100; got 0"),
        (1.0, 100.0, "percentile"),
        (1.0, "high", "percentile"),
    ],
)
def test_percentiles_of_responses_that_there_are_none_of(service_s: float, percentile: Any, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        response_percentile_s(2, 0.5, service_s, percentile)


def test_a_percentile_must_be_one() -> None:
    found = simulate_queue(Demand.of(1.0), 0.5, 1, queries=1_000, replications=2)
    with pytest.raises(SimulationError, match="above 0 and below 100; got 100"):
        found.percentile_s(100)


def test_closed_forms_refuse_servers_that_are_asked_for_more_than_they_have() -> None:
    with pytest.raises(SimulationError, match="below 1"):
        erlang_c(4, 1.0)
    with pytest.raises(SimulationError, match="number of servers"):
        mean_wait_s(0, 0.5, 1.0)
    with pytest.raises(SimulationError, match="service time"):
        mean_wait_s(1, 0.5, -1.0)


def near(estimate: Estimate, exact: float) -> bool:
    """Whether the truth lies within twice the interval, which chance leaves once in ten thousand times."""
    return abs(estimate.value - exact) <= 2 * (estimate.high - estimate.value)
