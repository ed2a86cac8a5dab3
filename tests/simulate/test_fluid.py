"""Very many servers and devices settle where the load that devices choose by is the load that their choices make."""

from __future__ import annotations

import math

import numpy as np
import pytest
from frontiers import frontier, way

from torchsurgeon.errors import SimulationError
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Frontier
from torchsurgeon.simulate import Demand, DeviceClass, Prices, Settled, servers_needed, settle, simulate_queue

LINK = Link("test", 8e6, 8e6, 0.0, radio=PRESETS["wifi"].radio)
YEAR_S = 365 * 24 * 3600.0


def one_class(rate_per_s: float, device_s: float = 1.0, server_s: float = 0.1) -> DeviceClass:
    """All on the server or all on the device, with nothing sent."""
    return DeviceClass("one", rate_per_s, np.array([0.0, device_s]), np.array([server_s, 0.0]))


def test_below_the_load_at_which_devices_turn_away_servers_are_a_plain_queue() -> None:
    found = settle([one_class(50.0)], 10)
    assert found.utilization == pytest.approx(0.5)
    assert found.load == pytest.approx(2.0)
    assert found.latency_s == pytest.approx(0.2)
    assert found.reaching == 1


def test_above_it_so_many_turn_away_that_the_others_are_indifferent() -> None:
    """At a load of 10 the server takes as long as the device, so utilization stays at 0.9 however many ask."""
    for rate_per_s in (100.0, 1e3, 1e6):
        found = settle([one_class(rate_per_s)], 10)
        assert found.load == pytest.approx(10, rel=1e-6)
        assert found.utilization == pytest.approx(0.9)
        assert found.latency_s == pytest.approx(1.0)
        assert found.reaching == pytest.approx(0.9 * 10 / (rate_per_s * 0.1))


def test_devices_that_are_blind_to_load_overload_the_servers_and_those_that_adapt_do_not() -> None:
    classes = [one_class(200.0)]
    blind, adapting = (settle(classes, 10, choice) for choice in ("load-blind", "adapting"))
    assert blind.utilization == pytest.approx(2.0)
    assert math.isinf(blind.load)
    assert math.isinf(blind.latency_s)
    assert adapting.utilization < 1
    assert adapting.latency_s <= settle(classes, 10, "device-only").latency_s + 1e-9


def random_classes(generator: np.random.Generator) -> list[DeviceClass]:
    classes = []
    for k in range(4):
        ways = int(generator.integers(2, 6))
        server_s = np.sort(generator.uniform(0, 0.1, ways))[::-1].copy()
        server_s[-1] = 0.0
        latency_s = np.sort(generator.uniform(0, 0.5, ways))
        classes.append(DeviceClass(str(k), float(generator.uniform(1, 100)), latency_s, server_s))
    return classes


@pytest.mark.parametrize("seed", range(20))
def test_no_device_would_be_quicker_by_choosing_otherwise(seed: int) -> None:
    classes = random_classes(np.random.default_rng(seed))
    found = settle(classes, 5)
    assert found.load == pytest.approx(1 / (1 - found.utilization), rel=1e-6)
    for each, shares in zip(classes, found.shares, strict=True):
        assert shares.sum() == pytest.approx(1)
        seconds = each.latency_s + found.load * each.server_s
        assert seconds[shares > 1e-9].max() == pytest.approx(seconds.min(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_where_repeated_small_changes_of_mind_end(seed: int) -> None:
    """A thousandth of the devices chooses anew at the present load, again and again."""
    classes = random_classes(np.random.default_rng(seed))
    shares = [np.eye(len(each.server_s))[0] for each in classes]
    for _ in range(20_000):
        work = sum(each.rate_per_s * part @ each.server_s for each, part in zip(classes, shares, strict=True))
        load = 1 / (1 - min(work / 5, 0.999))
        for k, each in enumerate(classes):
            best = np.eye(len(each.server_s))[(each.latency_s + load * each.server_s).argmin()]
            shares[k] = 0.999 * shares[k] + 0.001 * best
    assert load == pytest.approx(settle(classes, 5).load, rel=0.03)


def test_a_simulated_queue_answers_as_slowly_as_the_fluid_model_says() -> None:
    """With exponential service, one server in the order of arrival has the mean time of one that shares its time."""
    found = settle([one_class(7.0)], 1)
    queue = simulate_queue(Demand.of(0.1), 7.0, 1, queries=40_000, replications=20)
    assert queue.mean_response_s.value == pytest.approx(found.latency_s, rel=0.05)


def test_the_servers_that_are_needed_keep_the_load() -> None:
    classes = [one_class(1000.0), one_class(500.0, device_s=0.05)]
    for load in (1.2, 2.0, 5.0):
        needed = servers_needed(classes, load)
        assert settle(classes, needed).load == pytest.approx(load, rel=1e-6)
    assert servers_needed(classes, 2.0, "device-only") == 0


def test_a_class_of_a_frontier_has_its_latency_energy_and_ends() -> None:
    # The second and the third row have fewer bytes or less device work than each other.
    found = DeviceClass.of("mine", frontier(), LINK, 10.0)
    assert found.latency_s == pytest.approx([0.8, 0.3, 2.0])
    assert found.server_s == pytest.approx([0.05, 0.03, 0.0])
    assert found.way(1.0, "server-only") == 0
    assert found.way(1.0, "device-only") == 2
    assert found.way(1.0, "adapting") == 1
    assert found.way(1000.0, "adapting") == 2
    assert found.energy_j is not None
    assert found.energy_j[-1] == pytest.approx(8.0)
    assert DeviceClass.of("slow", frontier(), LINK, 10.0, slowdown=2.0).latency_s[-1] == pytest.approx(4.0)
    assert DeviceClass.of("no meter", frontier(joules=False), LINK, 10.0).energy_j is None


def test_a_frontier_without_one_of_its_ends_is_refused() -> None:
    whole = frontier()
    for rows in (whole.rows[:-1], whole.rows[1:]):
        cut_short = Frontier("Net", "", 1, 2, 4, rows)
        with pytest.raises(SimulationError, match="must hold running all on the server and all on the device"):
            DeviceClass.of("mine", cut_short, LINK, 1.0)


def test_of_several_ways_to_send_the_input_the_quickest_stands_for_all_on_the_server() -> None:
    raw, small = way(0, "raw", 0.0, 8e5, 0.05), way(0, "jpeg", 0.0, 1e5, 0.05)
    rows = (raw, small, way(2, "raw", 2.0, 0.0, 0.0, on_device=True))
    found = DeviceClass.of("mine", Frontier("Net", "", 1, 2, 0, rows), LINK, 1.0)
    assert found.latency_s == pytest.approx([0.1, 0.8, 2.0])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: DeviceClass.of("mine", frontier(), LINK, 1.0, slowdown=0),
            "slowdown must be a positive number; got 0",
        ),
        (lambda: settle([one_class(1.0)], 0), "number of servers must be positive; got 0"),
        (lambda: settle([one_class(0.0)], 1), "must make inferences"),
        (lambda: settle([], 1), "must make inferences"),
        (lambda: one_class(-1.0), "rate of the device class 'one' must be zero or a positive number"),
        (lambda: one_class(1.0, device_s=float("nan")), "finite latency and server time"),
        (lambda: settle([one_class(1.0)], 1, "adaptive"), "one of adapting, load-blind, .*; got 'adaptive'"),
        (lambda: servers_needed([one_class(1.0)], 2.0, "device_only"), "device-only; got 'device_only'"),
        (lambda: servers_needed([one_class(1.0)], 1.0), r"load must be above 1.*got 1\.0"),
    ],
)
def test_wrong_arguments_are_refused(attempt: object, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        attempt()  # type: ignore[operator]


PRICES = Prices(server_usd=8760.0, lifetime_s=YEAR_S, idle_w=100.0, busy_w=300.0, overhead=1.5, usd_per_kwh=0.2)


def settled(utilization: float, device_j: float | None = 3.6) -> Settled:
    return Settled(10, 1e6 / 3600, utilization, 1 / max(1 - utilization, 1e-9), (), 0.1, device_j, 1.0)


def test_a_million_inferences_cost_what_an_hour_of_the_servers_does() -> None:
    """A server of 8,760 dollars that lasts a year costs a dollar an hour, and takes 200 W half busy."""
    cost = PRICES.per_million(settled(0.5))
    assert cost.machines_usd == pytest.approx(10.0)
    assert cost.server_kwh == pytest.approx(10 * 0.2 * 1.5)
    assert cost.electricity_usd == pytest.approx(0.6)
    assert cost.usd == pytest.approx(10.6)
    assert cost.device_kwh == pytest.approx(1.0)
    assert PRICES.per_million(settled(0.5, None)).device_kwh is None


def test_overloaded_servers_have_no_cost_per_inference() -> None:
    with pytest.raises(SimulationError, match=r"utilization below 1 to answer every inference; got 1\.2"):
        PRICES.per_million(settled(1.2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("server_usd", -1.0, "server_usd must be zero or a positive number; got -1.0"),
        ("lifetime_s", 0.0, "lifetime_s must be above 0 s"),
        ("busy_w", 50.0, "busy_w must be at least idle_w; got 50.0 and 100.0"),
        ("overhead", 0.9, "overhead must be at least 1"),
        ("usd_per_kwh", float("nan"), "usd_per_kwh must be zero or a positive number; got nan"),
    ],
)
def test_wrong_prices_are_refused(name: str, value: float, message: str) -> None:
    given = {
        "server_usd": 1.0,
        "lifetime_s": 1.0,
        "idle_w": 100.0,
        "busy_w": 200.0,
        "overhead": 1.0,
        "usd_per_kwh": 1.0,
    }
    with pytest.raises(SimulationError, match=message):
        Prices(**given | {name: value})
