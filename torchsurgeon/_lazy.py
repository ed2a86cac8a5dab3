"""Packages whose names are loaded from their files when they are first used (PEP 562).

A device without PyTorch imports single files of these packages. Importing a file imports its package first, which must
therefore not import the files that need PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def names_of(package: str, names_by_file: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, which loads a name, or a file, when it is first used.

    Args:
        package: the package's ``__name__``.
        names_by_file: the names that each file of the package defines for it.
    """
    file_of = {name: file for file, names in names_by_file.items() for name in names}

    def load(name: str) -> Any:
        if name in file_of:
            value = getattr(import_module(f"{package}.{file_of[name]}"), name)
        elif name in names_by_file:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return load
