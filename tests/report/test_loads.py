"""The table and the picture of a load test show what was found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from torchsurgeon.loadtest.result import KindResult, LoadReport, LoadRun, summary
from torchsurgeon.report import load_findings, load_picture, load_table

NONE = np.array([])


def run_at(rate_per_s: float | None, latencies_s: np.ndarray, late_s: float = 1e-4, **errors: int) -> LoadRun:
    kind = KindResult("net", "features.5", "int8", 1000, np.sort(latencies_s), NONE, NONE, errors)
    reasons = dict.fromkeys(errors, "too many wait")
    return LoadRun(rate_per_s, 10.0, 9.0, (kind,), np.full(len(latencies_s), late_s), reasons)


def shown(found: LoadReport, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(load_table(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_has_the_rate_the_answers_and_their_percentiles() -> None:
    latencies_s = np.linspace(0.001, 1.0, 1000)
    text = shown(LoadReport("http://a", "exponential", 20, [run_at(120.0, latencies_s)]), 160)
    assert "120/s" in text
    assert "100/s" in text
    assert "500.0 ms" in text
    assert "990.0 ms" in text
    assert "1.00 s" in text
    assert "counted" not in text
    # A narrow terminal keeps what is needed most.
    narrow = shown(LoadReport("http://a", "exponential", 20, [run_at(120.0, latencies_s)]), 60)
    assert all(header in narrow for header in ("p50", "p99", "errors"))
    assert max(map(len, narrow.splitlines())) <= 60


def test_percentiles_are_values_that_occurred() -> None:
    found = summary(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found is not None
    assert (found["p50"], found["p99"], found["max"]) == (2.0, 4.0, 4.0)
    assert summary(NONE) is None


def test_errors_and_a_program_that_was_late_itself_are_told() -> None:
    latencies_s = np.full(100, 0.01)
    calm = LoadReport("http://a", "exponential", 20, [run_at(10.0, latencies_s)])
    assert load_findings(calm) == []
    bad = LoadReport("http://a", "exponential", 20, [run_at(10.0, latencies_s, 0.005, **{"HTTP 503": 7})])
    errors, late = load_findings(bad)
    assert errors == "7 × HTTP 503, such as: too many wait"
    assert "5.0 ms late" in late
    assert "50%" in late
    nothing = LoadReport("http://a", "closed loop", 20, [run_at(None, NONE, **{"no answer in time": 1})])
    assert "–" in shown(nothing, 160)
    assert len(load_findings(nothing)) == 1


@pytest.mark.parametrize("rates", [[10.0], [10.0, 20.0], [None], [10.0, 20.0, None]])
def test_a_picture_is_drawn_for_any_number_of_rates(rates: list[float | None], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "load.svg"
    generator = np.random.default_rng(0)
    runs = [run_at(rate, generator.exponential(0.01, 500)) for rate in rates]
    load_picture(LoadReport("http://a", "exponential", 20, runs), path)
    text = path.read_text()
    assert "percentile of the requests" in text
    assert ("requests per second" in text) == (len([rate for rate in rates if rate]) > 1)


def test_a_picture_without_any_answer_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load_picture(LoadReport("http://a", "exponential", 20, [run_at(5.0, NONE)]), tmp_path / "load.png")
