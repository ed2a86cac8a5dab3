"""Figures that a script writes into a page are those of the files they are taken from."""

from __future__ import annotations

from paths import ROOT

from benchmarks.device import figures


def test_what_a_gpu_has_shown_is_what_its_files_hold() -> None:
    shown = figures.PAGE.read_text().partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert shown == f"\n\n{figures.page()}\n"


def test_no_result_names_a_machine() -> None:
    for path in (ROOT / "benchmarks" / "results" / "device").iterdir():
        text = path.read_text()
        assert "GPU-" not in text, path
        assert "hostname" not in text, path
