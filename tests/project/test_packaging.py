from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from paths import ROOT


def test_core_needs_only_what_an_edge_device_has() -> None:
    requirements = importlib.metadata.requires("torchsurgeon") or []
    core = {re.split(r"[ <>=;\[]", line)[0] for line in requirements if "extra ==" not in line}
    assert core == {"torch", "numpy", "scikit-learn", "scipy", "threadpoolctl", "requests", "urllib3", "zstandard"}


def users_requirements() -> list[Requirement]:
    """What users install. The extras dev and docs are pinned by constraints.txt instead."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("torchsurgeon") or []]
    ours = ('extra == "dev"', 'extra == "docs"')
    return [r for r in requirements if r.name != "torchsurgeon" and not any(one in str(r.marker) for one in ours)]


def test_every_dependency_says_the_oldest_release_that_was_tested() -> None:
    requirements = users_requirements()
    assert requirements
    assert [r.name for r in requirements if not any(bound.operator == ">=" for bound in r.specifier)] == []


def test_uvicorn_whose_internals_are_used_is_bounded_above() -> None:
    (uvicorn,) = (r for r in users_requirements() if r.name == "uvicorn")
    assert any(bound.operator == "<" for bound in uvicorn.specifier)
    assert importlib.metadata.version("uvicorn") in uvicorn.specifier


def test_every_extra_is_part_of_all() -> None:
    requirements = importlib.metadata.requires("torchsurgeon") or []
    (everything,) = (line for line in requirements if line.startswith("torchsurgeon["))
    named = set(re.split(r"[\[\]]", everything)[1].split(","))
    extras = set(importlib.metadata.metadata("torchsurgeon").get_all("Provides-Extra") or [])
    # Ray is larger than all the others, and of use to those only who have a cluster.
    assert named == extras - {"all", "dev", "docs", "ray"}


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


SMOKE = """
import sys, torch, torchsurgeon
from torchsurgeon import _native, hooks, meters
with hooks.SpanRecorder(2) as recorder:
    recorder.end(recorder.begin(7))
    (span,) = recorder.spans()
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
x = torch.randn(3, 4)
head, tail = (part := torchsurgeon.cut(torchsurgeon.trace(model, x), 1)).head, part.tail
assert torch.equal(tail(*head(x)), model(x))
print(sys.version_info[:2], torch.__version__, span.id, torchsurgeon.__file__)
"""


@pytest.mark.interop
def test_one_wheel_serves_another_pytorch(tmp_path: Path, interop_python: Path) -> None:
    source = tmp_path / "source"
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    for name in ("torchsurgeon", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path), str(source)]
    environment = {**os.environ, "TORCHSURGEON_BUILD_EXT": "1"}
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, *build], env=environment, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("torchsurgeon-0.1.0-cp310-abi3-")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    result = subprocess.run(
        [interop_python, "-c", SMOKE],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert " 7 " in result.stdout
    assert str(target) in result.stdout
