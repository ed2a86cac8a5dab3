"""Python's own functions that want a number itself: ``int``, ``float``, ``len`` and those of ``math``.

They call a stand-in's ``__index__``, ``__int__`` or ``__float__``, which must return a real number, so the size would
be fixed. While a model is recorded, its modules therefore see functions under these names that follow stand-ins. For
everything else, and for other threads, they are the original ones.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from torchsurgeon.tracing.sizes import Number, computed
from torchsurgeon.tracing.source import function_of

_OF_MATH = (
    *("sqrt", "isqrt", "log", "log2", "log10", "log1p", "exp", "exp2", "expm1", "pow", "gcd", "lcm", "hypot", "fmod"),
    *("sin", "cos", "tan", "tanh", "atan", "atan2", "copysign", "fabs", "comb", "perm", "factorial"),
)
_TYPES = {"int": int, "float": float}
# The global names of a module, and which of Python's own are replaced for it.
Table = tuple[dict[str, Any], tuple[str, ...]]
_found: dict[tuple[int, int], tuple[str, ...]] = {}
_LIBRARIES = ("torch", "builtins")


class _AsType(type):
    """The class of a stand-in for ``int`` or ``float``, which compares like it and has its instances."""

    kind: type
    here: Callable[[], bool]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and cls.here():
            value = args[0]
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                value = value.item()
            if issubclass(type(value), Number):
                return value if value.__class__ is cls.kind else computed(cls.kind, value)
        return cls.kind(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.kind)

    def __subclasscheck__(cls, other: Any) -> bool:
        return issubclass(other, cls.kind)

    def __eq__(cls, other: object) -> bool:
        return other is cls.kind or other is cls

    def __hash__(cls) -> int:
        return hash(cls.kind)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.kind, name)


@contextlib.contextmanager
def followed(tables: Iterable[Table], here: Callable[[], bool]) -> Iterator[None]:
    """Have these functions follow numbers inside the block.

    Args:
        tables: the modules whose code runs, as ``tables_of()`` finds them.
        here: whether the code that calls is the one to follow, and not another thread's.
    """
    replaced = {name: _following(getattr(math, name), here) for name in _OF_MATH if hasattr(math, name)}
    originals = {name: getattr(math, name) for name in replaced}

    def len_(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and here():
            return torch.Tensor.__len__(value)
        return len(value)

    shadows = {"len": len_} | {
        name: _AsType(name, (), {"kind": kind, "here": staticmethod(here)}) for name, kind in _TYPES.items()
    }
    added: list[tuple[dict[str, Any], str]] = []
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for table, names in tables:
        for name in replaced:
            # Where it was imported by its own name.
            if table.get(name) is originals[name]:
                changed.append((table, name, originals[name]))
                table[name] = replaced[name]
        for name in names:
            table[name] = shadows[name]
            added.append((table, name))
    for name, function in replaced.items():
        setattr(math, name, function)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(math, name, original)
        for table, name, value in changed:
            table[name] = value
        for table, name in added:
            # Code of other threads finds Python's own under this name again.
            table.pop(name, None)


def _following(function: Callable[..., Any], here: Callable[[], bool]) -> Callable[..., Any]:
    @functools.wraps(function)
    def follow(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and any(issubclass(type(a), Number) for a in args) and here():
            return computed(function, *args)
        return function(*args, **kwargs)

    return follow


def tables_of(functions: Iterable[types.FunctionType], kinds: Iterable[type]) -> list[Table]:
    """Return the modules that functions and classes are from, PyTorch's own left out.

    Args:
        functions: a model's functions.
        kinds: the classes of its modules.
    """
    found = {id(function.__globals__): function.__globals__ for function in functions}
    for kind in kinds:
        module = sys.modules.get(kind.__module__)
        if module is not None and kind.__module__.partition(".")[0] not in _LIBRARIES:
            found[id(module.__dict__)] = module.__dict__
    return [(table, _shadowed(table)) for table in found.values()]


def _shadowed(table: dict[str, Any]) -> tuple[str, ...]:
    """Return which of Python's own functions are replaced for a module."""
    # A library has dozens of modules, and their code stays as it is.
    key = (id(table), len(table))
    if key in _found:
        return _found[key]
    # A class is replaced where code calls it or asks for its instances, and does nothing else with it.
    codes = list(_codes(table))
    names = tuple(
        name
        for name in ("len", *_TYPES)
        if name not in table and (name == "len" or all(_calls_only(code, name) for code in codes))
    )
    if "site-packages" in str(table.get("__file__")):
        _found[key] = names
    return names


def _codes(table: dict[str, Any]) -> Iterator[types.CodeType]:
    own = table.get("__name__")
    for value in list(table.values()):
        members = list(vars(value).values()) if isinstance(value, type) and value.__module__ == own else [value]
        for member in members:
            function = function_of(member)
            if isinstance(function, types.FunctionType):
                function = getattr(function, "__wrapped__", function)
                if isinstance(function, types.FunctionType):
                    yield function.__code__


def _calls_only(code: types.CodeType, name: str) -> bool:
    if name in code.co_names:
        place = code.co_names.index(name)
        if sys.version_info < (3, 11) or place > 127:
            return False
        instructions = code.co_code
        # The lowest bit of the argument says that a call follows.
        if bytes((dis.opmap["LOAD_GLOBAL"], place << 1)) in instructions and (
            "isinstance" not in code.co_names or dis.opmap["IS_OP"] in instructions[::2]
        ):
            return False
    return all(_calls_only(inner, name) for inner in code.co_consts if isinstance(inner, types.CodeType))
