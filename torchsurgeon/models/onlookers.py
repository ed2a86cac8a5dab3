"""Hooks that only look on: whether the hooks of a model keep anything of what they see.

Such a hook computes nothing, so a call that is split does not run it. A program that looks into a model by hooks would
then miss what it wants to see.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from torchsurgeon.tracing.names import names_in
from torchsurgeon.tracing.reading import GLOBAL_HOOKS, OF_MODULES, PLAIN
from torchsurgeon.tracing.source import is_library_module

_CONTAINERS = (list, tuple, dict, set, deque)
_MOST_ELEMENTS = 1_000
_DEPTH = 6


class KeptByHooks:
    """What the hooks of a model hold at one moment: tensors, and what lies in their lists, dicts and objects."""

    def __init__(self, model: nn.Module) -> None:
        # By identity: the object, which is held so that no other gets the same identity, its elements, and whose it is.
        self._found: dict[int, tuple[Any, tuple[Any, ...], str]] = {}
        hooks = [hook for _, table in GLOBAL_HOOKS for hook in table.values()]
        for module in model.modules():
            hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for hook in hooks:
            self._look(hook, getattr(hook, "__qualname__", type(hook).__qualname__), _DEPTH)

    def since(self, earlier: KeptByHooks) -> list[str]:
        """Return the names of the hooks that have kept something since."""
        before = earlier._found
        found = (
            name
            for key, (held, elements, name) in self._found.items()
            if (isinstance(held, Tensor) and key not in before)
            or (key in before and not _same(elements, before[key][1]))
        )
        return list(dict.fromkeys(found))

    def _look(self, value: Any, name: str, depth: int) -> None:
        if id(value) in self._found or not depth:
            return
        if isinstance(value, (Tensor, types.FunctionType, *_CONTAINERS)):
            self._found[id(value)] = (value, _elements(value), name)
        for inner in _parts(value):
            self._look(inner, name, depth - 1)


def _elements(value: Any) -> tuple[Any, ...]:
    """Return what shows that a container, or what a function closes over, has changed.

    It is the elements, or only how many there are in a large container.
    """
    if isinstance(value, Tensor):
        return ()
    if isinstance(value, types.FunctionType):
        return tuple(_read_by(value))
    if len(value) > _MOST_ELEMENTS:
        return (len(value),)
    return (*value, *value.values()) if isinstance(value, dict) else tuple(value)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    # Numbers and texts by value, since equal ones may be other objects; everything else by identity.
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b) for a, b in zip(one, other, strict=True)
    )


def _read_by(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function closes over, and the objects that it names in its module."""
    yield from (cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType())
    for name in sorted(names_in(function.__code__).globals & function.__globals__.keys()):
        if not isinstance(function.__globals__[name], (types.FunctionType, types.ModuleType, type)):
            yield function.__globals__[name]


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a hook, or something that it holds, is made of."""
    if isinstance(value, _CONTAINERS):
        if len(value) <= _MOST_ELEMENTS:
            yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, types.FunctionType):
        yield from _read_by(value)
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, nn.Module):
        yield from (one for key, one in value.__dict__.items() if key not in OF_MODULES)
    elif not isinstance(value, (Tensor, type)) and not is_library_module(type(value).__module__):
        # The attributes as a dict: a number in it may count what the hook sees.
        yield getattr(value, "__dict__", {})
        yield vars(type(value)).get("__call__")
