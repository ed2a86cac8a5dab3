"""What a model keeps in its modules besides weights, and putting it back as it was.

A model may assign attributes in ``forward``, and fill dicts and lists. Following such a model must leave no trace in
it. And a model that reads in one call what an earlier call left behind gives answers that no cut can give.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.alone import leaves_something
from torchsurgeon.tracing.gradients import names_in
from torchsurgeon.tracing.results import ABSENT, Left, Settled, is_single
from torchsurgeon.tracing.source import function_of, is_installed_module, is_library_module

_CONTAINERS = (dict, list, set, deque)
_ATOMS = (
    *(int, float, complex, str, bytes, type(None), type, torch.Tensor, torch.dtype, torch.device),
    *(nn.Module, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)
_PLAIN = frozenset((int, float, complex, str, bool, bytes, type(None), types.FunctionType))
_DEPTH = 6
_SMALL_BYTES = 1 << 20
_MANY_CALLS = 1_000_003


_Cache = functools._lru_cache_wrapper


class State:
    """The attributes of a model's modules, and what is in their dicts, lists, sets and objects, at one moment.

    Everything is compared by identity. Of buffers and of tensors that are plain attributes, what PyTorch counts as
    writes is noticed, too, and undone where they are small; parameters are taken to stay as they are.

    Args:
        model: the model.

    Attributes:
        functions: the functions of users that a call of the model begins with, and those in their closures.
        left: what had changed when ``changed()`` was called last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, tuple[Any, _Kept, str]] = {}
        self._empty: list[tuple[Any, str]] = []
        self._caches: dict[int, tuple[Any, int]] = {}
        self._cells: dict[int, tuple[types.CellType, Any, str]] = {}
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._tensors: dict[int, tuple[torch.Tensor, int, torch.Tensor | None, str]] = {}
        for path, module in model.named_modules():
            self._keep(module.__dict__, path)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    self._keep_tensor(buffer, f"{path}.{key}".lstrip("."))
            for key, value in module.__dict__.items():
                if type(value) in _PLAIN:
                    continue
                if key in _TABLES_OF_MODULES:
                    # What is in its tables are parameters, buffers, modules and hooks.
                    self._keep(value, key if not value else path if key in _NAMED else f"{path}.{key}")
                else:
                    self._look(value, f"{path}.{key}".lstrip("."), _DEPTH)
        self.left = Left(frozenset(), frozenset(), frozenset())
        self._weights: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        self.functions = functions = functions_of(model)
        if any("data" in names_in(function.__code__) for function in functions):
            # PyTorch does not count writes to ``weight.data``, so the elements themselves are kept.
            self._weights = [(p, p.detach().clone(), name) for name, p in model.named_parameters() if not p.is_meta]
        for function in functions:
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
                self._keep_cell(cell, name)
            for held in (function.__dict__, function.__kwdefaults__, *(function.__defaults__ or ())):
                if held is not None:
                    self._look(held, function.__name__, _DEPTH)
            for name in names_in(function.__code__):
                if name in function.__globals__ and not isinstance(function.__globals__[name], _OF_MODULES):
                    value = function.__globals__[name]
                    self._globals[id(function.__globals__), name] = (function.__globals__, name, value)
                    self._look(value, name, _DEPTH)

        for kind in {kind: None for module in model.modules() for kind in type(module).__mro__}:
            if kind.__module__.partition(".")[0] not in _LIBRARIES:
                for key, value in vars(kind).items():
                    if not key.startswith("__"):
                        self._look(value, f"{kind.__name__}.{key}", _DEPTH)

    def _keep_cell(self, cell: types.CellType, name: str) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            return
        if name == "__class__":
            # What ``super()`` reads; classes are looked through by their own names.
            return
        self._cells[id(cell)] = (cell, value, name)
        self._look(value, name, _DEPTH)

    def _keep(self, container: Any, path: str) -> None:
        if container or path not in _TABLES_OF_MODULES:
            self._held[id(container)] = (container, _Kept(container), path)
        else:
            self._empty.append((container, path))

    def _keep_tensor(self, tensor: torch.Tensor, path: str) -> None:
        if tensor.layout is torch.strided and not tensor.is_inference() and not tensor.is_meta:
            copy = tensor.detach().clone() if tensor.nbytes <= _SMALL_BYTES else None
            self._tensors[id(tensor)] = (tensor, tensor._version, copy, path)

    def _look(self, value: Any, path: str, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            self._keep_tensor(value, path)
        if isinstance(value, _Cache):
            self._caches[id(value)] = (value, value.cache_info().currsize)
        if isinstance(value, type) and depth and value.__module__.partition(".")[0] not in _LIBRARIES:
            for one in vars(value).values():
                if isinstance(one, (*_CONTAINERS, _Cache)):
                    self._look(one, path, depth - 1)
        if depth == 0 or isinstance(value, _ATOMS) or id(value) in self._held:
            return
        kind = type(value)
        if isinstance(value, (tuple, frozenset)):
            inner = list(value)
        elif isinstance(value, _CONTAINERS) and (kind.__module__ in ("builtins", "collections") or kind in _CONTAINERS):
            self._keep(value, path)
            inner = list(value.values() if isinstance(value, dict) else value)
        else:
            attributes = getattr(value, "__dict__", None)
            if type(attributes) is not dict or id(attributes) in self._held:
                return
            self._keep(attributes, path)
            inner = list(attributes.values())
        # Long lists are data, not modules' memories; looking through them would take as long as running the model.
        if len(inner) <= 1000:
            for one in inner:
                self._look(one, path, depth - 1)

    def changed(self) -> list[str]:
        """Return the names of the attributes that are no longer what they were, or hold something else."""
        written = {path for tensor, version, _, path in self._tensors.values() if tensor._version != version}
        written |= {name for cell, value, name in self._cells.values() if cell.cell_contents is not value}
        written |= {name for table, name, value in self._globals.values() if table.get(name) is not value}
        written |= {name for weight, copy, name in self._weights if not torch.equal(weight, copy)}
        found = sorted(
            written
            | {name for container, before, path in self._held.values() for name in before.changes(container, path)}
            | {path for container, path in self._empty if container}
        )
        if found:
            leaves_something()
        self.left = self._left() if found else Left(self._watched(), frozenset(), frozenset())
        return found

    def _watched(self) -> frozenset[int]:
        return frozenset((*self._held, *(id(container) for container, _ in self._empty)))

    def _left(self) -> Left:
        held = [(container, before) for container, before, _ in self._held.values() if not before.same(container)]
        empty = [container for container, _ in self._empty if container]
        changed = {(id(container), key) for container, before in held for key in before.changed(container)}
        changed |= {(id(container), key) for container in empty for key in container}
        filled = (id(container) for container in (*(container for container, _ in held), *empty))
        return Left(self._watched(), frozenset(changed), frozenset(filled))

    def settling(self) -> Settled:
        """Return what has changed in dicts, as ``Left.settled`` has it after one call."""
        held = {id(container): (container, before.copy) for container, before, _ in self._held.values()}
        held |= {id(container): (container, {}) for container, _ in self._empty}
        return {
            (place, key): (before.get(key, ABSENT), container[key]) if is_single(container[key]) else None
            for place, (container, before) in held.items()
            if isinstance(container, dict)
            for key in container
            if container[key] is not before.get(key, container)
        }

    def count_on(self) -> list[str]:
        """Set the whole numbers that a call has changed far ahead, as many calls would, and return their names.

        The call was seen to give the same answer again. What counts calls may still decide after the tenth one.
        """
        found = []
        for container, before, path in self._held.values():
            for key in before.changed(container):
                was, now = before.copy.get(key), container.get(key)
                if type(was) is type(now) is int and was != now:
                    container[key] = now + _MANY_CALLS
                    found.append(f"{path}.{key}".lstrip("."))
        return found

    def restore(self) -> None:
        """Put everything back."""
        for cell, value, _ in self._cells.values():
            if cell.cell_contents is not value:
                cell.cell_contents = value
        for table, name, value in self._globals.values():
            if table.get(name) is not value:
                table[name] = value
        for weight, kept, _ in self._weights:
            if not torch.equal(weight, kept):
                weight.data.copy_(kept)
        for key, (tensor, version, copy, path) in self._tensors.items():
            if tensor._version != version and copy is not None:
                with torch.no_grad():
                    if tensor.shape != copy.shape:
                        tensor.resize_(copy.shape)
                    tensor.copy_(copy)
                # Putting the elements back counts as a write, too.
                self._tensors[key] = (tensor, tensor._version, copy, path)
        for cache, size in self._caches.values():
            if cache.cache_info().currsize != size:
                # What was put into it while the model was followed may hold no elements.
                cache.cache_clear()
        for container, before, _ in self._held.values():
            if isinstance(container, dict) and not before.same(container):
                # Another thread may run the model meanwhile, so what stays the same is never taken out.
                for key in [key for key in container if key not in before.copy]:
                    del container[key]
                for key, value in before.copy.items():
                    if container.get(key, container) is not value:
                        container[key] = value
            if not before.same(container):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(before.copy)
        for container, _ in self._empty:
            if container:
                container.clear()


# Most of nn.Module's own tables are empty, in every module.
_TABLES_OF_MODULES = frozenset(key for key, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))
# What is in these is called by its name alone.
_NAMED = ("_parameters", "_buffers", "_modules")
_OF_MODULES = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module)


# Their functions keep nothing between calls.
_LIBRARIES = ("torch", "torchvision", "builtins", "typing", "abc")
_CALLED = (types.FunctionType, types.MethodType)


def functions_of(model: nn.Module) -> list[types.FunctionType]:
    """Return the functions of users that a call of the model begins with, and those in their closures."""
    todo: list[Any] = []
    kinds: dict[type, None] = {}
    for module in model.modules():
        todo += [value for value in module.__dict__.values() if isinstance(value, _CALLED)]
        todo += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        kinds.update(dict.fromkeys(type(module).__mro__))
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            todo += vars(kind).values()
    found: dict[int, types.FunctionType] = {}
    while todo:
        function = todo.pop()
        function = function_of(function)
        if isinstance(function, _Cache):
            function = function.__wrapped__
        if not isinstance(function, types.FunctionType) or id(function) in found:
            continue
        if str(function.__module__).partition(".")[0] in _LIBRARIES:
            continue
        found[id(function)] = function
        names = names_in(function.__code__)
        used = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        used += [function.__globals__.get(name) for name in names]
        todo += used
        todo += [vars(module).get(name) for module in filter(_is_own_module, used) for name in names]
    return list(found.values())


def _is_own_module(value: Any) -> bool:
    """Return whether a value is a Python module of the user's own, such as the one of ``helpers.scale(x)``."""
    if not isinstance(value, types.ModuleType):
        return False
    return not is_library_module(value.__name__) and not is_installed_module(value.__name__)


class _Kept:
    """What is in a dict, list, set or deque at one moment."""

    def __init__(self, container: Any) -> None:
        self.copy = container.copy()
        self._keys = tuple(map(id, container))
        self._values = tuple(map(id, container.values())) if isinstance(container, dict) else ()

    def same(self, container: Any) -> bool:
        """Return whether the same objects are in it."""
        return tuple(map(id, container)) == self._keys and (
            not isinstance(container, dict) or tuple(map(id, container.values())) == self._values
        )

    def changes(self, container: Any, path: str) -> list[str]:
        """Return the names of what changed."""
        if self.same(container):
            return []
        if not isinstance(container, dict):
            return [path]
        return [f"{path}.{key}".lstrip(".") for key in self.changed(container)] or [path]

    def changed(self, container: Any) -> list[Any]:
        """Return the keys of a dict that hold something else; none for a list or set."""
        if not isinstance(container, dict) or self.same(container):
            return []
        keys, missing = dict.fromkeys([*self.copy, *container]), object()
        return [key for key in keys if container.get(key, missing) is not self.copy.get(key, missing)]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[State]:
    """Undo, at the end of the block, what ``forward`` changes in the model's modules."""
    state = State(model)
    try:
        yield state
    finally:
        state.restore()
