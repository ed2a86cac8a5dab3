"""Servers that do not answer, and deadlines."""

from __future__ import annotations

import itertools
import math
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import Clock

from torchsurgeon.adapting import (
    Allowance,
    CircuitBreaker,
    Refusals,
    check_deadline,
    late_probability,
    rescue,
)
from torchsurgeon.errors import AdaptError, DeadlineError


def opened(clock: Clock, *, seed: int = 0, failures: int = 20) -> CircuitBreaker:
    """A breaker that has seen so many failures in a row, trials among them."""
    breaker = CircuitBreaker(now_s=clock, jitter=random.Random(seed))
    for _ in range(failures):
        while not breaker.allow():
            clock.s += 0.01
        breaker.failed()
    return breaker


def test_one_failure_is_forgiven_and_the_second_in_a_row_opens() -> None:
    clock = Clock()
    breaker = CircuitBreaker(now_s=clock)
    for _ in range(5):
        breaker.failed()
        assert breaker.state == "closed"
        breaker.succeeded()
    breaker.failed()
    breaker.failed()
    assert breaker.state == "open"
    assert not breaker.allow()
    assert breaker.opened == 1


def test_a_half_open_breaker_gives_one_trial_at_a_time() -> None:
    clock = Clock()
    breaker = opened(clock, failures=2)
    clock.s += 2
    assert breaker.allow()
    assert breaker.state == "half-open"
    assert not breaker.allow()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.allow()


def test_a_trial_that_never_ends_is_given_up() -> None:
    clock = Clock()
    breaker = opened(clock, failures=2)
    clock.s += 2
    assert breaker.allow()
    clock.s += breaker.trial_s + 0.01
    assert breaker.allow()


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("return_s", [0.5, 2.0])
def test_a_server_is_back_in_use_within_the_promised_time(return_s: float, hangs: bool) -> None:
    for seed in range(30):
        clock = Clock()
        chance = random.Random(seed)
        breaker = CircuitBreaker(now_s=clock, return_s=return_s, jitter=random.Random(seed))
        returns_s = clock.s + chance.uniform(0, 30)
        while True:
            if breaker.allow():
                if clock.s >= returns_s:
                    break
                clock.s += breaker.trial_s if hangs else 0.001
                breaker.failed()
            clock.s += 0.005
        assert clock.s - returns_s <= return_s


def test_a_dead_server_is_asked_less_and_less_often() -> None:
    clock = Clock()
    breaker = opened(clock, failures=2)
    asked = []
    begin_s = clock.s
    while clock.s < begin_s + 60:
        clock.s += 0.01
        if breaker.allow():
            asked.append(clock.s)
            breaker.failed()
    assert asked[0] - begin_s < 0.15
    assert 60 / 1.5 < len(asked) < 60 / 0.6


def test_devices_do_not_return_all_at_once() -> None:
    pauses = set()
    for seed in range(20):
        clock = Clock()
        breaker = opened(clock, seed=seed)
        begin_s = clock.s
        while not breaker.allow():
            clock.s += 0.01
        pauses.add(round(clock.s - begin_s, 1))
    assert len(pauses) >= 5


def test_a_server_that_comes_and_goes_is_left_at_its_first_failure_with_a_longer_pause() -> None:
    clock = Clock()
    breaker = opened(clock, failures=6)
    clock.s += 2
    assert breaker.allow()
    breaker.succeeded()
    breaker.failed()
    assert breaker.state == "open"
    clock.s += 0.5
    assert not breaker.allow()
    clock.s += 1
    assert breaker.allow()
    for _ in range(3):
        breaker.succeeded()
    breaker.failed()
    assert breaker.state == "closed"


@given(st.lists(st.floats(-1e7, 1e7), max_size=10), st.integers(0, 100))
def test_a_clock_that_jumps_never_locks_a_server_out(jumps: list[float], seed: int) -> None:
    clock = Clock()
    breaker = opened(clock, seed=seed, failures=8)
    for jump in jumps:
        clock.s += jump
        breaker.failed()
        breaker.allow()
    waited_s = 0.0
    while not breaker.allow():
        clock.s += 0.01
        waited_s += 0.01
        assert waited_s <= 2.0


def test_of_many_threads_one_gets_the_trial() -> None:
    clock = Clock()
    breaker = opened(clock, failures=2)
    clock.s += 2
    gate, allowed = threading.Barrier(8), []

    def ask() -> None:
        gate.wait()
        allowed.append(breaker.allow())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(allowed) == 1


@pytest.mark.parametrize(
    "arguments", [{"failures": 0}, {"return_s": 0}, {"return_s": math.inf}, {"return_s": math.nan}]
)
def test_a_breaker_that_cannot_be_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(AdaptError, match="breaker"):
        CircuitBreaker(**arguments)  # type: ignore[arg-type]


def test_a_certain_tail_starts_as_late_as_it_can() -> None:
    plan = rescue(1.0, remote_s=0.2, remote_spread=0.1, tail_s=0.3, tail_spread=0.0)
    assert not plan.hedged
    assert plan.start_s == pytest.approx(0.7, abs=0.01)
    assert plan.late < 1e-6


def test_an_uncertain_tail_starts_earlier() -> None:
    starts = [rescue(1.0, remote_s=0.2, remote_spread=0.1, tail_s=0.3, tail_spread=s).start_s for s in (0.05, 0.2, 0.4)]
    assert starts == sorted(starts, reverse=True)
    assert starts[2] < 0.3


def test_a_tail_is_started_at_once_when_the_answer_will_hardly_come_in_time() -> None:
    assert rescue(1.0, remote_s=1.5, remote_spread=0.2, tail_s=0.3, tail_spread=0.1).hedged
    assert rescue(1.0, remote_s=math.inf, remote_spread=0.2, tail_s=0.3, tail_spread=0.1).start_s == 0
    assert not rescue(1.0, remote_s=0.9, remote_spread=0.2, tail_s=0.3, tail_spread=0.1).hedged
    assert rescue(1.0, remote_s=0.9, remote_spread=0.2, tail_s=0.3, tail_spread=0.1, hedge_above=0.1).hedged


def test_a_tail_that_cannot_end_in_time_starts_at_once_and_says_so() -> None:
    plan = rescue(0.2, remote_s=0.05, remote_spread=0.1, tail_s=0.3, tail_spread=0.1)
    assert (plan.start_s, plan.hedged) == (0.0, False)
    assert plan.slack_s < 0


@given(
    left_s=st.floats(0.01, 10),
    tail_s=st.floats(0.001, 10),
    spread=st.floats(0.01, 0.5),
    remote_s=st.floats(0.001, 10),
    seed=st.integers(0, 2**20),
)
def test_a_deadline_that_can_be_kept_is_missed_at_most_once_in_a_hundred(
    left_s: float, tail_s: float, spread: float, remote_s: float, seed: int
) -> None:
    plan = rescue(left_s, remote_s=remote_s, remote_spread=0.3, tail_s=tail_s, tail_spread=spread)
    assert plan.start_s >= 0
    if plan.slack_s >= 0:
        noise = random.Random(seed)
        missed = sum(plan.start_s + tail_s * noise.lognormvariate(0, spread) > left_s for _ in range(500))
        assert missed <= 20


def test_the_probability_of_being_late_is_that_of_a_log_normal() -> None:
    assert late_probability(1.0, 0.3, 1.0) == pytest.approx(0.5)
    noise = random.Random(0)
    later = sum(noise.lognormvariate(0, 0.3) > 1.4 for _ in range(20_000)) / 20_000
    assert late_probability(1.0, 0.3, 1.4) == pytest.approx(later, abs=0.01)
    assert late_probability(1.0, 0.3, 0.0) == 1.0
    assert late_probability(0.0, 0.3, 1.0) == 0.0


def test_a_deadline_below_what_is_possible_names_the_best_that_is() -> None:
    check_deadline(0.3, 0.25, "on the device")
    with pytest.raises(DeadlineError, match=r"0\.1 s.*0\.25 s, on the device") as caught:
        check_deadline(0.1, 0.25, "on the device")
    assert caught.value.best_s == 0.25
    for deadline_s in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DeadlineError, match="must be a positive, finite number of seconds"):
            check_deadline(deadline_s, 0.25, "on the device")


def test_deadlines_that_stay_impossible_are_tried_now_and_then_and_never_at_first() -> None:
    clock = Clock()
    refusals = Refusals(now_s=clock)
    ran_s = []
    for tick in range(1000):
        if not refusals.refuse(0.25):
            ran_s.append(tick / 100)
        clock.s += 0.01
    assert ran_s[0] == pytest.approx(1.25, abs=0.02)
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(ran_s))
    assert len(ran_s) >= 6
    clock.s += 60.0
    refusals.end()
    assert refusals.refuse(0.25)


@given(st.lists(st.floats(-1e6, 1e6), max_size=5))
def test_a_clock_that_jumps_refuses_no_deadline_for_ever(jumps: list[float]) -> None:
    clock = Clock()
    refusals = Refusals(now_s=clock)
    for jump in jumps:
        refusals.refuse(0.01)
        clock.s += jump
    refused = []
    for _ in range(3):
        refused.append(refusals.refuse(0.01))
        clock.s += 1.1
    assert not all(refused)


def test_bytes_count_for_an_hour_and_are_forgotten_a_minute_later() -> None:
    clock = Clock()
    allowance = Allowance(1000, now_s=clock)
    for _ in range(10):
        assert allowance.allows(100)
        allowance.spent(100)
        clock.s += 30.0
    assert not allowance.allows(1)
    clock.s += 3300.0
    assert not allowance.allows(201)
    clock.s += 400.0
    assert allowance.allows(1000)
    assert allowance.left_bytes() == 1000
    assert Allowance(None, now_s=clock).allows(1e18)


def test_what_is_under_way_is_counted_before_it_has_been_sent() -> None:
    allowance = Allowance(1000)
    first, second, third = object(), object(), object()
    assert allowance.reserve(first, 600)
    assert allowance.left_bytes() == 400
    assert not allowance.spend(500)
    assert not allowance.reserve(third, 401)
    assert allowance.reserve(second, 300)
    assert not allowance.allows(200)
    allowance.settle(third, 0)
    allowance.settle(first, 100)
    allowance.settle(second, 0)
    assert allowance.left_bytes() == 900
    allowance.settle(second, 0)
    assert allowance.left_bytes() == 900
    assert allowance.reserve(first, 600)
    allowance.reset_after_fork()
    assert allowance.left_bytes() == 900
    assert Allowance(None).reserve(first, 1e18)


def test_an_allowance_is_usable_in_a_forked_child_though_a_thread_of_the_parent_held_its_lock() -> None:
    allowance = Allowance(1000)
    allowance.spent(600)
    allowance._lock.acquire()  # as a thread does that does not exist in the child
    allowance.reset_after_fork()
    assert not allowance.allows(500)
    assert allowance.allows(400)
