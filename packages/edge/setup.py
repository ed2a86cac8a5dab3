"""Builds the wheel ``torchsurgeon-edge``: the files of the package that ``torchsurgeon.edge`` imports, and no others.

They are found by following the imports. Those for type checkers, and those that a package makes for its users when a
name is first used, are not followed.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torchsurgeon"


def needed() -> list[Path]:
    """Return the files that a device needs, relative to the root of the checkout."""
    found: set[Path] = set()
    waiting = [*(PACKAGE / "edge").glob("*.py")]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += [folder / "__init__.py" for folder in path.parents if folder.is_relative_to(PACKAGE)]
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            place = ROOT.joinpath(*name.split("."))
            waiting += [one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()]
    return sorted(path.relative_to(ROOT) for path in found)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names of what a file imports when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            branch = node.body if isinstance(node.test, ast.UnaryOp) else node.orelse
            yield from imports(ast.Module(branch, []))
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imports(node)


class BuildFiles(build_py):
    """Copies the needed files from the package."""

    def run(self) -> None:
        # What an earlier build has left there may belong to the package no more.
        shutil.rmtree(Path(self.build_lib) / "torchsurgeon", ignore_errors=True)
        for path in self.copied():
            target = Path(self.build_lib) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, target)

    def copied(self) -> list[Path]:
        return [*needed(), Path("torchsurgeon/py.typed")]

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [str(Path(self.build_lib) / path) for path in self.copied()]


if __name__ == "__main__":
    version = re.search(r'^__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    setup(version=version[1], py_modules=["torchsurgeon.edge"], cmdclass={"build_py": BuildFiles})
