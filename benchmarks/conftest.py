"""What every suite has: the device, rivals timed in turns, networks, and a word on where the figures were taken."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.stats import Metadata

from benchmarks.support import networks
from benchmarks.support.side_by_side import Rivals, SideBySide, compare, ratio_lines
from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon.profiling import provenance

# Facts that differ between two runs on one machine and say nothing of how quick it is.
PASSING = ("commit", "cpu_clock_mhz", "date", "gpu_clock_mhz", "load_average", "temperature_c")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torchsurgeon")
    group.addoption("--device", default="cpu", help="where models and tensors are: cpu or cuda (default: %(default)s)")
    group.addoption(
        "--threads", type=int, default=1, help="threads of PyTorch on the CPU in each process (default: %(default)s)"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    torch.manual_seed(0)
    # Profiling and serving ask for this when they begin. Asked for here, what one suite does cannot change the next.
    keep_freed_memory()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.device(config.getoption("--device")).type == "cuda" and not torch.cuda.is_available():
        missing = pytest.mark.skip(reason=f"PyTorch {torch.__version__} sees no CUDA device")
        for item in items:
            item.add_marker(missing)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def network(device: torch.device) -> networks.Network:
    """network("resnet50") is torchvision's, with random weights, and an image for it, both on the device."""
    return functools.cache(functools.partial(networks.network, device=device))


@pytest.fixture
def side_by_side(benchmark: BenchmarkFixture, device: torch.device, pytestconfig: pytest.Config) -> SideBySide:
    """side_by_side({"the simplest way": function, …}) times the functions in turns; CUDA is synchronised after each."""

    def synchronised(rival: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            rival()
            torch.cuda.synchronize(device)

        return run

    def run(rivals: Rivals) -> dict[str, Metadata]:
        if device.type == "cuda":
            rivals = {name: synchronised(rival) for name, rival in rivals.items()}
        found = compare(benchmark, rivals)
        pytestconfig.stash.setdefault(compared, []).extend(found.values())
        return found

    return run


# --- what is printed and saved ---

compared = pytest.StashKey[list[Metadata]]()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(compared, [])
    if found:
        terminalreporter.section("ratios to the first of each group, round by round: median and quartiles")
        for line in ratio_lines(found):
            terminalreporter.write_line(line)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    # In place of pytest-benchmark's own, which has the machine's name and not its threads, PyTorch or power mode.
    return provenance(config.getoption("--device") if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info["project"] = "torchsurgeon"  # and not the name of the checkout's folder


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    # So that a run is small enough to be kept in a repository. --benchmark-save-data keeps every single time.
    if not config.getoption("benchmark_save_data"):
        for row in output_json["benchmarks"]:
            row.pop("options", None)
            row["stats"].pop("data", None)
            row["stats"], row["extra_info"] = rounded(row["stats"]), rounded(row["extra_info"])


def rounded(value: Any) -> Any:
    """Return the same with four digits of every float."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    """Let pytest-benchmark warn of another device, PyTorch or number of threads, and not of another date."""
    for info in (machine_info, compared_benchmark["machine_info"]):
        for name in PASSING:
            info.pop(name, None)
