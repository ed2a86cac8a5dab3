"""Estimates of link, server and device, by simulated traffic."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import Clock

from torchsurgeon.adapting import LinkEstimator, LoadEstimator, ProbePolicy, SlowdownEstimator
from torchsurgeon.adapting.load import TrialPolicy
from torchsurgeon.adapting.mean import Mean
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import BandwidthTrace, Link

PRIOR = Link("prior", 10e6, 10e6, 0.05)
PACKET_BYTES = 1500


class Traffic:
    """Requests over a link whose truth is known, timed as client and server time them."""

    def __init__(
        self, estimator: LinkEstimator, clock: Clock, link: Link, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.estimator, self.clock, self.link, self.noise = estimator, clock, link, noise
        self.trace: BandwidthTrace | None = None
        self.random = random.Random(seed)
        self.start_s = clock.s

    def _passing_s(self, start_s: float, size_bytes: float, bit_s: float) -> float:
        if self.trace is not None:
            return self.trace.delivered_at(start_s - self.start_s, size_bytes) - (start_s - self.start_s)
        return size_bytes * 8 / bit_s * self.random.lognormvariate(0, self.noise)

    def request(
        self, up_bytes: int, down_bytes: int = 4096, *, server_s: float = 0.005, times: float = 1, told: bool = True
    ) -> float:
        """One request; `times` as long in both transfers as it should be. Return how long the uplink took."""
        first_s = self._passing_s(self.clock.s, min(up_bytes, PACKET_BYTES), self.link.uplink_bit_s)
        rest_s = times * self._passing_s(
            self.clock.s + first_s, max(up_bytes - PACKET_BYTES, 0), self.link.uplink_bit_s
        )
        down_s = times * max(down_bytes - PACKET_BYTES, 0) * 8 / self.link.downlink_bit_s
        trip_s = self.link.round_trip_s * self.random.lognormvariate(0, self.noise)
        down_first_s = min(down_bytes, PACKET_BYTES) * 8 / self.link.downlink_bit_s
        total_s = first_s + rest_s + trip_s + server_s + down_first_s + down_s
        self.clock.s += total_s
        self.estimator.observe(
            up_bytes=up_bytes,
            up_s=rest_s if told else None,
            down_bytes=down_bytes,
            down_s=down_s,
            total_s=total_s,
            server_s=server_s,
        )
        return first_s + rest_s


def traffic(link: Link, prior: Link = PRIOR, **options: float) -> Traffic:
    clock = Clock()
    return Traffic(LinkEstimator(prior, now_s=clock), clock, link, **options)  # type: ignore[arg-type]


def off(estimate: float, truth: float) -> float:
    return abs(math.log(estimate / truth))


@pytest.mark.parametrize(
    "link", [Link("3g", 1.1e6, 2e6, 0.2), Link("lte", 6e6, 14e6, 0.06), Link("lan", 9e8, 9e8, 1e-3)]
)
def test_both_rates_and_the_round_trip_are_told_apart(link: Link) -> None:
    path = traffic(link)
    for _ in range(10):
        path.request(2_000_000, 2_000_000)
    seen = path.estimator.link()
    assert off(seen.uplink_bit_s, link.uplink_bit_s) < 0.05
    assert off(seen.downlink_bit_s, link.downlink_bit_s) < 0.05
    assert abs(seen.round_trip_s - link.round_trip_s) < 0.05 * link.round_trip_s + 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_third_leaves_an_error_below_a_fifth_and_the_estimate_says_how_large_it_may_be(seed: int) -> None:
    link = Link("lte", 6e6, 14e6, 0.06)
    path = traffic(link, noise=0.3, seed=seed)
    misses = []
    for _ in range(200):
        path.request(150_000, 100_000)
        uplink = path.estimator.estimate().uplink
        misses.append(off(uplink.value, link.uplink_bit_s) / uplink.error)
    seen = [off(path.estimator.link().uplink_bit_s, 6e6)]
    for _ in range(100):
        path.request(150_000, 100_000)
        seen.append(off(path.estimator.link().uplink_bit_s, 6e6))
    assert statistics.median(seen) < 0.2
    assert statistics.mean(miss < 2 for miss in misses[10:]) > 0.8
    assert 0.15 < path.estimator.estimate().uplink.spread < 0.6


@pytest.mark.parametrize("times", [0.1, 10])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_tenfold_change_is_followed_within_three_requests(times: float, noise: float) -> None:
    for seed in range(10):
        path = traffic(Link("before", 10e6, 10e6, 0.05), noise=noise, seed=seed)
        for _ in range(50):
            path.request(200_000, 200_000)
        path.link = Link("after", 10e6 * times, 10e6 / times, 0.05)
        for _ in range(3):
            path.request(200_000, 200_000)
        seen = path.estimator.link()
        assert off(seen.uplink_bit_s, 10e6 * times) < 0.1 + 2 * noise
        assert off(seen.downlink_bit_s, 10e6 / times) < 0.1 + 2 * noise


@pytest.mark.parametrize("times", [0.05, 20])
def test_one_transfer_that_is_far_off_is_forgotten_within_six_more(times: float) -> None:
    for seed in range(50):
        path = traffic(Link("steady", 10e6, 10e6, 0.05), noise=0.1, seed=seed)
        for _ in range(30):
            path.request(200_000, 200_000)
        path.request(200_000, 200_000, times=times)
        for _ in range(6):
            path.request(200_000, 200_000)
        seen = path.estimator.link()
        assert off(seen.uplink_bit_s, 10e6) < 0.4
        assert off(seen.downlink_bit_s, 10e6) < 0.4


def test_what_is_expected_is_what_is_paid_on_average_slow_transfers_included() -> None:
    path = traffic(Link("steady", 10e6, 10e6, 0.05), noise=0.3, seed=4)
    expected_s, taken_s = [], []
    for _ in range(2000):
        expected_s.append(path.estimator.link().uplink_s(200_000))
        taken_s.append(path.request(200_000, 200_000, times=8 if path.random.random() < 0.05 else 1))
    # The mean of the rates would promise far less.
    assert statistics.mean(expected_s[20:]) == pytest.approx(statistics.mean(taken_s[20:]), rel=0.1)


def test_tiny_transfers_update_the_round_trip_only() -> None:
    path = traffic(Link("real", 1e6, 1e6, 0.3))
    for _ in range(10):
        path.request(2000, 200)
    estimate = path.estimator.estimate()
    assert (estimate.uplink.value, estimate.downlink.value) == pytest.approx((10e6, 10e6))
    assert estimate.uplink.age_s == math.inf
    assert off(estimate.round_trip.value, 0.3) < 0.1


def test_a_transfer_too_quick_to_time_raises_a_rate_that_was_thought_lower() -> None:
    path = traffic(Link("lan", 10e9, 10e9, 2e-4), prior=Link("prior", 1e6, 1e6, 0.1))
    for _ in range(5):
        path.request(200_000, 200_000)
    seen = path.estimator.link()
    assert seen.uplink_s(200_000) < 3e-3
    path.request(20_000, 20_000)  # as quick, and only proves a tenth of that rate
    assert path.estimator.link().uplink_bit_s >= 0.9 * seen.uplink_bit_s


def test_a_server_that_does_not_tell_when_it_received_still_shows_the_uplink() -> None:
    path = traffic(Link("real", 2e6, 10e6, 0.05), noise=0.05)
    for _ in range(10):
        path.request(1000, told=False)
        path.request(150_000, told=False)
    seen = path.estimator.link()
    assert off(seen.uplink_bit_s, 2e6) < 0.2
    assert off(seen.round_trip_s, 0.05) < 0.3


@pytest.mark.parametrize("size_bytes", [40_000, 150_000])
def test_a_trace_is_followed_better_than_by_its_mean(size_bytes: int) -> None:
    path = traffic(PRIOR)
    path.trace = BandwidthTrace.synthetic(5.95e6, seed=1)
    following, mean = [], []
    while path.clock.s - path.start_s < 140:
        expected_s = path.estimator.link().uplink_s(size_bytes)
        taken_s = path.request(size_bytes)
        following.append(off(expected_s, taken_s))
        mean.append(off(size_bytes * 8 / path.trace.mean_bit_s, taken_s))
    assert statistics.mean(following) < statistics.mean(mean) / 2


@pytest.mark.parametrize(
    "lie",
    [
        {"up_s": 5.0},
        {"server_s": 1e9},
        {"server_s": math.nan},
        {"up_s": -0.1},
        {"total_s": math.inf},
        {"total_s": -3600.0},
        {"down_bytes": -1},
    ],
)
def test_timings_that_cannot_be_are_counted_and_change_nothing(lie: dict[str, float]) -> None:
    estimator = LinkEstimator(PRIOR, now_s=Clock())
    honest = {"up_bytes": 100_000, "up_s": 0.1, "down_bytes": 100_000, "down_s": 0.1, "total_s": 0.3, "server_s": 0.01}
    before = estimator.link()
    estimator.observe(**{**honest, **lie})  # type: ignore[arg-type]
    assert estimator.ignored == 1
    assert estimator.link() == before


@given(
    jumps=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_a_clock_that_jumps_corrupts_no_estimate(jumps: list[float], seed: int) -> None:
    link = Link("real", 10e6, 10e6, 0.05)
    path = traffic(link, noise=0.1, seed=seed)
    for _ in range(20):
        path.request(200_000, 200_000)
    for jump in jumps:
        path.clock.s += jump
        estimate = path.estimator.estimate()
        assert off(estimate.uplink.value, 10e6) < 0.7
        assert estimate.uplink.age_s >= 0
        path.request(200_000, 200_000)
        assert off(path.estimator.link().uplink_bit_s, 10e6) < 0.7


@given(st.lists(st.tuples(st.floats(1e-9, 1e12), st.floats(0, 1e5)), max_size=60))
@settings(max_examples=100)
def test_whatever_is_seen_the_estimate_stays_finite_and_within_what_was_seen(seen: list[tuple[float, float]]) -> None:
    clock = Clock()
    mean = Mean(1.0, now_s=clock, memory_s=0.3)
    for value, pause_s in seen:
        mean.observe(value)
        clock.s += pause_s
    values = [1.0, *(value for value, _ in seen)]
    quantity = mean.quantity()
    assert min(values) * 0.999 <= quantity.value <= max(values) * 1.001
    assert 0 < quantity.error <= quantity.spread < 10


def test_an_estimate_grows_old_and_uncertain_but_keeps_its_value() -> None:
    path = traffic(Link("real", 10e6, 10e6, 0.05))
    for _ in range(10):
        path.request(200_000, 200_000)
    fresh = path.estimator.estimate().uplink
    path.clock.s += 30
    old = path.estimator.estimate().uplink
    assert old.age_s == pytest.approx(fresh.age_s + 30)
    assert old.error > 3 * fresh.error
    assert old.value == pytest.approx(fresh.value)
    path.link = Link("moved", 1e6, 10e6, 0.05)
    path.request(200_000, 200_000)
    path.request(200_000, 200_000)
    assert off(path.estimator.link().uplink_bit_s, 1e6) < 0.2  # unsure, so it believes what it sees at once


def test_probes_of_a_silent_link_stay_within_their_share_of_time_and_bytes() -> None:
    clock = Clock()
    policy = ProbePolicy(now_s=clock, stale_s=1.0, share=0.02, most_byte_s=20e3)
    begin_s = clock.s
    for _ in range(20_000):
        clock.s += 0.05
        size = policy.due_bytes(math.inf, 4e6)
        if size is not None:
            assert policy.least_bytes <= size <= policy.most_bytes
            taken_s = size * 8 / 4e6 + 0.06
            clock.s += taken_s
            policy.spent(size, taken_s)
    passed_s = clock.s - begin_s
    assert policy.count > 100
    assert policy.spent_s / passed_s <= 0.021
    assert policy.spent_bytes / passed_s <= 21e3


def test_a_link_in_use_is_not_probed_and_a_failed_probe_costs_its_time() -> None:
    clock = Clock()
    policy = ProbePolicy(now_s=clock, stale_s=1.0, share=0.1)
    assert policy.due_bytes(0.5, 1e6) is None
    assert policy.due_bytes(2.0, 1e6) is not None
    assert policy.due_bytes(2.0, 1e6) is None  # one is under way
    policy.spent(32_768, 2.0)
    clock.s += 19
    assert policy.due_bytes(math.inf, 1e6) is None
    clock.s -= 3600
    assert policy.due_bytes(math.inf, 1e6) is None
    clock.s += 2
    assert policy.due_bytes(math.inf, 1e6) is not None


def test_an_answer_that_never_came_is_believed_at_once_and_two_probes_tell_better() -> None:
    clock = Clock()
    estimator = LinkEstimator(PRIOR, now_s=clock)
    link = PRIOR
    sent_s, trip_s = 150_000 * 8 / link.uplink_bit_s, link.round_trip_s
    for _ in range(20):
        clock.s += 0.3
        estimator.observe(up_bytes=150_000, up_s=sent_s, down_bytes=0, down_s=0.0, total_s=sent_s + trip_s)
    assert off(estimator.link().uplink_bit_s, link.uplink_bit_s) < 0.1
    estimator.missed(up_bytes=150_000, waited_s=10 * sent_s + trip_s)
    assert off(estimator.link().uplink_bit_s, link.uplink_bit_s / 10) < 0.1
    assert off(estimator.link().round_trip_s, trip_s) < 0.2
    estimator.missed(up_bytes=150_000, waited_s=5 * sent_s + trip_s)
    assert off(estimator.link().uplink_bit_s, link.uplink_bit_s / 10) < 0.1, "that is no news"
    for _ in range(2):
        clock.s += 0.1
        estimator.observe(up_bytes=1 << 17, up_s=(1 << 20) / link.uplink_bit_s, down_bytes=0, down_s=0.0, total_s=1.0)
    assert off(estimator.link().uplink_bit_s, link.uplink_bit_s) < 0.2
    estimator.missed(up_bytes=100, waited_s=1.5)
    assert off(estimator.link().round_trip_s, 1.5) < 0.1
    for nonsense_s in (-1.0, 0.0, float("nan"), float("inf")):
        estimator.missed(up_bytes=100, waited_s=nonsense_s)
    assert estimator.ignored == 4


def test_what_else_is_measured_shares_the_probes_bounds() -> None:
    clock = Clock()
    policy = ProbePolicy(now_s=clock, stale_s=1.0, share=0.1, most_byte_s=20e3)
    assert not policy.due(0.5)
    assert policy.due(math.inf)
    policy.spent(100_000, 0.3)
    clock.s += 4.9  # 100 KB at 20 KB/s take 5 s
    assert not policy.due(math.inf)
    assert policy.due_bytes(math.inf, 1e6) is None
    clock.s += 0.2
    assert policy.due(math.inf)


def test_a_probe_budget_of_nothing_is_refused() -> None:
    with pytest.raises(AdaptError, match="share"):
        ProbePolicy(share=0)


def busy(estimator: LoadEstimator, clock: Clock, queue_s: float, factor: float, tail_s: float, count: int = 20) -> None:
    noise = random.Random(1)
    for _ in range(count):
        clock.s += 0.05
        estimator.observe(
            queue_s=queue_s * noise.uniform(0.7, 1.3),
            compute_s=factor * tail_s * noise.uniform(0.9, 1.1),
            predicted_s=tail_s,
        )


@pytest.mark.parametrize(("queue_s", "factor"), [(0.0, 1.0), (0.05, 1.0), (0.0, 4.0), (0.2, 3.0)])
def test_load_is_a_wait_and_a_factor_whatever_tail_showed_them(queue_s: float, factor: float) -> None:
    for tail_s in (0.002, 0.05):
        clock = Clock()
        estimator = LoadEstimator(now_s=clock)
        busy(estimator, clock, queue_s, factor, tail_s)
        for asked_s in (0.002, 0.05):
            k = estimator.estimate().factor(asked_s)
            assert off(k, (queue_s + factor * asked_s) / asked_s) < 0.3


def test_a_load_that_is_not_heard_of_any_more_fades_and_a_ping_is_due() -> None:
    clock = Clock()
    estimator = LoadEstimator(now_s=clock, half_life_s=10, ping_s=1.0)
    busy(estimator, clock, 0.2, 8.0, 0.02)
    assert not estimator.ping_due()
    clock.s += 1.1
    assert estimator.ping_due()
    assert not estimator.ping_due()
    loaded = estimator.estimate().factor(0.02)
    clock.s += 10
    assert estimator.estimate().factor(0.02) < loaded / 2
    clock.s += 100
    assert off(estimator.estimate().factor(0.02), 1.0) < 0.05
    assert estimator.age_s() > 100


def test_a_ping_tells_of_the_queue_without_a_tail() -> None:
    clock = Clock()
    estimator = LoadEstimator(now_s=clock)
    for _ in range(3):
        clock.s += 1
        estimator.observe(queue_s=0.3, compute_s=0.0, predicted_s=0.0)
    estimate = estimator.estimate()
    assert off(estimate.queue_s, 0.3) < 0.2
    assert estimate.compute.value == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_nonsense_from_a_server_changes_no_load(value: float) -> None:
    estimator = LoadEstimator(now_s=Clock())
    before = estimator.estimate()
    estimator.observe(queue_s=value, compute_s=0.01, predicted_s=0.01)
    estimator.observe(queue_s=0.0, compute_s=value, predicted_s=0.01)
    assert estimator.estimate().factor(0.1) == before.factor(0.1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_device_that_throttles_is_noticed_within_three_heads(factor: float) -> None:
    clock = Clock()
    estimator = SlowdownEstimator(now_s=clock)
    noise = random.Random(2)
    for _ in range(30):
        clock.s += 0.1
        estimator.observe(0.04 * noise.uniform(0.9, 1.1), 0.04)
    for _ in range(3):
        clock.s += 0.1
        estimator.observe(factor * 0.04 * noise.uniform(0.9, 1.1), 0.04)
    assert off(estimator.estimate().value, factor) < 0.15


def test_one_duration_in_which_the_process_was_stopped_does_not_make_the_device_slow() -> None:
    clock = Clock()
    estimator = SlowdownEstimator(now_s=clock)
    for _ in range(10):
        clock.s += 0.1
        estimator.observe(0.04, 0.04)
    estimator.observe(3600.0, 0.04)
    assert 1 < estimator.estimate().value <= 2
    # The server may be asked from then on, so that nothing else is seen of the device.
    clock.s += 120.0
    assert estimator.estimate().value < 1.2


@pytest.mark.parametrize("factor", [5.0, 40.0])
def test_a_device_that_has_become_much_slower_is_noticed_within_four_heads(factor: float) -> None:
    clock = Clock()
    estimator = SlowdownEstimator(now_s=clock)
    for seconds in [0.04] * 10 + [factor * 0.04] * 4:
        clock.s += 0.1
        estimator.observe(seconds, 0.04)
    assert off(estimator.estimate().value, factor) < 0.15


def test_a_head_too_short_to_time_says_nothing_of_the_device() -> None:
    estimator = SlowdownEstimator(now_s=Clock())
    estimator.observe(0.004, 0.0)
    estimator.observe(0.004, 1e-6)
    estimator.observe(math.inf, 0.04)
    assert estimator.estimate().value == 1.0
    # Nor does it make a stall right after it one of two in a row.
    estimator.observe(3600.0, 0.04)
    assert estimator.estimate().value <= 3.0


@pytest.mark.parametrize("load", [0.3, 0.6])
@pytest.mark.parametrize("period_s", [0.1, 1.0])
def test_the_wait_at_a_busy_server_is_the_mean_of_many_and_not_their_median(load: float, period_s: float) -> None:
    """Waits in a queue with random arrivals and a fixed service, as requests and pings find them."""
    service_s, chance, clock = 0.07, random.Random(1), Clock()
    estimator = LoadEstimator(now_s=clock)
    waiting_s, last_s, next_s = 0.0, clock.s, clock.s
    seen, believed = [], []
    for _ in range(4000):
        clock.s += period_s
        while next_s < clock.s:
            waiting_s, last_s = max(waiting_s - (next_s - last_s), 0.0) + service_s, next_s
            next_s += chance.expovariate(load / service_s)
        waiting_s, last_s = max(waiting_s - (clock.s - last_s), 0.0), clock.s
        estimator.observe(queue_s=waiting_s, compute_s=0.0, predicted_s=0.0)
        seen.append(waiting_s)
        believed.append(estimator.estimate().queue_s)
    # Rather too low than moved by a single long wait.
    assert off(statistics.mean(believed), statistics.mean(seen)) < 0.4
    assert statistics.median(seen) < 0.7 * statistics.mean(seen)


def test_a_server_that_stays_slow_is_tried_more_and_more_seldom() -> None:
    clock = Clock()
    policy, tried_s = TrialPolicy(now_s=clock), []
    for _ in range(3600):
        if policy.due():
            tried_s.append(clock.s)
        clock.s += 1.0
    pauses = [after - before for before, after in itertools.pairwise(tried_s)]
    assert pauses[:3] == [6.0, 12.0, 24.0]
    assert pauses[-1] == 300.0
    policy.answered()
    clock.s += 3.0
    assert policy.due()


def test_pings_tell_how_fast_a_server_is_only_while_nothing_else_does() -> None:
    clock = Clock()
    policy = TrialPolicy(now_s=clock)
    assert policy.pings_count()
    policy.timed()
    clock.s += 9.0
    assert not policy.pings_count()
    clock.s += 2.0
    assert policy.pings_count()
