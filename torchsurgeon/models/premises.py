"""What a trace took for granted about a model: its submodules, its mode, and what ``forward`` reads beside tensors.

A cut goes on with what was traced where the whole model would follow a change, so the answer would depend on the cut.
"""

from __future__ import annotations

import dis
import itertools
import operator
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

_PLAIN = {bool, int, float, complex, str, type(None), torch.dtype, types.FunctionType, types.BuiltinFunctionType}
_OF_MODULES = set(nn.Module().__dict__)
_ABSENT = object()


class _Attribute(NamedTuple):
    """``owner`` is the module's own ``__dict__``, or the module where its class has the attribute."""

    path: str
    owner: Any
    key: str
    value: Any

    def now(self) -> Any:
        if isinstance(self.owner, dict):
            return self.owner.get(self.key, _ABSENT)
        return getattr(self.owner, self.key, _ABSENT)


class _Group(NamedTuple):
    """Attributes of the same names of many modules, read in one pass of the interpreter's own loop."""

    read: Callable[[Any], Any]
    owners: list[Any]
    values: list[Any]

    def same(self) -> bool:
        return _same(map(self.read, self.owners), self.values)


class Premises:
    """The modules of ``model``, their mode, plain attributes and forward hooks, as they were when this was made.

    Plain are numbers, texts, None, dtypes and functions, and tuples of these, also where the class has them. Not looked
    at: what lies in lists, dicts and other objects, and attributes that the model's own ``forward`` assigns.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules(remove_duplicate=False))
        self._child_tables = [module._modules for _, module in named if module._modules]
        self._children = [child for table in self._child_tables for child in table.values()]
        self._paths = [f"{path}.{key}".lstrip(".") for path, module in named for key in module._modules]
        self._modules = {module: path for path, module in reversed(named)}
        tables = [table for module in self._modules for table in (module._forward_hooks, module._forward_pre_hooks)]
        self._unhooked = [table for table in tables if not table]
        self._hooked = [table for table in tables if table]
        self._hooks = list(map(tuple, self._hooked))
        self._attributes = [one for module, path in self._modules.items() for one in _attributes(path, module)]
        self._groups = _groups(self._attributes)
        self._narrowed = False

    def broken(self) -> str | None:
        """Return what does not hold any more, for a user to read; None when all does. Asked at every inference."""
        if self._hold():
            return None
        if any(module.training for module in self._modules):
            return "the model has been put into training mode; call model.eval(): a SplitModule only answers"
        if self._children_now() != self._children:
            return f"{self._replaced()!r} of the model has been replaced since it was traced; make a new SplitModule"
        if any(self._unhooked) or list(map(tuple, self._hooked)) != self._hooks:
            return (
                f"forward hooks of {self._hooked_now()} have been added or removed since it was traced, which a model "
                "that is cut does not follow; take that back, or make a new SplitModule"
            )
        if not self._narrowed:
            # Code is read only now, because most models assign nothing and so never get here.
            assigned = _assigned_by_forward(list(self._modules)) - {"training"}
            self._attributes = [one for one in self._attributes if one.key not in assigned]
            self._groups, self._narrowed = _groups(self._attributes), True
        for one in self._attributes:
            now = one.now()
            if not _same([now], [one.value]):
                was, told = reprlib.repr(one.value), "gone" if now is _ABSENT else reprlib.repr(now)
                return (
                    f"attribute {one.key!r} of {_called(one.path)} was {was} when it was traced, and is {told} now, "
                    "which a model that is cut does not follow; set it back, or make a new SplitModule"
                )
        return None

    def _hold(self) -> bool:
        return (
            not any(self._unhooked)
            and all(group.same() for group in self._groups)
            and list(map(tuple, self._hooked)) == self._hooks
            and self._children_now() == self._children
        )

    def _children_now(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._child_tables)))

    def _replaced(self) -> str:
        now = itertools.chain(self._children_now(), itertools.repeat(None))
        rows = zip(self._paths, self._children, now, strict=False)
        return next((path for path, was, child in rows if was is not child), "a child")

    def _hooked_now(self) -> str:
        was = dict(zip(map(id, self._hooked), self._hooks, strict=True))
        for module, path in self._modules.items():
            for table in (module._forward_hooks, module._forward_pre_hooks):
                if tuple(table) != was.get(id(table), ()):
                    return _called(path)
        return "a module"


def _same(now: Iterable[Any], was: list[Any]) -> bool:
    try:
        return list(now) == was
    except Exception:
        # One is gone, or is a tensor now, which compares to more than yes or no.
        return False


def _called(path: str) -> str:
    return f"module {path!r}" if path else "the model"


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _attributes(path: str, module: nn.Module) -> Iterator[_Attribute]:
    own = module.__dict__
    yield _Attribute(path, own if "training" in own else module, "training", False)
    for key, value in own.items():
        if key not in _OF_MODULES and _is_plain(value):
            yield _Attribute(path, own, key, value)
    shared = {key for cls in _own_classes(module) if not _is_of_torch(cls) for key in vars(cls)}
    for key in sorted(shared - set(own)):
        value = getattr(type(module), key, _ABSENT)
        if not key.startswith("__") and _is_plain(value) and not isinstance(value, types.FunctionType):
            yield _Attribute(path, module, key, value)


def _groups(attributes: Sequence[_Attribute]) -> list[_Group]:
    by_owner: dict[int, list[_Attribute]] = {}
    for one in attributes:
        by_owner.setdefault(id(one.owner), []).append(one)
    by_keys: dict[tuple[Any, ...], list[Any]] = {}
    for ones in by_owner.values():
        by_keys.setdefault((isinstance(ones[0].owner, dict), *(one.key for one in ones)), []).append(ones)
    groups = []
    for (of_dict, *keys), members in by_keys.items():
        read = operator.itemgetter(*keys) if of_dict else operator.attrgetter(*keys)
        values = [tuple(one.value for one in ones) if len(ones) > 1 else ones[0].value for ones in members]
        groups.append(_Group(read, [ones[0].owner for ones in members], values))
    return groups


def _own_classes(module: nn.Module) -> Iterator[type]:
    return (cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__)


def _is_of_torch(made: Any) -> bool:
    return str(made.__module__).partition(".")[0] == "torch"


def _assigned_by_forward(modules: Sequence[nn.Module]) -> set[str]:
    """Return the names of attributes that ``forward`` assigns, its hooks, or what they call by name, as in
    ``self.calls += 1``. Such attributes tell what was computed; whether they are also read cannot be known.

    Names are followed through all of the model's classes, so this may be too many and is seldom too few.
    """
    classes = {cls for module in modules for cls in _own_classes(module)}
    roots = [member for cls in classes for member in _functions(vars(cls).get("forward"))]
    for module in modules:
        for hook in (
            module.__dict__.get("forward"),
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
        ):
            roots += _functions(hook)
    todo = [(function.__code__, function) for function in roots]
    seen: set[types.CodeType] = set()
    assigned: set[str] = set()
    while todo:
        code, function = todo.pop()
        if code in seen:
            continue
        seen.add(code)
        assigned |= {
            str(one.argval) for one in dis.get_instructions(code) if one.opname in ("STORE_ATTR", "DELETE_ATTR")
        }
        if "setattr" in code.co_names:
            assigned |= {constant for constant in code.co_consts if isinstance(constant, str)}
        todo += [(constant, function) for constant in code.co_consts if isinstance(constant, types.CodeType)]
        members = [vars(cls).get(name) for name in code.co_names for cls in classes]
        members += [function.__globals__.get(name) for name in code.co_names]
        members += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        todo += [(one.__code__, one) for member in members for one in _functions(member)]
    return assigned


def _functions(member: Any) -> list[types.FunctionType]:
    """The functions that a class's member, a hook or a global name stands for; none for PyTorch's own functions."""
    if isinstance(member, property):
        parts: tuple[Any, ...] = (member.fget, member.fset, member.fdel)
    else:
        parts = (getattr(member, "__func__", member),)
    return [part for part in parts if isinstance(part, types.FunctionType) and not _is_of_torch(part)]
