"""What the package exports is what it says it exports, and is loaded when it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import environment

import torchsurgeon as ts

ROOMS = {room.name for room in pkgutil.iter_modules(ts.__path__) if not room.name.startswith("_")}
NEED_EXTRAS = {"cli", "demo", "loadtest", "report", "serve"}


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=120, check=False
    )


def for_type_checkers() -> list[tuple[str, str, str | None]]:
    """(module, name, name as which it is imported) of every import that only type checkers read."""
    tree = ast.parse(Path(ts.__file__).read_text())
    (condition,) = (node for node in tree.body if isinstance(node, ast.If))
    return [
        (node.module or "", alias.name, alias.asname)
        for node in ast.walk(ast.Module(condition.orelse, []))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_type_checkers_read_the_names_that_are_loaded() -> None:
    loaded = [("torchsurgeon", room, room) for room in ts._ROOMS]
    loaded += [(f"torchsurgeon.{room}", name, name) for name, room in ts._ROOM_OF.items()]
    assert sorted(for_type_checkers()) == sorted(loaded)


def test_every_name_is_the_one_its_room_exports() -> None:
    for name, room in ts._ROOM_OF.items():
        module = importlib.import_module(f"torchsurgeon.{room}")
        assert getattr(ts, name) is getattr(module, name)
        assert name in getattr(module, "__all__", vars(module))
    assert sum(map(len, ts._NAMES_BY_ROOM.values())) == len(ts.__all__), "a name is given to two rooms"


def test_every_room_without_extras_is_an_attribute() -> None:
    assert set(ts._ROOMS) == ROOMS - NEED_EXTRAS
    for room in ts._ROOMS:
        assert getattr(ts, room) is importlib.import_module(f"torchsurgeon.{room}")


def test_every_error_and_warning_is_exported() -> None:
    assert {name for name, value in vars(ts.errors).items() if inspect.isclass(value)} <= set(ts.__all__)


def test_dir_and_star_have_every_name_before_it_is_loaded() -> None:
    program = "import sys, torchsurgeon\nprint(*dir(torchsurgeon))\nassert 'torch' not in sys.modules"
    assert {"__version__", *ts.__all__, *ts._ROOMS} <= set(run(program).stdout.split())
    program = "from torchsurgeon import *\nprint(*(name for name in globals() if not name.startswith('__')))"
    assert sorted(run(program).stdout.split()) == sorted(ts.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error_with_a_hint() -> None:
    with pytest.raises(AttributeError, match="'torchsurgeon' has no attribute 'SplitModul'") as caught:
        ts.SplitModul  # type: ignore[attr-defined]  # noqa: B018
    assert caught.value.name == "SplitModul"
    assert caught.value.obj is ts
    with pytest.raises(ImportError, match="SplitModul"):
        from torchsurgeon import SplitModul  # type: ignore[attr-defined]  # noqa: F401


WITHOUT_TORCH = {
    "version": "import torchsurgeon; print(torchsurgeon.__version__)",
    "errors": "from torchsurgeon import InfeasibleError, NoisyProfileWarning, errors; errors.short(1)",
    "link": "from torchsurgeon import Link, BandwidthTrace; Link.parse('lte').uplink_s(1000)",
    "adapting": "from torchsurgeon.adapting import CircuitBreaker, Decider; CircuitBreaker()",
    "emulate": "from torchsurgeon.emulate import LinkEmulator, SlowDevice, parse_profile; SlowDevice(2).call(int)",
    "meters": "from torchsurgeon import meters; meters.find_meter('cpu').close(); meters.find_meter('cuda:1').close()",
    "cli": "from torchsurgeon import cli; cli.parser().format_help()",
    "edge": "from torchsurgeon import edge; edge.open; from torchsurgeon.planning.costs import CostTable",
}


@pytest.mark.parametrize("program", WITHOUT_TORCH.values(), ids=WITHOUT_TORCH)
def test_parts_that_need_no_torch_work_without_it(program: str) -> None:
    result = run(f"import sys\nsys.modules['torch'] = None\n{program}")
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_no_torch_and_all_its_names_no_server_and_no_plotting() -> None:
    listed = set(run("import sys, torchsurgeon; print(*sys.modules)").stdout.split())
    assert "torchsurgeon" in listed
    assert not {"torch", "numpy", "torchsurgeon.errors"} & listed
    listed = set(run("import sys; from torchsurgeon import *; print(*sys.modules)").stdout.split())
    assert "torchsurgeon.module" in listed
    assert not {"uvicorn", "starlette", "matplotlib", "rich", "torchvision", "torchsurgeon.serve"} & listed


@pytest.mark.parametrize("package", ["codec", "loadtest", "planning", "transport", "wire"])
def test_packages_that_load_names_later_load_those_that_type_checkers_read(package: str) -> None:
    module = importlib.import_module(f"torchsurgeon.{package}")
    (condition,) = (
        node for node in ast.parse(Path(module.__file__ or "").read_text()).body if isinstance(node, ast.If)
    )
    read = [
        (alias.name, node.module or "")
        for node in condition.orelse
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(name for name, _ in read) == sorted(module.__all__)
    for name, place in read:
        assert getattr(module, name) is getattr(importlib.import_module(place), name)
    with pytest.raises(AttributeError, match=f"'torchsurgeon.{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018
