"""The stopwatch behind the estimates: no step of the clock makes time run backwards, or stops it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from virtual_time import Clock

from torchsurgeon.adapting.clock import Since


@given(
    st.lists(
        st.tuples(st.sampled_from(["wait", "step back", "lap", "mark"]), st.integers(0, 1000)), min_size=1, max_size=30
    )
)
def test_a_stopwatch_counts_what_has_passed_and_no_step_back(events: list[tuple[str, int]]) -> None:
    clock = Clock()
    since, passed_s = Since(clock), 0
    for event, seconds in events:
        if event == "wait":
            clock.s += seconds
            passed_s += seconds
        elif event == "step back":
            assert since.passed_s() == passed_s
            clock.s -= seconds
        elif event == "lap":
            assert since.lap_s() == passed_s
            passed_s = 0
        else:
            since.mark()
            passed_s = 0
        assert since.passed_s() == passed_s
