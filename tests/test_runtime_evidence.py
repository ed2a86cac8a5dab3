"""Short versions of the benchmarks that show a runtime to be safe: nothing lost, wrong or late, nothing that grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def results_of(script: str, out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert out.exists(), ended.stdout + ended.stderr
    return json.loads(out.read_text())["results"]  # type: ignore[no-any-return]


def test_no_fault_loses_or_spoils_an_answer_or_keeps_the_server_from_being_used_again(tmp_path: Path) -> None:
    # A second for an inference of milliseconds, and twice the time for a return, since other tests run beside it.
    found = results_of("runtime_faults.py", tmp_path / "faults.json", "--count", "120", "--deadline", "1")
    assert (found["lost"], found["wrong"], found["late"]) == (0, 0, 0), found["failures"]
    assert found["faults"] == 24
    assert {kind["injected"] for kind in found["kinds"].values()} == {2}
    assert len(found["kinds"]) == 12
    assert sum(kind["met"] for kind in found["kinds"].values()) >= 20
    assert found["back_latest_s"] < 4


def test_memory_threads_and_descriptors_do_not_grow(tmp_path: Path) -> None:
    found = results_of("soak.py", tmp_path / "soak.json", "--count", "8000")
    for way in ("in process", "HTTP"):
        assert found[way]["wrong"] == 0
        growth = found[way]["growth"]
        for name in ("threads", "descriptors"):
            # Later inferences may find one more connection or thread useful, but not one each.
            assert growth[name]["last"] <= growth[name]["first"] + 2, (way, name, growth[name])
        assert growth["memory_bytes"]["last"] - growth["memory_bytes"]["first"] < 8e6
    assert found["HTTP"]["growth"]["server_descriptors"]["each"] < 0.01
