"""What a trace assumes about a model: its submodules, its mode, its code, and what that reads besides tensors.

Head and tail run what was traced, while the whole model would follow a later change of these. The answer would then
depend on the cut, so ``Premises`` finds such changes. Two of them, one made before and one after, also tell whether
a change has been taken back, and whether a model that has changed goes on changing.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import short
from torchsurgeon.models.arrays import Arrays
from torchsurgeon.models.hook_rows import GLOBAL_HOOK_ROWS, hook_rows
from torchsurgeon.tracing.reading import CONTAINERS, PLAIN, Part, Reading, is_own_method, read_model
from torchsurgeon.tracing.replaced import functions_of_pytorch
from torchsurgeon.tracing.settled import settled
from torchsurgeon.tracing.source import is_library_code, is_library_module
from torchsurgeon.tracing.surroundings import surroundings

_ABSENT = object()
_flat = itertools.chain.from_iterable
_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__")
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What ``module.compile()`` assigns; a module that has it calls that instead of its code.
_COMPILED = "_compiled_call_impl"
_CHANGEABLE = (list, deque, set)
_BY_KEY = (dict, types.MappingProxyType)
# Of a larger list or dict only the number of elements is looked at.
_MOST_ELEMENTS = 1_000
REMEDY = "take that back, or call prepare() on the SplitModule, which traces the model anew"


class _Group(NamedTuple):
    """The parts of many owners that have the same names. A single ``map`` reads them, faster than a loop.

    Attributes:
        read: returns the parts of one owner.
        several: whether it returns several, in a tuple.
        owners: the owners.
        values: what it returned for each of them when the model was read.
    """

    read: Callable[[Any], Any]
    several: bool
    owners: list[Any]
    values: list[Any]


class Premises:
    """The modules of ``model``, and what its call reads, as they were when this was made.

    These are the modules' classes and mode, their forward hooks, functions (a ``forward`` that was replaced, methods of
    their classes, what these call and close over), and attributes and global names with plain values, tensors,
    functions, or lists and dicts of these. An attribute that no code of the model names is not among them, nor is one
    that a call changes, where a call was watched, or that the code assigns, where none was. A tensor that is written to
    in place counts as a changed weight instead. Functions of PyTorch that the code names are among them, since a
    program may have replaced them.

    Args:
        model: the model.
        reading: what its call reads; found out by default.
    """

    def __init__(self, model: nn.Module, reading: Reading | None = None) -> None:
        self._model, self._reading = model, reading or read_model(model)
        named = list(model.named_modules(remove_duplicate=False))
        own = {module for _, module in named}
        # Modules in a plain list or dict, or that a closure holds, have hooks, children and a mode, too.
        named += [(path, one) for path, one in self._reading.modules if one not in own]
        self._own_modules = list(own)
        # Views, which follow the tables, and cost less than asking each table for its values.
        self._child_views = [module._modules.values() for _, module in named if module._modules]
        self._children = self._children_now()
        # A layer of PyTorch's does not look for children that it has not got.
        self._childless = [module._modules for _, module in named if not module._modules and _takes_children(module)]
        self._child_paths = [f"{path}.{key}".lstrip(".") for path, module in named for key in module._modules]
        self._paths = {module: path for path, module in reversed(named)}
        self._modules = list(self._paths)
        self._classes = list(map(type, self._modules))
        # A class, too, may get an attribute that hides an inherited one: a module's, or that of tensors. So may an
        # object that the code uses, whose class has the attribute so far.
        objects = {id(one): (path, one) for path, one in self._reading.objects}
        self._object_paths = {key: path for key, (path, _) in objects.items()}
        self._owners = [*self._modules, *_own_classes(self._classes), *(one for _, one in objects.values())]
        self._own: list[Mapping[str, Any]] = [vars(owner) for owner in self._owners]
        self._keys = list(map(tuple, self._own))
        # Code may ask whether a parameter or buffer is there. Which tensor it is concerns the weights, so none is kept.
        tables = [(one, table) for one in self._modules for table in (one._parameters, one._buffers)]
        self._tensor_tables = [(module, table, _present(table)) for module, table in tables]
        self._tensorless = [table for _, table in tables if not table]
        self._sized = [*self._own, *(table for _, table in tables if table)]
        self._keep_hooks()
        self._keep_parts()

    def _keep_hooks(self) -> None:
        self._hook_rows = [row for module, path in self._paths.items() for row in hook_rows(module, _called(path))]
        self._hook_rows += GLOBAL_HOOK_ROWS
        self._hook_functions = [row.functions() for row in self._hook_rows]
        self._keep_hook_keys()

    def _keep_hook_keys(self) -> None:
        tables = [row.table for row in self._hook_rows]
        self._empty = [*self._childless, *self._tensorless, *(table for table in tables if not table)]
        self._hooked = [table for table in tables if table]
        self._hooks = list(map(tuple, self._hooked))

    def _keep_parts(self) -> None:
        # What lies in a list or dict is looked at with it; hooks are looked at by their tables.
        attributes = [part for part in self._reading.parts if not isinstance(part.key, int)]
        attributes = [part for part in attributes if not isinstance(part.owner, CONTAINERS) or part.path[-1:] != "]"]
        attributes += [_mode(module, path) for module, path in self._paths.items()]
        attributes += [part for one, table, _ in self._tensor_tables for part in self._absent_tensors(one, table)]
        attributes += _forwards(set(self._classes))
        of_pytorch = functions_of_pytorch(self._classes, self._reading)
        self._of_pytorch = {part.path for part in of_pytorch}
        attributes += of_pytorch
        attributes += [*surroundings(self._reading), *settled(self._reading)]
        attributes += _code(attributes)
        attributes += [part for module, path in self._paths.items() for part in _own_methods(module, path)]
        self._plain = [part for part in attributes if _is_plain(part.value)]
        self._others = [part for part in attributes if not _is_plain(part.value)]
        self._plain_groups, self._other_groups = _groups(self._plain), _groups(self._others)
        # 1, 1.0 and True are equal, and give tensors of different types. PyTorch's own layers do not tell them apart.
        users = [part for part in self._plain if not type(part.holder).__module__.startswith("torch.nn.")]
        users = [part for part in users if part.key != "training"]
        self._typed_groups = _groups([part for part in users if isinstance(part.value, (int, float))])
        self._equals = [*self._classes, *map(len, self._sized), *self._children]
        self._equals += [*_flat(group.values for group in self._plain_groups), *self._types_now()]
        self._objects = self._objects_now()
        held = [part for part in self._reading.parts if isinstance(part.value, (*_CHANGEABLE, dict))]
        held = [part for part in held if len(part.value) <= _MOST_ELEMENTS]
        self._containers = [(part, _contents(part.value)) for part in held]
        self._lists = [part.value for part in held if not isinstance(part.value, dict)]
        self._dicts = [part.value for part in held if isinstance(part.value, dict)]
        self._elements = list(self._elements_now())
        self._arrays = Arrays(part for part in self._reading.parts if not self._reading.fills(part))

    def broken(self, remedy: str = REMEDY) -> str | None:
        """Return a sentence that says what has changed and what to do; None when nothing has.

        Args:
            remedy: what to do, other than to call ``model.eval()`` where that is all.
        """
        if self.hold():
            return None
        if any(module.training for module in self._own_modules):
            return "the model must be in evaluation mode and has been put into training mode; call model.eval()"
        changed = self._changed()
        return None if changed is None else f"{changed}; {remedy}"

    def hold(self) -> bool:
        """Return whether everything is the very same. It is called at every inference."""
        try:
            return (
                not any(self._empty)
                and self._equals_now() == self._equals
                and self._same_objects()
                and (not self._containers or self._same_elements())
                and self._arrays.same()
                and (not self._hooked or list(map(tuple, self._hooked)) == self._hooks)
            )
        except Exception as error:
            if by_signal_handler(error):
                raise
            # An attribute is gone, or is a tensor now, whose comparison is a tensor; a cell is empty; or another thread
            # changes a dict at this moment.
            return False

    def _equals_now(self) -> list[Any]:
        """Return what is compared by its value, in one list, which takes the least time to make and to compare."""
        now = [*map(type, self._modules), *map(len, self._sized), *_flat(self._child_views)]
        for read, _, owners, _ in self._plain_groups:
            now += map(read, owners)
        return now + self._types_now()

    def _types_now(self) -> list[type]:
        now: list[type] = []
        for read, several, owners, _ in self._typed_groups:
            now += map(type, _flat(map(read, owners)) if several else map(read, owners))
        return now

    def _same_objects(self) -> bool:
        now = self._objects_now()
        return len(now) == len(self._objects) and all(map(operator.is_, now, self._objects))

    def _same_elements(self) -> bool:
        sizes = sum(map(len, self._lists)) + 2 * sum(map(len, self._dicts))
        return sizes == len(self._elements) and all(map(operator.is_, self._elements_now(), self._elements))

    def _objects_now(self) -> list[Any]:
        now: list[Any] = []
        for read, several, owners, _ in self._other_groups:
            now += _flat(map(read, owners)) if several else map(read, owners)
        return now

    def _elements_now(self) -> Iterable[Any]:
        return _flat([*self._lists, *self._dicts, *map(dict.values, self._dicts)])

    def _children_now(self) -> list[Any]:
        return list(_flat(self._child_views))

    # --- what has changed ---

    def _changed(self) -> str | None:
        if self._children_now() != self._children or any(self._childless):
            return f"submodule {self._replaced()} since it was traced"
        for row, functions in zip(self._hook_rows, self._hook_functions, strict=True):
            if not _equal(row.functions(), functions):
                return (
                    f"forward hooks of {row.called} have been added or removed since it was traced; a model that is "
                    f"cut does not run them as the whole model does"
                )
        # The same hooks may have been removed and added again, which gives them other keys.
        self._keep_hook_keys()
        for module, was in zip(self._modules, self._classes, strict=True):
            if type(module) is not was:
                return (
                    f"{_called(self._paths[module])} was of class {short(was.__name__, 100)} when it was traced, and "
                    f"is of class {short(type(module).__name__, 100)} now"
                )
        return self._new_attribute() or self.tensor_gained_or_lost() or self._changed_part() or self._new_method()

    def tensor_gained_or_lost(self) -> str | None:
        """Return a sentence for a parameter or buffer that is there or not unlike before, where the code reads it.

        One that has become None is not looked for at every inference, since the weights have changed then, too.
        """
        for module, table, known in self._tensor_tables:
            for name in known ^ _present(table):
                if self._reading.reads(module, name):
                    was, now = ("there", "gone") if name in known else ("absent", "there")
                    return (
                        f"tensor {short(name, 100)} of {self._called(module)} was {was} when it was traced, and is "
                        f"{now} now, and a model that is cut would go on as if it were {was}"
                    )
        return None

    def _absent_tensors(self, module: nn.Module, table: dict[str, Any]) -> list[Part]:
        """Return the parameters or buffers that are None, and that code of the model's own may ask for."""
        if is_library_module(type(module).__module__):
            return []
        names = [key for key, one in table.items() if one is None and self._reading.reads(module, key)]
        return [Part(f"{self._paths[module]}.{key}", table, key, None, module) for key in names]

    def _new_attribute(self) -> str | None:
        """Return the sentence for an attribute that a module has gained, where its code would read that."""
        for owner, known in zip(self._owners, self._keys, strict=True):
            for name in vars(owner).keys() - set(known):
                now = vars(owner)[name]
                if isinstance(owner, type):
                    if owner is not Tensor and name in self._reading.names:
                        return f"{name} of class {short(owner)} has been added since it was traced"
                    continue
                if name != _COMPILED and not self._reading.reads(owner, name):
                    continue
                was = getattr(type(owner), name, _ABSENT)
                if not (_is_plain(was) and _equal([now], [was])) and not is_own_method(owner, name, now):
                    return self._sentence(name, self._called(owner), was, now)
        return None

    def _new_method(self) -> str | None:
        """Return the sentence for a method of tensors that a program has replaced since, and that the code names."""
        for part in functions_of_pytorch(self._classes, self._reading):
            if part.path not in self._of_pytorch:
                return f"{short(part.path, 100, quote=False)} has been replaced since the model was traced"
        return None

    def _changed_part(self) -> str | None:
        for part in (*self._plain, *self._others):
            now = _read(part)
            if not _alike(now, part.value) and not _put_back(part, now):
                return self._sentence(part.key, self._holder(part), part.value, now)
        held = (part.path for part, was in self._containers if not _alike(_contents(part.value), was))
        changed = next(held, None) or self._arrays.changed()
        if changed is None:
            return None
        return (
            f"what {short(changed, 100)} of the model holds has changed since it was traced, and a model that is cut "
            f"would use the old contents"
        )

    def _sentence(self, name: Any, holder: str, was: Any, now: Any) -> str:
        if name in _OF_FUNCTIONS:
            return f"the code of {holder} has been replaced since it was traced"
        if name == _COMPILED:
            return f"{holder} has been compiled, by its compile(), since it was traced"
        if name in ("forward", "__call__"):
            return f"{name} of {holder} has been replaced since it was traced"
        return (
            f"attribute {short(name, 100)} of {holder} was {_shown(was)} when it was traced, and is "
            f"{_shown(now, again=was)} now, and a model that is cut would use the old value"
        )

    def _holder(self, part: Part) -> str:
        holder = part.holder
        if part.key in _OF_FUNCTIONS:
            return f"function {short(holder.__qualname__, 100)}"
        if isinstance(holder, type):
            # An attribute of a class is told of the first module that has it.
            holder = next((module for module in reversed(self._modules) if isinstance(module, holder)), holder)
        if isinstance(holder, nn.Module) and holder in self._paths:
            return _called(self._paths[holder])
        if isinstance(holder, types.FunctionType):
            kind = "the closure" if isinstance(part.owner, types.CellType) else "the global names"
            return f"{kind} of function {short(holder.__qualname__, 100)}"
        return short(part.path.removesuffix(f".{part.key}"), 100)

    def _called(self, owner: Any) -> str:
        if isinstance(owner, nn.Module):
            return _called(self._paths[owner])
        return short(self._object_paths[id(owner)], 100)

    def _replaced(self) -> str:
        was = dict(zip(self._child_paths, self._children, strict=True))
        now = dict(self._model.named_modules(remove_duplicate=False))
        for path in [path for path in {**was, **now} if path]:
            if was.get(path) is not now.get(path):
                done = "removed" if path not in now else "replaced" if path in was else "added"
                return f"{short(path, 100)} of the model has been {done}"
        return "order of the model has been changed"


def _present(table: Mapping[str, Any]) -> set[str]:
    """Return the names of the parameters or buffers of a table that are not None."""
    return {name for name, tensor in table.items() if tensor is not None}


def _mode(module: nn.Module, path: str) -> Part:
    own = module.__dict__
    return Part(f"{path}.training", own if "training" in own else module, "training", module.training, module)


def _own_methods(module: nn.Module, path: str) -> list[Part]:
    own = module.__dict__
    return [Part(f"{path}.{key}", own, key, own[key], module) for key in own if is_own_method(module, key, own[key])]


def _put_back(part: Part, now: Any) -> bool:
    """Return whether a method that a module had as an attribute of its own is its class's again, or still is."""
    if not isinstance(part.holder, nn.Module) or not is_own_method(part.holder, part.key, part.value):
        return False
    return now is _ABSENT or is_own_method(part.holder, part.key, now)


def _forwards(classes: Iterable[type]) -> list[Part]:
    """Return the ``forward`` of each class, also of PyTorch's own, which a program may have replaced."""
    ordered = sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))
    return [
        Part(f"{cls.__name__}.forward", cls, "forward", cls.forward, cls) for cls in ordered if hasattr(cls, "forward")
    ]


def _takes_children(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) or not is_library_module(type(module).__module__)


def _own_classes(classes: Iterable[type]) -> list[type]:
    """Return the classes of modules and those below them, up to ``nn.Module``, and that of tensors."""
    found = dict.fromkeys(one for cls in classes for one in cls.__mro__ if one not in nn.Module.__mro__)
    return [*found, Tensor]


def _code(parts: Iterable[Part]) -> list[Part]:
    """Return what functions are made of, which a program that reloads its code may exchange inside of them."""
    found = {}
    for part in parts:
        # A user's object is not asked for attributes: its ``__getattr__`` may raise anything.
        function = part.value.__func__ if isinstance(part.value, types.MethodType) else part.value
        if isinstance(function, types.FunctionType) and not is_library_code(function.__code__):
            found[id(function)] = (part.path, function)
    return [
        Part(f"{path}.{key}", function, key, getattr(function, key), function)
        for path, function in found.values()
        for key in _OF_FUNCTIONS
    ]


def _equal(now: Iterable[Any], was: list[Any]) -> bool:
    try:
        return list(now) == was
    except Exception as error:
        if by_signal_handler(error):
            raise
        # An attribute is gone, or is a tensor now, whose comparison is a tensor.
        return False


def _alike(now: Any, was: Any) -> bool:
    """Return whether two values are the same object, equal plain values, or lists and dicts of such."""
    if now is was:
        return True
    if type(now) is not type(was) or isinstance(was, Tensor):
        return False
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
    except ValueError as error:
        if by_signal_handler(error):
            raise
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
