"""What every test may ask for, and what is said at the end of the tests that were skipped."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from torchsurgeon.prediction.regression import FORMS
from torchsurgeon.serve import Server
from torchsurgeon.tracing.alone import TRACING

torch.set_num_threads(1)
# pytest-xdist sets it, and commands would fit their tables into it.
os.environ.pop("COLUMNS", None)
settings.register_profile("torchsurgeon", deadline=None, max_examples=50)
settings.load_profile("torchsurgeon")

ROOT = Path(__file__).parent.parent
INTEROP_PYTHON = ROOT / ".venv-interop" / "bin" / "python"
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]

Build = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing_gpu = pytest.mark.skip(reason="no NVIDIA GPU: benchmarks/device/run.sh FOLDER on a machine that has one")
    missing_venv = pytest.mark.skip(reason="no second PyTorch: make interop")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(missing_gpu)
        if item.get_closest_marker("interop") and not INTEROP_PYTHON.exists():
            item.add_marker(missing_venv)


def pytest_sessionfinish() -> None:
    # What was exempted from garbage collection ends in order.
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say each reason for which tests were skipped once, with the command that brings what they lack."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where = report.longrepr
        reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
        missing = re.match(r"could not import '([\w.]+)'", reason)
        reasons[f"no {missing[1]}: make setup" if missing else reason] += 1
    if reasons:
        terminalreporter.section("skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:4}  {reason}")


@pytest.fixture(scope="module", autouse=True)
def _settings_of_pytorch() -> Iterator[None]:
    """Put back what a file's tests have changed for the whole process, on which the bits of answers rest."""
    matmul = torch.backends.mkldnn.matmul
    engine, precision = torch.backends.quantized.engine, matmul.fp32_precision
    yield
    torch.backends.quantized.engine, matmul.fp32_precision = engine, precision


@pytest.fixture(scope="module", autouse=True)
def _collections_are_brief() -> None:
    """Have collections of garbage look only at what a file's own tests make: many tests collect it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_built_beside_the_next_test() -> Iterator[None]:
    """Wait for what a closed module or server still builds, since exporters change which warnings are shown."""
    yield
    with TRACING:
        pass


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is late before a second more than was predicted, instead of 50 ms.

    So an answer that other processes delay is still the server's, for a test of what happens when it is not late.
    """
    monkeypatch.setattr("torchsurgeon.adapting.deadline._LEAST_PATIENCE_S", 1.0)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server of the small model of ``support/classifier.py``, which all tests share and none may stop."""
    from classifier import serve

    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def interop_python() -> Path:
    """The interpreter of the second PyTorch; run it with PYTHONPATH at the checkout."""
    return INTEROP_PYTHON


@pytest.fixture(scope="session")
def build() -> Build:
    """build("recorder.cpp", "-o", target, …) compiles a file of tests/native, warnings being errors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: apt-get install g++")

    def run(source: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        path = ROOT / "tests" / "native" / source
        command = [compiler, "-std=c++20", *WARNINGS, "-iquote", str(ROOT / "csrc"), str(path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(scope="session")
def fake_gpu(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 and a libcupti.so.13 that record what a GPU would."""
    folder = tmp_path_factory.mktemp("gpu")
    for source, library in (("fake_cuda.cpp", "libcuda.so.1"), ("fake_cupti.cpp", "libcupti.so.13")):
        result = build(source, "-shared", "-fPIC", "-o", folder / library)
        assert result.returncode == 0, result.stderr
    return folder


class _Few(dict[str, object]):
    """Of all the forms, which a file may hold, those are tried that take a tenth of the time of boosted trees."""

    def __iter__(self) -> Iterator[str]:
        return iter(("linear", "log-linear", "forest"))


@pytest.fixture(scope="module")
def few_forms() -> Iterator[None]:
    """Choose among the forms that are quick to fit, where a test is about what is done with a predictor.

    That the best of all forms is chosen is tested with all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchsurgeon.prediction.regression.FORMS", _Few(FORMS))
        yield
