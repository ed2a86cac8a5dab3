"""Every name of the package that a docstring, a comment or a page mentions exists."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pages import PAGES
from paths import ROOT

import torchsurgeon as ts
from torchsurgeon.serve.outcome import Outcome

FOLDERS = [ROOT / folder for folder in ("torchsurgeon", "benchmarks", "docs", "examples", "tests")]
PROGRAMS = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
# torchsurgeon.planning.Constraints or ts.plan; not torchsurgeon.profile/2, which is a format of files.
DOTTED = re.compile(r"(?<![\w.\-/])(?:torchsurgeon|ts)((?:\.[A-Za-z_]\w*)+)(?![\w/])")
# ``Frontier.best`` and `Frontier.best(…)`: a class of the package and what it has.
OF_A_CLASS = re.compile(r"`([A-Z]\w*[a-z]\w*)\.(\w+)[`(]")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data|obj):`[\w.~]")
# Of OpenTelemetry's spans and their attributes, whose names begin with the package's and are no Python names.
SPANS = {"inference", "request"}
TELEMETRY = {*SPANS, *ts.Inference.__dataclass_fields__, *Outcome._fields, "partition_index", "predicted_cost"}
# What is not there without a compiler, and what needs a package that the tests do not install.
ABSENT = ("torchsurgeon._C", *(() if importlib.util.find_spec("ray") else ("torchsurgeon.serve.ray",)))


@functools.cache
def modules() -> dict[str, ModuleType]:
    """All modules of the package by name."""
    found = {"torchsurgeon": ts}
    for info in pkgutil.walk_packages(ts.__path__, "torchsurgeon."):
        if not info.name.endswith(("__main__", "._C")) and info.name not in ABSENT:
            found[info.name] = importlib.import_module(info.name)
    return found


def has(value: object, name: str) -> bool:
    """Whether a module, class or function has an attribute, also one that only its instances have."""
    if hasattr(value, name):
        return True
    return inspect.isclass(value) and any(
        name in vars(base).get("__annotations__", {}) or f"self.{name}" in _source(base) for base in value.__mro__
    )


@functools.cache
def _source(value: type) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""


def exists(dotted: str) -> bool:
    """Whether a dotted name, without the package's, leads from module to attribute to attribute."""
    value: object = ts
    path = "torchsurgeon"
    for name in dotted.strip(".").split("."):
        path = f"{path}.{name}"
        if path in modules():
            value = modules()[path]
        elif has(value, name) or path.startswith(ABSENT):
            value = getattr(value, name, None)
        else:
            return False
    return True


def said(path: Path) -> Iterator[tuple[int, str]]:
    """The comments and strings of a program, with their lines; its docstrings are among them."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def everything() -> Iterator[tuple[str, str]]:
    """What is said where, in programs and on pages."""
    for path in PROGRAMS:
        for line, text in said(path):
            yield f"{path.relative_to(ROOT)}:{line}", text
    for page in PAGES:
        for line, text in enumerate(page.read_text().splitlines(), 1):
            yield f"{page.relative_to(ROOT)}:{line}", text


def test_every_dotted_name_exists() -> None:
    missing = [
        f"{where}: {match[0]}"
        for where, text in everything()
        for match in DOTTED.finditer(text)
        if not (exists(match[1]) or match[1][1:] in TELEMETRY)
    ]
    assert missing == []


def test_every_attribute_of_a_class_exists() -> None:
    classes: dict[str, list[type]] = {}
    for module in modules().values():
        for name, value in inspect.getmembers(module, inspect.isclass):
            classes.setdefault(name, []).append(value)
    missing = [
        f"{where}: {match[0]}"
        for where, text in everything()
        for match in OF_A_CLASS.finditer(text)
        if match[1] not in vars(builtins) and not any(has(value, match[2]) for value in classes.get(match[1], []))
    ]
    assert missing == []


def test_docstrings_are_markdown() -> None:
    """The site and editors show ``Plan`` as code; a role, as reST has them, they show as it stands."""
    roles = [f"{where}: {match[0]}" for where, text in everything() for match in ROLE.finditer(text)]
    assert roles == []


@pytest.mark.parametrize("name", sorted(name for name, module in modules().items() if hasattr(module, "__path__")))
def test_no_attribute_hides_a_module(name: str) -> None:
    """``import torchsurgeon.planning as p`` takes the attribute: a function of that name would come instead."""
    package = modules()[name]
    for other, module in modules().items():
        if other.rpartition(".")[0] == name:
            assert getattr(package, other.rpartition(".")[2]) is module, other
