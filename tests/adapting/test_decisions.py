"""Decisions from changing estimates: following what matters, and not what is noise."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import Clock

from torchsurgeon.adapting import (
    Decider,
    Decision,
    Estimates,
    LinkEstimate,
    LinkEstimator,
    LoadEstimate,
    LoadEstimator,
    Quantity,
    SlowdownEstimator,
)
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import BandwidthTrace, Link


@dataclass(frozen=True)
class Row:
    """One way to run a model: seconds on the device, bytes up, seconds on the server."""

    head_s: float
    up_bytes: int
    tail_s: float


# Of the shape of AlexNet on a phone: the input is large, a middle cut small, and all on the device slow.
SERVER, MIDDLE, LATE, DEVICE = (
    Row(0, 150_000, 0.004),
    Row(0.06, 40_000, 0.003),
    Row(0.14, 17_000, 0.001),
    Row(0.32, 0, 0),
)
ROWS = [SERVER, MIDDLE, LATE, DEVICE]
ANSWER_BYTES = 4000


def cost(row: Row, link: Link, load: float, slowdown: float, scale: float = 1.0) -> float:
    if not row.up_bytes:
        return row.head_s * slowdown * scale
    there_s = link.request_s(row.up_bytes * scale, ANSWER_BYTES * scale) + row.tail_s * load * scale
    return row.head_s * slowdown * scale + there_s


def costs(link: Link, load: float, slowdown: float, *, scale: float = 1.0) -> list[float]:
    return [cost(row, link, load, slowdown, scale) for row in ROWS]


class World:
    """A device that decides, infers, and observes, in a simulated world whose truth is known."""

    def __init__(
        self, truth: Link, prior: Link | None = None, *, noise: float = 0.0, seed: int = 0, least_gain: float = 0.0
    ) -> None:
        self.clock = Clock()
        self.truth, self.noise, self.random = truth, noise, random.Random(seed)
        self.load, self.queue_s, self.slowdown = 1.0, 0.0, 1.0
        self.links = LinkEstimator(prior or truth, now_s=self.clock)
        self.loads = LoadEstimator(now_s=self.clock)
        self.slowdowns = SlowdownEstimator(now_s=self.clock)
        self.told: list[Decision[Row]] = []
        self.decider: Decider[Row] = Decider(
            ROWS, costs, now_s=self.clock, least_gain=least_gain, on_change=self.told.append
        )
        self.trace: BandwidthTrace | None = None

    def estimates(self) -> Estimates:
        return Estimates(self.links.estimate(), self.loads.estimate(), self.slowdowns.estimate())

    def about(self, value: float) -> float:
        return value * self.random.uniform(1 - self.noise, 1 + self.noise)

    def uplink_s(self, size_bytes: float) -> float:
        if self.trace is not None:
            return self.trace.delivered_at(self.clock.s, size_bytes) - self.clock.s
        return self.truth.uplink_s(size_bytes)

    def run(self, row: Row, *, observed: bool = True) -> float:
        """Seconds that an inference by `row` takes."""
        head_s = self.about(row.head_s * self.slowdown)
        self.clock.s += head_s
        if observed:
            self.slowdowns.observe(head_s, row.head_s)
        if not row.up_bytes:
            return head_s
        up_s, down_s = self.about(self.uplink_s(row.up_bytes)), self.about(self.truth.downlink_s(ANSWER_BYTES))
        first_s = up_s * 1500 / row.up_bytes
        queue_s, tail_s = self.about(self.queue_s), self.about(row.tail_s * self.load)
        total_s = up_s + self.about(self.truth.round_trip_s) + queue_s + tail_s + down_s
        self.clock.s += total_s
        if observed:
            self.links.observe(
                up_bytes=row.up_bytes,
                up_s=up_s - first_s,
                down_bytes=ANSWER_BYTES,
                down_s=down_s * (1 - 1500 / ANSWER_BYTES),
                total_s=total_s,
                server_s=queue_s + tail_s,
            )
            self.loads.observe(queue_s=queue_s, compute_s=tail_s, predicted_s=row.tail_s)
        return head_s + total_s

    def infer(self, count: int = 1) -> list[Row]:
        rows = []
        for _ in range(count):
            rows.append(self.decider.decide(self.estimates()).row)
            self.run(rows[-1])
            self.clock.s += 0.02
        return rows

    def probe(self, size_bytes: int = 32_768) -> None:
        self.run(Row(0, size_bytes, 0))


LEAST_GAIN = 0.1  # as runtime.choice has it for compiled parts
WIFI, LTE, THIN = Link("wifi", 20e6, 50e6, 0.02), Link("lte", 5e6, 14e6, 0.06), Link("thin", 5e5, 2e6, 0.1)


@pytest.mark.parametrize(("link", "row"), [(WIFI, SERVER), (LTE, MIDDLE), (THIN, DEVICE)])
def test_it_settles_on_the_best_row(link: Link, row: Row) -> None:
    world = World(link)
    assert set(world.infer(20)) == {row}
    assert world.decider.changes == 0
    assert world.told == []


@pytest.mark.parametrize("bit_s", [20e6, 7.7e6, 6e6, 5e6, 2.1e6, 5e5])
def test_where_a_change_costs_something_noise_of_30_percent_does_not_make_it_flap(bit_s: float) -> None:
    for seed in range(10):
        world = World(Link("steady", bit_s, 14e6, 0.06), noise=0.3, seed=seed, least_gain=LEAST_GAIN)
        world.infer(300)
        assert world.decider.changes <= 3


def test_where_it_costs_nothing_it_changes_as_often_as_that_pays() -> None:
    even = 110_000 * 8 / (0.06 - 0.001)  # where all on the server and the middle cut take as long
    calm = World(Link("steady", even, 14e6, 0.06), noise=0.3, seed=1, least_gain=LEAST_GAIN)
    quick = World(Link("steady", even, 14e6, 0.06), noise=0.3, seed=1)
    calm.infer(300)
    quick.infer(300)
    assert quick.decider.changes > 10
    assert calm.decider.changes <= 3


def test_a_tenfold_fall_is_answered_within_four_inferences_and_a_rise_within_eight() -> None:
    for seed in range(10):
        world = World(WIFI, noise=0.1, seed=seed)
        world.infer(30)
        world.truth = Link("fallen", 2e6, 5e6, 0.02)
        rows = world.infer(4)
        assert rows[-1] in (MIDDLE, LATE)
        world.infer(20)
        world.truth = WIFI
        assert SERVER in world.infer(8)


def test_each_change_is_told_with_its_reason_and_history_is_bounded() -> None:
    world = World(WIFI)
    world.infer(10)
    world.truth = THIN
    world.infer(600)
    assert [decision.row for decision in world.told][-1] == DEVICE
    assert all(decision.changed and decision.reason == "better" for decision in world.told)
    assert len(world.decider.decisions) == 256
    last = world.decider.decisions[-1]
    assert last.time_s <= world.clock.s
    assert last.row == DEVICE
    assert last.cost == pytest.approx(0.32, rel=0.1)


def test_on_the_device_it_returns_when_a_probe_shows_a_better_link() -> None:
    world = World(THIN)
    world.infer(10)
    world.truth = WIFI
    assert set(world.infer(10)) == {DEVICE}  # it cannot know yet
    world.probe()
    world.probe()
    assert world.infer(3)[-1] != DEVICE


def test_a_busy_server_is_left_and_returned_to_after_a_ping() -> None:
    world = World(WIFI, noise=0.1)
    world.infer(20)
    world.queue_s = 2.0
    assert world.infer(4)[-1] == DEVICE
    world.queue_s = 0.0
    for _ in range(3):
        world.clock.s += 1
        assert world.loads.ping_due()
        world.loads.observe(queue_s=0.0, compute_s=0.0, predicted_s=0.0)
    assert world.infer(4)[-1] == SERVER


def test_a_hot_device_moves_work_to_the_server() -> None:
    world = World(LTE, noise=0.05)
    assert world.infer(10)[-1] == MIDDLE
    world.slowdown = 5.0
    assert world.infer(5)[-1] == SERVER


def test_a_decider_without_rows_is_refused() -> None:
    with pytest.raises(AdaptError, match="no row"):
        Decider([], costs)


def test_a_listener_that_raises_does_not_stop_an_inference() -> None:
    world = World(WIFI)
    world.decider = Decider(ROWS, costs, now_s=world.clock, on_change=lambda decision: 1 / 0)
    world.infer(3)
    world.truth = THIN
    assert world.infer(8)[-1] == DEVICE


@pytest.mark.parametrize("seed", range(3))
def test_over_a_varying_link_it_is_near_the_oracle_and_beats_both_fixed_choices(seed: int) -> None:
    trace = BandwidthTrace.synthetic(5e6, seed=seed)

    def timeline(row_of: str) -> float:
        world = World(LTE, seed=seed)
        world.trace, world.clock.s = trace, 0.0
        taken = []
        while world.clock.s < trace.duration_s:
            if row_of == "adaptive":
                row = world.decider.decide(world.estimates()).row
                age = world.links.estimate().uplink.age_s
                if row == DEVICE and age > 2:
                    world.probe()
            elif row_of == "oracle":
                row = min(ROWS, key=lambda row: _known_s(world, row))
            else:
                row = SERVER if row_of == "server" else DEVICE
            taken.append(world.run(row))
            world.clock.s += 0.1
        return statistics.mean(taken)

    def _known_s(world: World, row: Row) -> float:
        if not row.up_bytes:
            return row.head_s
        start_s = world.clock.s + row.head_s
        up_s = trace.delivered_at(start_s, row.up_bytes) - start_s
        return row.head_s + up_s + LTE.round_trip_s + row.tail_s + LTE.downlink_s(ANSWER_BYTES)

    adaptive, oracle, server, device = map(timeline, ("adaptive", "oracle", "server", "device"))
    assert adaptive <= 1.1 * oracle
    assert adaptive <= 1.05 * min(server, device)


def exactly(
    up_bit_s: float, down_bit_s: float, trip_s: float, load: float, queue_s: float, slowdown: float
) -> Estimates:
    known = [Quantity(value, 0.0, 0.0, 0.0) for value in (up_bit_s, down_bit_s, trip_s, load, slowdown)]
    return Estimates(LinkEstimate(*known[:3]), LoadEstimate(known[3], queue_s), known[4])


@given(
    st.lists(
        st.tuples(
            st.floats(1e4, 1e9),
            st.floats(1e4, 1e9),
            st.floats(0, 1),
            st.floats(0.1, 100),
            st.floats(0, 10),
            st.floats(0.1, 10),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_of_what_is_known_exactly_it_takes_the_best_at_once(
    sequence: list[tuple[float, float, float, float, float, float]],
) -> None:
    decider = Decider(ROWS, costs)
    for up_bit_s, down_bit_s, trip_s, load, queue_s, slowdown in sequence:
        decision = decider.decide(exactly(up_bit_s, down_bit_s, trip_s, load, queue_s, slowdown))
        link = Link("exact", up_bit_s, down_bit_s, trip_s)
        waits = [(cost(row, link, load, slowdown) + (queue_s if row.up_bytes else 0)) for row in ROWS]
        assert decision.cost == pytest.approx(waits[ROWS.index(decision.row)])
        assert decision.cost <= min(waits) * (1 + 1e-9)


@pytest.mark.parametrize(("bit_s", "scale"), [(1e3, 16.0), (8e3, 1e4), (1e12, 1e-3)])
def test_a_call_of_another_size_is_decided_whatever_the_rates_of_the_link(bit_s: float, scale: float) -> None:
    known = exactly(bit_s, bit_s, 0.1, 1.0, 0.0, 1.0)._replace(scale=scale)
    link = known.conditions().link
    assert (link.uplink_bit_s, link.downlink_bit_s) == (bit_s, bit_s)  # the radio's power is that at the true rate
    decider = Decider(ROWS, costs)
    decision = decider.decide(known)
    crossing = (scale * (row.head_s + row.tail_s + (row.up_bytes + ANSWER_BYTES) * 8 / bit_s) + 0.1 for row in ROWS)
    waits = [seconds if row.up_bytes else scale * row.head_s for row, seconds in zip(ROWS, crossing, strict=True)]
    assert decision.cost == pytest.approx(min(waits))
    assert decision.row == ROWS[waits.index(min(waits))]


# --- rows that lose something ---

COARSE, FINE, EXACT = Row(0.06, 8_000, 0.003), Row(0.06, 16_000, 0.003), Row(0.06, 120_000, 0.003)
LOSSES = (0.9, 0.4, 0.0)


def rated(link: Link, load: float, slowdown: float, *, scale: float = 1.0) -> list[float]:
    return [cost(row, link, load, slowdown, scale) for row in (COARSE, FINE, EXACT)]


def over(uplink_bit_s: float, seen: float = 0.1) -> Estimates:
    link, sure = Link("estimated", uplink_bit_s, 5e7, 0.06), Quantity(1.0, 0.1, 0.1, 0.0)
    quantities = (Quantity(value, seen, seen, 0.0) for value in (uplink_bit_s, 5e7, link.round_trip_s))
    return Estimates(LinkEstimate(*quantities), LoadEstimate(sure, 0.0, 0.0), sure)


@pytest.mark.parametrize(("bit_s", "row"), [(1e6, COARSE), (4e6, COARSE), (3e7, FINE), (1e9, EXACT)])
def test_of_rows_that_cost_about_the_same_the_one_that_loses_least_is_taken(bit_s: float, row: Row) -> None:
    decider: Decider[Row] = Decider((COARSE, FINE, EXACT), rated, losses=LOSSES)
    assert decider.decide(over(bit_s)).row == row
    least = min(rated(Link("estimated", bit_s, 5e7, 0.06), 1.0, 1.0))
    assert decider.decisions[-1].cost <= 1.02 * least


def test_the_row_becomes_finer_on_a_quicker_link_and_coarser_on_a_slower_one() -> None:
    decider: Decider[Row] = Decider((COARSE, FINE, EXACT), rated, losses=LOSSES)
    rows = [decider.decide(over(bit_s)) for bit_s in (1e6, 3e7, 1e9, 3e7, 1e6)]
    assert [decision.row for decision in rows] == [COARSE, FINE, EXACT, FINE, COARSE]
    assert [decision.reason for decision in rows] == [
        "the best",
        "changes less, and another is hardly better",
        "changes less, and another is hardly better",
        "better",
        "better",
    ]


def test_noise_does_not_make_the_rate_flap() -> None:
    chance = random.Random(0)
    for bit_s in (1e6, 8e6, 2e7, 1e8):
        decider: Decider[Row] = Decider((COARSE, FINE, EXACT), rated, losses=LOSSES)
        for _ in range(300):
            # The estimates move by 5 %, as those of a tracker do that follows noise of 30 %.
            decider.decide(over(bit_s * chance.uniform(0.95, 1.05)))
        assert decider.changes <= 2


def test_rows_that_lose_alike_are_chosen_by_their_costs_alone() -> None:
    plain: Decider[Row] = Decider(ROWS, costs)
    alike: Decider[Row] = Decider(ROWS, costs, losses=[0.5] * len(ROWS))
    for bit_s in (5e5, 2e6, 6e6, 3e7, 1e6):
        assert plain.decide(over(bit_s)).row == alike.decide(over(bit_s)).row


def test_losses_must_be_those_of_the_rows() -> None:
    with pytest.raises(AdaptError, match="as many losses as rows; got 1 for 4 rows"):
        Decider(ROWS, costs, losses=[0.5])
