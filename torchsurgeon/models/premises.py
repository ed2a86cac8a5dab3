"""What a trace assumes about a model: its submodules, its mode, and what ``forward`` reads besides tensors.

Head and tail run what was traced, while the whole model would follow a later change of these. The answer would then
depend on the cut, so ``Premises`` finds such changes.
"""

from __future__ import annotations

import dis
import itertools
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchsurgeon.errors import short

_PLAIN = {bool, int, float, complex, str, type(None), torch.dtype, types.FunctionType, types.BuiltinFunctionType}
_OF_MODULES = set(nn.Module().__dict__)
_ABSENT = object()


class _Attribute(NamedTuple):
    """An attribute of a module, with the value that it had.

    ``owner`` is the module's own ``__dict__``, or the module itself where its class has the attribute.
    """

    path: str
    owner: Any
    key: str
    value: Any

    def now(self) -> Any:
        if isinstance(self.owner, dict):
            return self.owner.get(self.key, _ABSENT)
        return getattr(self.owner, self.key, _ABSENT)


class _Group(NamedTuple):
    """The attributes of many modules that have the same names. A single ``map`` reads them, faster than a loop."""

    read: Callable[[Any], Any]
    owners: list[Any]
    values: list[Any]

    def same(self) -> bool:
        return _same(map(self.read, self.owners), self.values)


class Premises:
    """The modules of ``model``, their mode, plain attributes and forward hooks, as they were when this was made.

    Plain attributes are numbers, texts, None, dtypes, functions, and tuples of these; of the module or of its class. A
    change inside a list, a dict or another object is not found, nor one of an attribute that the model's own
    ``forward`` assigns.
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
        """Return a sentence that says what has changed and what to do; None when nothing has.

        It is called at every inference.
        """
        if self._hold():
            return None
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
        if not self._narrowed:
            # The code of forward is read only now that something differs, because for most models nothing ever does.
            assigned = _assigned_by_forward(list(self._modules)) - {"training"}
            self._attributes = [one for one in self._attributes if one.key not in assigned]
            self._groups, self._narrowed = _groups(self._attributes), True
        for one in self._attributes:
            now = one.now()
            if not _same([now], [one.value]):
                is_now = "gone" if now is _ABSENT else short(now, 100)
                return (
                    f"attribute {short(one.key, 100)} of {_called(one.path)} was {short(one.value, 100)} when it was "
                    f"traced, and is {is_now} now; a model that is cut would use the old value. Set it back, or "
                    "make a new SplitModule"
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
        # An attribute is gone, or is a tensor now, whose comparison is a tensor.
        return False


def _called(path: str) -> str:
    return f"module {short(path, 100)}" if path else "the model"


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
    """Return the names of the attributes that the modules assign while they run, as in ``self.calls += 1``.

    That is in ``forward``, its hooks, and what these call by name. Such an attribute is a result of the run, so its
    change says nothing. A name counts wherever any of the model's classes has a member of that name, so the result may
    hold too many names and seldom too few.
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
    """Return the functions that a class's member, a hook or a global name stands for, except PyTorch's own."""
    if isinstance(member, property):
        parts: tuple[Any, ...] = (member.fget, member.fset, member.fdel)
    else:
        parts = (getattr(member, "__func__", member),)
    return [part for part in parts if isinstance(part, types.FunctionType) and not _is_of_torch(part)]
