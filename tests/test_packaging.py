from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_core_needs_only_what_an_edge_device_has() -> None:
    requirements = importlib.metadata.requires("torchsurgeon") or []
    core = {re.split(r"[ <>=;\[]", line)[0] for line in requirements if "extra ==" not in line}
    assert core == {"torch", "numpy", "scikit-learn", "requests"}


def test_every_extra_is_part_of_all() -> None:
    requirements = importlib.metadata.requires("torchsurgeon") or []
    (everything,) = (line for line in requirements if line.startswith("torchsurgeon["))
    named = set(re.split(r"[\[\]]", everything)[1].split(","))
    extras = set(importlib.metadata.metadata("torchsurgeon").get_all("Provides-Extra") or [])
    assert named == extras - {"all", "dev"}


def test_constraints_are_exact_and_name_no_host_or_path() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    exact = re.compile(r'[A-Za-z0-9._-]+==[0-9][0-9a-z.]*(; python_version (>=|<) "3\.1[0-9]")?')
    assert lines
    assert [line for line in lines if not exact.fullmatch(line)] == []


def run_setup(mode: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCHSURGEON_BUILD_EXT": mode}
    if path is not None:
        environment |= {"PATH": path, "CXX": "no-such-compiler", "CC": "no-such-compiler"}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_machine_without_compiler_still_installs(tmp_path: Path) -> None:
    where = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    result = run_setup("auto", *where, path=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "cannot trace CUDA kernels" in result.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_a_demanded_extension_that_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    where = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    assert run_setup("1", *where, path=str(tmp_path)).returncode != 0


@pytest.mark.parametrize("mode", ["yes", ""])
def test_an_unknown_build_mode_says_what_is_allowed(mode: str) -> None:
    result = run_setup(mode, "--version")
    assert result.returncode != 0
    assert "must be auto, 1 or 0" in result.stderr
