"""The rate of a link is found however many requests share it."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from torchsurgeon.adapting.sharing import Sharing

SIZE = 100_000


def transfers(depth: int, count: int, rate: float, spacing_s: float, fair: bool) -> list[tuple[float, float, int]]:
    """When each transfer of a stream begins and arrives, and how many are under way then, on a link of ``rate`` bytes a
    second that is shared fairly or serves one after the other; a new one begins as one ends, not faster than heads."""
    now, next_s, begun = 0.0, 0.0, 0
    under_way: list[list[float]] = []  # when it began, bytes left
    done: list[tuple[float, float, int]] = []
    while len(done) < count:
        may_begin = begun < count and len(under_way) < depth
        each = rate / len(under_way) if fair and under_way else rate
        least = min(under_way, key=lambda t: t[1]) if fair and under_way else under_way[0] if under_way else None
        end_s = now + least[1] / each if least is not None else math.inf
        start_s = max(now, next_s) if may_begin else math.inf
        until = min(end_s, start_s)
        for transfer in under_way if fair else under_way[:1]:
            transfer[1] -= each * (until - now)
        now = until
        if start_s <= end_s:
            under_way.append([now, SIZE])
            begun, next_s = begun + 1, now + spacing_s
        else:
            assert least is not None
            under_way.remove(least)
            done.append((least[0], now, len(under_way)))
    return done


@example(depth=5, count=29, rate=1e4, spacing=0.0, fair=True)
@given(
    depth=st.integers(1, 8),
    count=st.integers(1, 100),
    rate=st.floats(1e4, 1e8),
    spacing=st.floats(0.0, 3.0),
    fair=st.booleans(),
)
def test_what_is_told_is_the_links_rate(depth: int, count: int, rate: float, spacing: float, fair: bool) -> None:
    """Whether the link, at ``spacing`` below 1, or the heads hold the stream up."""
    sharing, told = Sharing(), 0
    for begun_s, arrived_s, others in transfers(depth, count, rate, spacing * SIZE / rate, fair):
        alone = sharing.alone(SIZE, begun_s, arrived_s, others)
        if alone is not None:
            told += 1
            assert 0.7 * rate <= alone[0] / alone[1] <= 1.5 * rate
    assert told or count < 4 * depth


def test_requests_one_after_the_other_are_taken_as_they_are() -> None:
    sharing = Sharing()
    for begun_s in (0.0, 1.0, 2.5):
        told = sharing.alone(SIZE, begun_s, begun_s + 0.75, 0)
        assert told == (SIZE, 0.75)


def test_a_rate_that_changes_is_seen_within_a_window_or_two() -> None:
    sharing, rates = Sharing(), []
    slow = transfers(4, 100, 1e5, 0.0, True)
    end_s = slow[-1][1]
    fast = [(end_s + b, end_s + a, others) for b, a, others in transfers(4, 60, 1e6, 0.0, True)]
    for begun_s, arrived_s, others in slow + fast:
        alone = sharing.alone(SIZE, begun_s, arrived_s, others)
        if alone is not None:
            rates.append(alone[0] / alone[1])
    assert 0.6e6 < rates[-1] < 1.5e6
