"""The highest rate that keeps a limit is the one that queueing theory says, and gains are compared in pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from frontiers import frontier
from scipy.optimize import brentq

from torchsurgeon.errors import SimulationError
from torchsurgeon.link import Link
from torchsurgeon.simulate import CONSTANT, EXPONENTIAL, SHAPES, Capacity, Demand, Shape, gain, highest_rate, sustained
from torchsurgeon.simulate.formulas import response_percentile_s

SHORT = {"queries": 4_000, "replications": 5}


@pytest.mark.parametrize(("servers", "limit_s"), [(1, 20.0), (4, 8.0)])
def test_the_highest_rate_is_that_of_the_closed_form(servers: int, limit_s: float) -> None:
    found = highest_rate(Demand.of(1.0), servers, limit_s, queries=40_000, replications=20)
    exact = servers * brentq(lambda u: response_percentile_s(servers, u, 1.0, 99) - limit_s, 0.05, 0.99)
    assert found.rate_per_s.value == pytest.approx(exact, rel=0.03)
    assert found.rate_per_s.low < found.rate_per_s.value < found.rate_per_s.high


def test_a_looser_limit_and_more_servers_sustain_more() -> None:
    def rate(servers: int, limit_s: float) -> float:
        return highest_rate(Demand.of(1.0), servers, limit_s, **SHORT).rate_per_s.value

    assert rate(2, 6.0) < rate(2, 12.0) < 2
    assert 2 * rate(2, 6.0) < rate(4, 6.0)


@pytest.mark.parametrize(
    ("servers", "limit_s", "service"), [(8, 1e6, EXPONENTIAL), (2, 20.0, SHAPES["web-search-service"])]
)
def test_no_rate_is_higher_than_the_servers_can_compute(servers: int, limit_s: float, service: Shape) -> None:
    """However lenient the limit is, and however short the service times of a replication happen to be."""
    found = highest_rate(Demand.of(0.5), servers, limit_s, service=service, queries=1_000, replications=20)
    assert found.rates_per_s.max() <= servers / 0.5
    assert found.rate_per_s.value == pytest.approx(servers / 0.5, rel=0.05)


def test_half_the_work_sustains_twice_the_rate() -> None:
    """Times and limit in halves are the same queue at twice the speed, replication by replication."""
    slow, quick = (highest_rate(Demand.of(s), 3, 10 * s, **SHORT) for s in (1.0, 0.5))
    twice = gain(quick, slow)
    assert twice.value == pytest.approx(2, rel=2e-3)
    assert twice.high - twice.low < 0.01


def test_waits_are_compared_where_kinds_of_inferences_go_to_the_devices() -> None:
    """Without the quick kind each query is served no later, yet a percentile of all responses rises."""
    both, slow_only = Demand((0.5, 0.5), (0.01, 1.0)), Demand((0.5, 0.5), (0.0, 1.0))
    long = {"queries": 20_000, "replications": 10}
    waits = [highest_rate(each, 2, 4.0, counted="wait", **long) for each in (both, slow_only)]
    responses = [highest_rate(each, 2, 6.0, counted="response", **long) for each in (both, slow_only)]
    assert gain(waits[1], waits[0]).value > gain(responses[1], responses[0]).value


def test_nothing_at_the_servers_sustains_any_rate() -> None:
    nothing = highest_rate(Demand.of(0.0), 2, 1.0, **SHORT)
    assert nothing.reaching == 0
    assert math.isinf(nothing.rate_per_s.value)
    something = highest_rate(Demand.of(1.0), 2, 10.0, **SHORT)
    assert math.isinf(gain(nothing, something).value)
    with pytest.raises(SimulationError, match="a baseline must sustain some rate"):
        gain(something, nothing)


def test_a_limit_below_the_service_itself_is_refused_with_the_least_one() -> None:
    with pytest.raises(SimulationError, match=r"at least 1 s.*without waiting; got 0.5 s"):
        highest_rate(Demand.of(1.0), 1, 0.5, service=CONSTANT, **SHORT)


def test_gains_need_as_many_replications() -> None:
    some = Capacity(np.ones(3), 1.0, 99, 1.0)
    with pytest.raises(SimulationError, match="got 4 and 3"):
        gain(Capacity(np.ones(4), 1.0, 99, 1.0), some)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit_s": 0}, "limit must be a positive number of seconds; got 0"),
        ({"percentile": 0}, "percentile must be above 0 and below 100; got 0"),
        ({"servers": -1}, "number of servers"),
        ({"counted": "median"}, 'must be "response" or "wait"; got \'median\''),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    given = {"demand": Demand.of(1.0), "servers": 1, "limit_s": 10.0} | arguments
    with pytest.raises(SimulationError, match=message):
        highest_rate(**given)  # type: ignore[arg-type]


def test_of_many_servers_so_many_queries_are_followed_that_they_fill() -> None:
    ways = sustained(frontier(), Link.parse("8/8/0"), 200, rate_per_s=3000.0, queries=1_000, replications=2)
    times = ways[0].times
    assert times is not None
    assert times.responses_s.shape == (3_000, 2), "of 20 queries a server, all but the first quarter"


def test_the_shapes_of_a_web_search_service_sustain_less_than_constant_times() -> None:
    web = highest_rate(
        Demand.of(1.0), 4, 12.0, arrivals=SHAPES["web-search-arrivals"], service=SHAPES["web-search-service"], **SHORT
    )
    constant = highest_rate(Demand.of(1.0), 4, 12.0, arrivals=CONSTANT, service=CONSTANT, **SHORT)
    assert web.rate_per_s.value < 0.95 * constant.rate_per_s.value
