"""The benchmarks can be run: every suite is collected, and a run can be saved and compared with the next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from paths import ROOT, environment

SUBJECTS = (
    "tracing", "cutting", "profiling", "prediction", "planning", "codecs", "wire", "server", "split_module", "streams",
)  # fmt: skip
SMALLEST = ("benchmarks/test_cutting.py", "-k", "test_running_both_sides and chain")


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # pytest-benchmark times nothing in a process that pytest-xdist has told to be one of several.
    apart = {name: value for name, value in environment().items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_every_subject_has_a_suite_and_it_is_collected() -> None:
    collected = run("benchmarks", "--collect-only", "-q", "--benchmark-disable")
    assert {subject for subject in SUBJECTS if f"test_{subject}.py::" in collected} == set(SUBJECTS)


def test_rivals_run_once_where_nothing_is_to_be_timed() -> None:
    assert "1 passed" in run(*SMALLEST, "--benchmark-disable")


def test_rivals_take_turns_and_a_run_can_be_compared_with_a_saved_one(tmp_path: Path) -> None:
    timed = (*SMALLEST, f"--benchmark-storage=file://{tmp_path}", "--benchmark-max-time=0.01")
    run(*timed, "--benchmark-save=before")
    (saved,) = tmp_path.rglob("0001_before.json")
    before: dict[str, Any] = json.loads(saved.read_text())

    assert before["machine_info"]["torch"] == torch.__version__
    assert before["machine_info"]["threads"] == 1
    assert "node" not in before["machine_info"]
    names = [row["name"] for row in before["benchmarks"]]
    assert names == ["the model", "fx split_module", "torchsurgeon"]
    assert len({row["stats"]["rounds"] for row in before["benchmarks"]}) == 1
    for row in before["benchmarks"]:
        assert row["group"] == "running both sides, chain of 200"
        assert row["extra_info"]["baseline"] == "the model"
        assert "data" not in row["stats"]

    again = run(*timed, "--benchmark-compare=0001")
    for name in names:
        assert f"{name} (0001_before)" in again
        assert f"{name} (NOW)" in again
    assert "machine_info is different" not in again
