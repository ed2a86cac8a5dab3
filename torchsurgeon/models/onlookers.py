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
from torchsurgeon.tracing.reading import GLOBAL_HOOKS, OF_MODULES
from torchsurgeon.tracing.source import is_library_module

_CONTAINERS = (list, tuple, dict, set, deque)
_MOST_ELEMENTS = 1_000
_DEPTH = 6


class KeptByHooks:
    """What the hooks of a model hold at one moment: tensors, and so many elements in their lists and dicts."""

    def __init__(self, model: nn.Module) -> None:
        # By identity: the object, which is held, so that no other gets the same identity; how many elements it has; and
        # whose it is.
        self._found: dict[int, tuple[Any, int, str]] = {}
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
            for key, (held, size, name) in self._found.items()
            if (isinstance(held, Tensor) and key not in before) or (key in before and before[key][1] != size)
        )
        return list(dict.fromkeys(found))

    def _look(self, value: Any, name: str, depth: int) -> None:
        if id(value) in self._found or not depth:
            return
        if isinstance(value, (Tensor, *_CONTAINERS)):
            self._found[id(value)] = (value, 0 if isinstance(value, Tensor) else len(value), name)
        for inner in _parts(value):
            self._look(inner, name, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a hook, or something that it holds, is made of."""
    if isinstance(value, _CONTAINERS):
        if len(value) <= _MOST_ELEMENTS:
            yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for name in names_in(value.__code__).globals & value.__globals__.keys():
            if not isinstance(value.__globals__[name], (types.FunctionType, types.ModuleType, type)):
                yield value.__globals__[name]
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, nn.Module):
        yield from (one for key, one in value.__dict__.items() if key not in OF_MODULES)
    elif not isinstance(value, (Tensor, type)) and not is_library_module(type(value).__module__):
        yield from getattr(value, "__dict__", {}).values()
        yield vars(type(value)).get("__call__")
