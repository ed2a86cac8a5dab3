"""What a trace assumes about a model: its submodules, its mode, its code, and what that reads besides tensors.

Head and tail run what was traced, while the whole model would follow a later change of these. The answer would then
depend on the cut, so ``Premises`` finds such changes.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchsurgeon.errors import short
from torchsurgeon.tracing.reading import CONTAINERS, GLOBAL_HOOKS, PLAIN, Part, Reading, read_model

_ABSENT = object()
_CHANGEABLE = (list, deque, set)
_BY_KEY = (dict, types.MappingProxyType)
# Of a larger list or dict only the number of elements is looked at.
_MOST_ELEMENTS = 1_000


class _Group(NamedTuple):
    """The parts of many owners that have the same names. A single ``map`` reads them, faster than a loop."""

    read: Callable[[Any], Any]
    several: bool
    owners: list[Any]
    values: list[Any]

    def equal(self) -> bool:
        return _equal(map(self.read, self.owners), self.values)

    def flat(self, single: Iterable[Any]) -> Iterable[Any]:
        """Return one value after the other, of what ``read`` returned for each owner."""
        return itertools.chain.from_iterable(single) if self.several else single


class Premises:
    """The modules of ``model``, and what its call reads, as they were when this was made.

    These are the modules' classes and mode, their forward hooks, functions (a ``forward`` that was replaced, methods of
    their classes, what these call and close over), and attributes and global names with plain values, tensors,
    functions, or lists and dicts of these. An attribute that no code of the model names is not among them, nor is one
    that the code itself assigns. A tensor that is written to in place counts as a changed weight instead.

    Args:
        model: the model.
        reading: what its call reads; found out by default.
    """

    def __init__(self, model: nn.Module, reading: Reading | None = None) -> None:
        self._reading = reading or read_model(model)
        named = list(model.named_modules(remove_duplicate=False))
        self._child_tables = [module._modules for _, module in named if module._modules]
        self._children = [child for table in self._child_tables for child in table.values()]
        self._child_paths = [f"{path}.{key}".lstrip(".") for path, module in named for key in module._modules]
        self._paths = {module: path for path, module in reversed(named)}
        self._modules = list(self._paths)
        self._classes = list(map(type, self._modules))
        self._own = [module.__dict__ for module in self._modules]
        self._sizes = list(map(len, self._own))
        self._keys = list(map(tuple, self._own))
        self._keep_hooks()
        self._keep_parts()

    def _keep_hooks(self) -> None:
        tables = [table for module in self._modules for table in (module._forward_hooks, module._forward_pre_hooks)]
        tables += [table for _, table in GLOBAL_HOOKS]
        self._unhooked = [table for table in tables if not table]
        self._hooked = [table for table in tables if table]
        self._hooks = list(map(tuple, self._hooked))

    def _keep_parts(self) -> None:
        # What lies in a list or dict is looked at with it; hooks are looked at by their tables.
        attributes = [part for part in self._reading.parts if not isinstance(part.key, int)]
        attributes = [part for part in attributes if not isinstance(part.owner, CONTAINERS) or part.path[-1:] != "]"]
        attributes += [_mode(module, path) for module, path in self._paths.items()]
        attributes += _forwards(set(self._classes))
        self._plain = [part for part in attributes if _is_plain(part.value)]
        self._others = [part for part in attributes if not _is_plain(part.value)]
        self._plain_groups, self._other_groups = _groups(self._plain), _groups(self._others)
        # The values in one line, so that a single ``map`` compares them by identity.
        self._objects = list(self._objects_now())
        held = [part for part in self._reading.parts if isinstance(part.value, (*_CHANGEABLE, dict))]
        held = [part for part in held if len(part.value) <= _MOST_ELEMENTS]
        self._containers = [(part, _contents(part.value)) for part in held]
        self._lists = [part.value for part in held if not isinstance(part.value, dict)]
        self._dicts = [part.value for part in held if isinstance(part.value, dict)]
        self._elements = list(self._elements_now())

    def broken(self) -> str | None:
        """Return a sentence that says what has changed and what to do; None when nothing has."""
        return None if self.hold() else self._changed()

    def hold(self) -> bool:
        """Return whether everything is the very same. It is called at every inference."""
        return (
            not any(self._unhooked)
            and list(map(type, self._modules)) == self._classes
            and list(map(len, self._own)) == self._sizes
            and all(group.equal() for group in self._plain_groups)
            and self._same_objects()
            and list(map(tuple, self._hooked)) == self._hooks
            and self._children_now() == self._children
        )

    def _same_objects(self) -> bool:
        try:
            if not all(map(operator.is_, self._objects_now(), self._objects)):
                return False
            if not self._containers:
                return True
            sizes = sum(map(len, self._lists)) + sum(map(len, self._dicts))
            return sizes == len(self._elements) and all(map(operator.is_, self._elements_now(), self._elements))
        except (AttributeError, KeyError, RuntimeError, ValueError):
            # An attribute is gone, a cell is empty, or another thread changes a dict at this moment.
            return False

    def _objects_now(self) -> Iterable[Any]:
        return itertools.chain.from_iterable(group.flat(map(group.read, group.owners)) for group in self._other_groups)

    def _elements_now(self) -> Iterable[Any]:
        return itertools.chain(
            itertools.chain.from_iterable(self._lists), itertools.chain.from_iterable(map(dict.values, self._dicts))
        )

    def _children_now(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._child_tables)))

    # --- what has changed ---

    def _changed(self) -> str | None:
        if any(module.training for module in self._modules):
            return "the model must be in evaluation mode and has been put into training mode; call model.eval()"
        if self._children_now() != self._children:
            return (
                f"submodule {short(self._replaced())} of the model has been replaced since it was traced; make a new "
                "SplitModule"
            )
        if any(self._unhooked) or list(map(tuple, self._hooked)) != self._hooks:
            return (
                f"forward hooks of {self._hooked_now()} have been added or removed since it was traced; a model "
                "that is cut does not run them as the whole model does. Take that back, or make a new SplitModule"
            )
        for module, was in zip(self._modules, self._classes, strict=True):
            if type(module) is not was:
                return (
                    f"{_called(self._paths[module])} was of class {short(was.__name__, 100)} when it was traced, and "
                    f"is of class {short(type(module).__name__, 100)} now; make a new SplitModule"
                )
        return self._new_attribute() or self._changed_part()

    def _new_attribute(self) -> str | None:
        """Return the sentence for an attribute that a module has gained, where its code would read that."""
        for module, known in zip(self._modules, self._keys, strict=True):
            for name in module.__dict__.keys() - set(known):
                if not self._reading.reads(module, name):
                    continue
                now, was = module.__dict__[name], getattr(type(module), name, _ABSENT)
                if not (_is_plain(was) and _equal([now], [was])):
                    return self._sentence(name, _called(self._paths[module]), was, now)
        return None

    def _changed_part(self) -> str | None:
        for part in (*self._plain, *self._others):
            now = _read(part)
            if not _alike(now, part.value):
                return self._sentence(part.key, self._holder(part), part.value, now)
        for part, was in self._containers:
            if not _alike(_contents(part.value), was):
                return (
                    f"what {short(part.path, 100)} of the model holds has changed since it was traced; a model that "
                    "is cut would use the old contents. Set them back, or make a new SplitModule"
                )
        return None

    def _sentence(self, name: Any, holder: str, was: Any, now: Any) -> str:
        if name == "forward" or name == "__call__":
            return f"{name} of {holder} has been replaced since it was traced; make a new SplitModule"
        return (
            f"attribute {short(name, 100)} of {holder} was {_shown(was)} when it was traced, and is "
            f"{_shown(now, again=was)} now; a model that is cut would use the old value. Set it back, or make a new "
            "SplitModule"
        )

    def _holder(self, part: Part) -> str:
        holder = part.holder
        if isinstance(holder, type):
            # An attribute of a class is told of the first module that has it.
            holder = next((module for module in reversed(self._modules) if isinstance(module, holder)), holder)
        if isinstance(holder, nn.Module) and holder in self._paths:
            return _called(self._paths[holder])
        if isinstance(holder, types.FunctionType):
            kind = "the closure" if isinstance(part.owner, types.CellType) else "the global names"
            return f"{kind} of function {short(holder.__qualname__, 100)}"
        return short(part.path.removesuffix(f".{part.key}"), 100)

    def _replaced(self) -> str:
        now = itertools.chain(self._children_now(), itertools.repeat(None))
        rows = zip(self._child_paths, self._children, now, strict=False)
        return next((path for path, was, child in rows if was is not child), "a child")

    def _hooked_now(self) -> str:
        was = dict(zip(map(id, self._hooked), self._hooks, strict=True))
        for module, path in self._paths.items():
            for table in (module._forward_hooks, module._forward_pre_hooks):
                if tuple(table) != was.get(id(table), ()):
                    return _called(path)
        return "all modules (global hooks)"


def _mode(module: nn.Module, path: str) -> Part:
    own = module.__dict__
    return Part(f"{path}.training", own if "training" in own else module, "training", False, module)


def _forwards(classes: Iterable[type]) -> list[Part]:
    """Return the ``forward`` of each class, also of PyTorch's own, which a program may have replaced."""
    ordered = sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))
    return [
        Part(f"{cls.__name__}.forward", cls, "forward", cls.forward, cls) for cls in ordered if hasattr(cls, "forward")
    ]


def _equal(now: Iterable[Any], was: list[Any]) -> bool:
    try:
        return list(now) == was
    except Exception:
        # An attribute is gone, or is a tensor now, whose comparison is a tensor.
        return False


def _alike(now: Any, was: Any) -> bool:
    """Return whether two values are the same object, equal plain values, or lists and dicts of such."""
    if now is was:
        return True
    if type(now) is not type(was) or isinstance(was, Tensor):
        return _is_plain(was) and _is_plain(now) and _equal([now], [was])
    if isinstance(was, dict):
        return now.keys() == was.keys() and all(_alike(now[key], one) for key, one in was.items())
    if isinstance(was, (list, tuple, deque)):
        return len(now) == len(was) and all(map(_alike, now, was))
    return _equal([now], [was])


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _contents(value: Any) -> Any:
    return value.copy()


def _read(part: Part) -> Any:
    if isinstance(part.owner, _BY_KEY):
        return part.owner.get(part.key, _ABSENT)
    try:
        return getattr(part.owner, part.key, _ABSENT)
    except ValueError:
        return _ABSENT  # an empty cell


def _groups(parts: Sequence[Part]) -> list[_Group]:
    """Return parts by the names that their owners have, in an order of the groups that depends on the parts only."""
    by_owner: dict[tuple[bool, int], list[Part]] = {}
    for part in parts:
        owner = part.holder if isinstance(part.owner, types.MappingProxyType) else part.owner
        by_owner.setdefault((isinstance(part.owner, _BY_KEY), id(owner)), []).append(part)
    by_keys: dict[tuple[Any, ...], list[list[Part]]] = {}
    for ones in by_owner.values():
        by_keys.setdefault((isinstance(ones[0].owner, _BY_KEY), *(one.key for one in ones)), []).append(ones)
    groups = []
    for (by_key, *keys), members in by_keys.items():
        read = operator.itemgetter(*keys) if by_key else operator.attrgetter(*keys)
        values = [tuple(one.value for one in ones) if len(ones) > 1 else ones[0].value for ones in members]
        groups.append(_Group(read, len(keys) > 1, [ones[0].owner for ones in members], values))
    return groups


def _called(path: str) -> str:
    return f"module {short(path, 100)}" if path else "the model"


def _shown(value: Any, again: Any = None) -> str:
    if value is _ABSENT:
        return "gone" if again is not None else "absent"
    if isinstance(value, Tensor):
        return f"{'another' if isinstance(again, Tensor) else 'a'} tensor {list(value.shape)}"
    return short(value, 100)
