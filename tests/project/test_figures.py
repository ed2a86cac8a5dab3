"""Figures that a script writes into a page are those of the files they are taken from."""

from __future__ import annotations

import json

from paths import ROOT

from benchmarks.coverage import sweep
from benchmarks.device import figures


def test_the_table_of_models_is_of_the_results_that_are_kept() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())
    assert (ROOT / "docs" / "coverage.md").read_text() == sweep.page(document)


def test_what_a_gpu_has_shown_is_what_its_files_hold() -> None:
    shown = figures.PAGE.read_text().partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert shown == f"\n\n{figures.page()}\n"


def test_no_result_names_a_machine() -> None:
    for path in (ROOT / "benchmarks" / "results" / "device").iterdir():
        text = path.read_text()
        assert "GPU-" not in text, path
        assert "hostname" not in text, path
