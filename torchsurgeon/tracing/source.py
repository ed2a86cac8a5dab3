"""The code of functions as text that is equal in every process, and under every version of Python where source exists.

Bytecode differs between versions of Python, and a name says nothing about what a function computes. So the text of a
function is its syntax tree, without positions, comments, docstrings and annotations. The source file may have been
edited since it was imported: the tree counts only if compiling the file again gives the very bytecode that the function
has. Otherwise, and where there is no source, the text is the bytecode, with Python's version.

Functions of PyTorch, NumPy and the standard library are called by their names: what a name of theirs means is settled
by their own versions, and their source changes with each.
"""

from __future__ import annotations

import ast
import functools
import linecache
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PYTHON = sysconfig.get_path("stdlib") + os.sep
_LIBRARIES = tuple(str(Path(str(package.__file__)).parent) + os.sep for package in (torch, np))
_THIRD_PARTY = ("site-packages", "dist-packages")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# Of the flags of a code object only those that change what it does: *args, **kwargs, generators and coroutines.
_FLAGS = 0x4 | 0x8 | 0x20 | 0x80 | 0x200
# A line that no file has.
_BEYOND = 10_000_000
_LEFT_OUT = {"ctx", "type_comment", "kind", "type_params", "annotation", "returns"}


def code_text(code: types.CodeType) -> str:
    """Return a text that is equal for code that does the same by its source, or by its bytecode without source."""
    node = tree(code)
    if node is not None:
        return _tree_text(node)
    return f"{sys.implementation.cache_tag} {_content(code)!r}"


def tree(code: types.CodeType) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | None:
    """Return the syntax tree of a function; None where no source gives exactly this code."""
    if code.co_filename in linecache.cache or Path(code.co_filename).is_file():
        linecache.checkcache(code.co_filename)
        return _compiled("".join(linecache.getlines(code.co_filename))).get(_content(code))
    return None


def function_of(value: Any) -> Any:
    """Return the function behind a method, a static or class method or a property; any other value as it is.

    Other values are asked nothing: some stand for a package that is missing, and raise whatever they are asked.
    """
    if isinstance(value, (types.MethodType, staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def code_of(value: Any) -> types.CodeType | None:
    """Return the code of a function or method; None for any other value."""
    function = function_of(value)
    return function.__code__ if isinstance(function, types.FunctionType) else None


def is_library_code(code: types.CodeType) -> bool:
    """Return whether code is of PyTorch, NumPy or the standard library."""
    return _in_library(code.co_filename)


@functools.cache
def is_library_module(name: str) -> bool:
    """Return whether a Python module, by its name, is of PyTorch, NumPy, the standard library or the interpreter."""
    root = name.partition(".")[0]
    if root not in sys.stdlib_module_names and root not in ("torch", "numpy"):
        return False
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is None or _in_library(file)


@functools.cache
def is_installed_module(name: str) -> bool:
    """Return whether a Python module lies where packages are installed."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return any(folder in Path(file).parts for folder in _THIRD_PARTY)


def _in_library(file: str) -> bool:
    if file.startswith("<frozen ") or file.startswith(_LIBRARIES):
        return True
    return file.startswith(_PYTHON) and not file[len(_PYTHON) :].startswith(_THIRD_PARTY)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> dict[Any, Any]:
    """Return the syntax tree of every function in a source text, by the content of its code."""
    try:
        module = ast.parse(source)
        nodes = _by_first_line([node for node in ast.walk(module) if isinstance(node, _FUNCTIONS)])
        compiled = compile(module, "<source>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    found: dict[Any, Any] = {}
    for code in _inside(compiled):
        node = nodes.get(code.co_firstlineno)
        if node is not None and code.co_name == getattr(node, "name", "<lambda>"):
            found.setdefault(_content(code), node)
    return found


def _by_first_line(nodes: list[Any]) -> dict[int, Any]:
    """Return functions by the line that their code will name as its first.

    Where several begin on one line, each is moved to a line of its own beyond the file's end.
    """
    found: dict[int, Any] = {}
    for number, node in enumerate(nodes, _BEYOND):
        line = min(placed.lineno for placed in (node, *getattr(node, "decorator_list", ())))
        if line in found:
            line = number
            for placed in (node, *getattr(node, "decorator_list", ())):
                placed.lineno = placed.end_lineno = line
                placed.col_offset = placed.end_col_offset = 0
        found[line] = node
    return found


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _inside(constant)


def _content(code: types.CodeType) -> tuple[Any, ...]:
    """Return what code does, without where it stands: equal for equal code of one version of Python."""
    return (
        code.co_name,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags & _FLAGS,
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        getattr(code, "co_exceptiontable", b""),
        tuple(map(_constant, code.co_consts)),
    )


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _content(value)
    if isinstance(value, frozenset):
        # The order of a set of texts differs from process to process.
        return ("frozenset", *sorted(map(repr, value)))
    if isinstance(value, tuple):
        return ("tuple", *map(_constant, value))
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    return type(value).__name__, repr(value)


def _tree_text(node: ast.AST, *, outermost: bool = True) -> str:
    """Return a tree as text. ``ast.dump`` writes empty fields in some versions of Python and not in others."""
    parts = []
    for name, value in ast.iter_fields(node):
        if name in _LEFT_OUT or value is None or value == []:
            continue
        if outermost and name in ("name", "decorator_list"):
            continue  # neither is part of what runs when this function is called
        if name == "body" and isinstance(node, _FUNCTIONS) and isinstance(value, list):
            value = _without_docstring(value)
        parts.append(f"{name}={_field_text(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _field_text(value: Any) -> str:
    if isinstance(value, ast.AST):
        return _tree_text(value, outermost=False)
    if isinstance(value, list):
        return f"[{','.join(map(_field_text, value))}]"
    return f"{type(value).__name__} {value!r}"


def _without_docstring(body: list[Any]) -> list[Any]:
    first = body[0]
    stands_alone = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if stands_alone and isinstance(first.value.value, str) else body
