"""When requests are due: at random, or as recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchsurgeon.errors import LoadTestError
from torchsurgeon.loadtest import Arrivals


def test_poisson_arrivals_have_their_rate_and_no_memory() -> None:
    times_s = Arrivals.named("exponential").times_s(100.0, 200.0)
    gaps_s = np.diff(times_s)
    assert len(times_s) == pytest.approx(20_000, rel=0.03)
    assert times_s[-1] < 100.0
    assert gaps_s.min() >= 0
    # A Poisson process has as much variance as mean in every window, and its gaps spread as far as their mean.
    counts = np.histogram(times_s, bins=1000, range=(0, 100))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.15)
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.05)


def test_another_seed_gives_other_moments_and_the_same_seed_the_same() -> None:
    arrivals = Arrivals.named("exponential")
    assert np.array_equal(arrivals.times_s(1.0, 50.0, 1), arrivals.times_s(1.0, 50.0, 1))
    assert not np.array_equal(arrivals.times_s(1.0, 50.0, 1)[:5], arrivals.times_s(1.0, 50.0, 2)[:5])


def test_recorded_gaps_keep_their_order_and_are_scaled_to_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text("# a burst of three, then a pause\n0.1\n0.1\n\n0.1\n0.7\n")
    arrivals = Arrivals.recorded(path)
    assert arrivals.mean_gap_s == pytest.approx(0.25)
    assert arrivals.times_s(1.25) == pytest.approx([0.1, 0.2, 0.3, 1.0, 1.1, 1.2])
    assert arrivals.times_s(0.625, 8.0) == pytest.approx([0.05, 0.1, 0.15, 0.5, 0.55, 0.6])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.1\nsoon\n", "line 2"),
        ("-1\n", "0 or more"),
        ("nan\n", "0 or more"),
        ("", "holds 0"),
        ("0\n0\n", "only zeros"),
    ],
)
def test_a_recording_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text(text)
    with pytest.raises(LoadTestError, match=reason):
        Arrivals.recorded(path)


def test_what_has_no_rate_or_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="exponential, constant"):
        Arrivals.named("poison")
    with pytest.raises(LoadTestError, match="cannot be read"):
        Arrivals.recorded(tmp_path / "absent")
    for rate in (None, 0.0, -1.0, float("inf")):
        with pytest.raises(LoadTestError, match="rate"):
            Arrivals.named("constant").times_s(1.0, rate)
    with pytest.raises(LoadTestError, match="duration"):
        Arrivals.named("constant").times_s(0.0, 1.0)
