"""A room of the package imports only rooms above it, and none knows what it must not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "torchsurgeon"

# Top to bottom is the data's way. A room is a file, or a folder taken as one.
ROOMS = [
    "errors",
    "_json_file",
    "_native",
    "_allocator",
    "tracing",
    "cutting",
    "hooks",
    "meters",
    "profiling",
    "prediction",
    "link",
    "codec",
    "planning",
    "adapting",
    "wire",
    "models",
    "transport",
    "runtime",
    "module",
    "serve",
    "emulate",
    "simulate",
    "report",
    "demo",
    "cli",
    "__main__",
]

NETWORK = {
    "http",
    "socket",
    "socketserver",
    "ssl",
    "urllib",
    "requests",
    "httptools",
    "uvicorn",
    "starlette",
    "asyncio",
}
MUST_NOT_KNOW = {
    **dict.fromkeys(["tracing", "cutting"], NETWORK),
    **dict.fromkeys(["planning"], NETWORK),
    "meters": NETWORK | {"torchsurgeon.tracing", "torchsurgeon.cutting", "torchsurgeon.cutting.segment"},
    "profiling": NETWORK | {"torchsurgeon.planning"},
    "prediction": NETWORK | {"torchsurgeon.planning"},
    "link": NETWORK | {"torchsurgeon.tracing", "torchsurgeon.cutting"},
    "codec": NETWORK | {"torchsurgeon.planning"},
    "adapting": NETWORK | {"torch", "numpy", "torchsurgeon.tracing", "torchsurgeon.cutting", "torchsurgeon.profiling"},
    "wire": NETWORK | {"torchsurgeon.tracing.graph", "torchsurgeon.cutting", "torchsurgeon.planning"},
    "transport": {"torchsurgeon.planning", "torchsurgeon.tracing"},
    "module": {"torchsurgeon.serve"},
    "serve": {"torchsurgeon.planning"},
    "simulate": NETWORK,
    "report": NETWORK,
}
EVERYWHERE_FORBIDDEN = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


def room_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imports(source: str, package: str = "torchsurgeon") -> Iterator[tuple[int, str]]:
    """Every module that ``source`` imports anywhere, in functions and for type checking too, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*parents, base]))
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def package_of(path: Path) -> str:
    return ".".join(("torchsurgeon", *path.relative_to(PACKAGE).parts[:-1]))


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def downward(path: Path, source: str) -> list[str]:
    here = ROOMS.index(room_of(path))
    found = {}
    for line, module in imports(source, package_of(path)):
        parts = module.split(".")
        if parts[0] == "torchsurgeon" and len(parts) > 1 and parts[1] in ROOMS and ROOMS.index(parts[1]) > here:
            found[line] = f"{path.name}:{line} imports {parts[1]}, which stands below {room_of(path)}"
    return list(found.values())


def forbidden(path: Path, source: str) -> list[str]:
    banned = MUST_NOT_KNOW.get(room_of(path), set()) | EVERYWHERE_FORBIDDEN
    return [
        f"{path.name}:{line} imports {module}, of which {room_of(path)} must not know"
        for line, module in imports(source, package_of(path))
        if any(module == name or module.startswith(f"{name}.") for name in banned)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    assert room_of(path) in ROOMS, (
        f"{path.relative_to(PACKAGE)} stands in no room: put it in ROOMS, above whatever imports it, "
        "and into the table of docs/architecture.md"
    )
    assert downward(path, path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_does_not_know_what_it_must_not(path: Path) -> None:
    assert forbidden(path, path.read_text()) == []


def test_this_test_sees_what_it_forbids() -> None:
    graph, serve = PACKAGE / "tracing" / "graph.py", PACKAGE / "serve" / "app.py"
    for line in (
        "from torchsurgeon.wire import encode_request",
        "from torchsurgeon import wire",
        "import torchsurgeon.wire as w",
        "from .. import wire",
        "from ..wire import encode_request",
        "def f():\n    from torchsurgeon import cli",
    ):
        assert downward(graph, line), line
    assert downward(serve, "from ..cli import main")
    assert not downward(serve, "from . import registry")
    assert not downward(graph, "from torchsurgeon.errors import TraceError")
    for line in ("import http.client", "from urllib import request", "import pickle"):
        assert forbidden(graph, line), line


def test_importing_the_package_imports_no_server_and_no_plotting() -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, torchsurgeon; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    ).stdout.split()
    assert not {"uvicorn", "starlette", "matplotlib", "rich", "torchvision", "torchsurgeon.serve"} & set(listed)
