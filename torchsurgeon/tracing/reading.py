"""What the call of modules reads besides its inputs and parameters: attributes, functions, closures, globals, hooks.

The code is not run. A ``Reading`` starts from the modules' ``forward`` and hooks, and follows what their code names:
methods, attributes, global names, imports inside a function, what a function closes over, the functions in a
``partial``, the parts of lists, dicts and objects. An attribute that no code names computes nothing, and is left out.
So is one that a call changes, such as a counter or a cache: it is a result of the run.

Code of PyTorch, NumPy and the standard library is not followed, but for the methods of PyTorch's module classes, and
for what a function of theirs closes over, since decorators close over what they decorate. Of other installed packages
the module classes and functions are followed; their other classes count by name, and by what objects hold.
"""

from __future__ import annotations

import array
import enum
import importlib.util
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from torchsurgeon.tracing.call import path_name
from torchsurgeon.tracing.names import Import, changed_by_methods, names_in, of_library_class, wrapped
from torchsurgeon.tracing.results import MAKING, Left, Results
from torchsurgeon.tracing.source import is_installed_module, is_library_code, is_library_module
from torchsurgeon.tracing.step import unique
from torchsurgeon.tracing.structure import LeafPath

PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), enum.Enum, np.generic)
PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)
CHANGEABLE = (dict, list, set, deque, np.ndarray, bytearray, array.array)
CONTAINERS = (dict, list, tuple, set, frozenset, deque, types.MappingProxyType)
OF_MODULES = frozenset(nn.Module().__dict__)
HOOKS = (("forward pre-hook", "_forward_pre_hooks"), ("forward hook", "_forward_hooks"))
GLOBAL_HOOKS: tuple[tuple[str, dict[int, Any]], ...] = (
    ("global forward pre-hook", nn.modules.module._global_forward_pre_hooks),
    ("global forward hook", nn.modules.module._global_forward_hooks),
)

_ROOTS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
# Methods that syntax calls, as len(x) and x[i] do, count for every object; these do not compute.
_IDLE = {
    "__repr__",
    "__str__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__deepcopy__",
    "__copy__",
}
_IDLE |= {"__del__", "__init_subclass__", "__sizeof__", "__dir__", "__format__", "__subclasshook__", "__getnewargs__"}
# What an assignment or ``del`` calls. Where others than the model make those, it is no result of the run.
_SETTERS = {"__set__", "__delete__", "__setattr__", "__delattr__", "__setitem__", "__delitem__"}
# What a method is wrapped in, which is a method of the same class.
_OF_METHODS = {"fget", "func", "__wrapped__", "__func__"}
# What is followed of a model's arguments. They are compared by identity in each call.
_OF_ARGUMENTS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, nn.Module)
# Objects of these libraries hold what a user put into them; those of others (loggers, locks) are not looked into.
_HOLDERS = {"torch", "types", "argparse", "collections", "functools"}
# What a reading follows at most. It ends in the same place on both sides, where the models are the same.
_MOST = 20_000
_MOST_ELEMENTS = 1_000


class Part(NamedTuple):
    """Something that is read: ``owner[key]``, or an attribute of ``owner`` where that is no container.

    Attributes:
        path: where it is, as in ``"encoder.scales[2]"``; the same in every process.
        owner: the dict, list or tuple that holds it (for an attribute the object's ``__dict__``), or the object.
        key: its key, index or name there.
        value: what it was when it was read.
        holder: the module, class, function or other object that it belongs to.
    """

    path: str
    owner: Any
    key: Any
    value: Any
    holder: Any


class Reading:
    """What the call of some modules reads.

    Attributes:
        parts: what is read, each once, in an order that is the same in every process, without results of a call.
        firm: the same where results are told by the code alone, so that every process has the same parts.
        assigned: the names of attributes that the code assigns.
        filled: the names of attributes and global names whose lists, dicts and arrays the code changes.
        functions: those that it followed, without those of PyTorch, NumPy and the standard library.
        owners: the modules, classes and other objects whose attributes the code reads, with where they are.
        left: what a call of the model was seen to leave; None where none was watched.
        complete: False where there was more than a reading follows.

    Args:
        modules: the modules by path, with all modules inside them.
        values: functions and other objects by path, which are read too.
        global_hooks: whether to follow the hooks that PyTorch calls for every module.
        unhooked: one of the modules, of which only ``forward`` is called, without its hooks; None for none.
        left: what a call of the model was seen to leave, which tells results better than the code does; None where none
            was watched.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        values: Mapping[str, Any] | None = None,
        *,
        global_hooks: bool = False,
        unhooked: nn.Module | None = None,
        left: Left | None = None,
    ) -> None:
        self.assigned: set[str] = set()
        self.filled: set[str] = set()
        self.complete = True
        self._given = modules, values, global_hooks, unhooked, left
        self._unhooked, self.left = unhooked, left
        self._names: set[str] = set(_ROOTS)
        self._computed = False
        self._computed_by_library: dict[Any, set[str]] = {}
        self._found: list[Part] = []
        self._visited: set[tuple[int, Any]] = set()
        self._seen: set[int] = set()
        self._kept: list[Any] = []
        self.owners: list[tuple[str, Any]] = []
        self._classes: dict[type, str] = {}
        self._code: deque[tuple[str, types.FunctionType]] = deque()
        self.functions: list[types.FunctionType] = []
        # The classes whose methods functions are, by the functions' ids.
        self._classes_of: dict[int, dict[type, None]] = {}
        for path, module in modules.items():
            self._add_module(path, module)
        for path, value in (values or {}).items():
            self._visit(path, (value,), 0, value, None)
        if global_hooks:
            for label, table in GLOBAL_HOOKS:
                self._add_hooks("", label, table, None)
        self._follow_all()
        self._results = Results(self.functions, self._classes_of, [owner for _, owner in self.owners])
        for owner, names in self._computed_by_library.items():
            self._results.add(owner, names)
        if any(isinstance(part.value, CHANGEABLE) for part in self._found):
            changeable = {part.key for part in self._found if isinstance(part.value, CHANGEABLE)}
            self.filled = self._results.look_for_filled(changeable)
        self.parts = self._unless_results(self._found, left)
        self.firm = self.parts if left is None else self._unless_results(self._found, None)

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """All modules whose attributes the code reads, with where they are; also those in plain lists and closures."""
        return [(path, owner) for path, owner in self.owners if isinstance(owner, nn.Module)]

    @property
    def objects(self) -> list[tuple[str, Any]]:
        """The objects whose attributes the code reads, with where they are: no modules, classes and functions."""
        others = (nn.Module, type, types.ModuleType, types.FunctionType)
        return [(path, one) for path, one in self.owners if hasattr(one, "__dict__") and not isinstance(one, others)]

    @property
    def names(self) -> frozenset[str]:
        """The names of attributes that the code reads."""
        return frozenset(self._names)

    def reads(self, owner: Any, name: str) -> bool:
        """Return whether the code reads an attribute of this name, if the module or object has it."""
        tables = (vars(owner), owner._parameters, owner._buffers) if isinstance(owner, nn.Module) else (vars(owner),)
        assigned = any(self._results.assigns(table, name, owner, self.left) for table in tables)
        return not assigned and self._names_it(owner, name)

    def fills(self, part: Part) -> bool:
        """Return whether the code changes what a list, dict or array holds."""
        return isinstance(part.key, str) and self._results.fills(part.value, part.key, part.holder, self.left)

    def overwrites(self, owner: Any, name: str) -> bool:
        """Return whether each call assigns an attribute of a module or object before it reads it."""
        return self._results.overwrites(name, owner)

    @property
    def filled_dicts(self) -> list[Part]:
        """The dicts that are read and whose contents the code changes."""
        return [part for part in self._found if isinstance(part.value, dict) and self.fills(part)]

    def again(self) -> Reading:
        """Return what the same call reads now."""
        modules, values, global_hooks, unhooked, left = self._given
        return Reading(modules, values, global_hooks=global_hooks, unhooked=unhooked, left=left)

    def _unless_results(self, parts: list[Part], left: Left | None) -> list[Part]:
        """Return the parts that the code neither assigns nor fills, nor finds inside of what it fills."""
        named = [part for part in parts if isinstance(part.key, str)]
        assigned = {id(part) for part in named if self._results.assigns(part.owner, part.key, part.holder, left)}
        holding = [part for part in named if isinstance(part.value, CONTAINERS)]
        filled = {part.path for part in holding if self._results.fills(part.value, part.key, part.holder, left)}
        return [part for part in parts if id(part) not in assigned and filled.isdisjoint(_around(part.path))]

    # --- following ---

    def _follow_all(self) -> None:
        while True:
            before = len(self._found), len(self._names), len(self.assigned), len(self.owners), len(self._classes)
            while self._code:
                self._scan(*self._code.popleft())
            for path, owner in list(self.owners):
                self._look_at(path, owner)
            for cls, path in list(self._classes.items()):
                self._look_at_class(path, cls)
            after = len(self._found), len(self._names), len(self.assigned), len(self.owners), len(self._classes)
            if before == after and not self._code:
                return

    def _scan(self, path: str, function: types.FunctionType) -> None:
        code = function.__code__
        names = names_in(code)
        if not is_library_code(code):
            self._names |= names.read
            if code.co_name not in MAKING:
                self.assigned |= names.assigned
            self.functions.append(function)
            self._computed |= names.computed
            installed = is_installed_module(function.__module__ or "")
            for name in sorted(names.globals & function.__globals__.keys()):
                value = function.__globals__[name]
                if not (installed and isinstance(value, CONTAINERS)):  # registries, which importing may fill
                    self._visit(name, function.__globals__, name, value, function)
            for imported in sorted(names.imports):
                self._follow_import(function, imported)
            for i, value in enumerate(function.__defaults__ or ()):
                self._visit(f"{path} default {i}", function.__defaults__, i, value, function)
            for name, value in (function.__kwdefaults__ or {}).items():
                self._visit(f"{path} default {name}", function.__kwdefaults__, name, value, function)
            if function.__dict__:
                self._add_owner(path, function)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if cell != types.CellType():
                # A decorator closes over the method.
                is_method = getattr(cell.cell_contents, "__code__", code).co_varnames[:1] == ("self",)
                of = self._classes_of.get(id(function), ()) if is_method else ()
                self._visit(f"{path} closure {name}", cell, "cell_contents", cell.cell_contents, function, of=of)

    def _follow_import(self, function: types.FunctionType, imported: Import) -> None:
        """Follow what a function imports while it runs, as far as it has been imported by now."""
        name = _absolute(imported, function.__globals__)
        for one in {name: None} if imported.names else {name: None, name.partition(".")[0]: None}:
            module = sys.modules.get(one)
            if not isinstance(module, types.ModuleType) or is_library_module(one):
                continue
            if self.left is None and is_installed_module(one):
                continue  # whether it has been imported may depend on what else the process does
            installed = is_installed_module(function.__module__ or "")
            if not imported.names:
                self._visit(one, sys.modules, one, module, function)
            for wanted in imported.names:
                if wanted in vars(module) and not (installed and isinstance(vars(module)[wanted], CONTAINERS)):
                    self._visit(f"{one}.{wanted}", vars(module), wanted, vars(module)[wanted], module)

    def _look_at(self, path: str, owner: Any) -> None:
        own: Any = getattr(owner, "__dict__", None)
        wanted: Iterable[str] = ()
        if isinstance(owner, nn.Module):
            wanted = [name for name in own.keys() - OF_MODULES if self._names_it(owner, name)]
            wanted = [name for name in wanted if not is_own_method(owner, name, own[name])]
            self._look_at_tensors(path, owner)
        elif isinstance(own, dict):
            computed = self._computed and not isinstance(owner, types.ModuleType)
            wanted = own.keys() if computed else own.keys() & self._names
        for name in sorted(wanted):
            self._visit(_dotted(path, name), own, name, own[name], owner)
        for name in sorted(_slots(type(owner)) & self._names):
            if hasattr(owner, name):
                self._visit(_dotted(path, name), owner, name, getattr(owner, name), owner)

    def _look_at_tensors(self, path: str, module: nn.Module) -> None:
        """Note the attributes that a program has given to a module's parameters and buffers: ``weight.scale = 2.0``."""
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                given = tensor.__dict__ if tensor is not None else {}
                for name in sorted(given.keys() & self._names):
                    self._visit(_dotted(_dotted(path, key), name), given, name, given[name], tensor)

    def _names_it(self, owner: Any, name: str) -> bool:
        if self._computed or name in self._names:
            return True
        cls: Any = type(owner)
        used = of_library_class(cls)
        return used.computed or name in used.read

    def _look_at_class(self, path: str, cls: type) -> None:
        is_module = issubclass(cls, nn.Module)
        for one in cls.__mro__:
            if one in nn.Module.__mro__:
                continue
            members = vars(one)
            library = is_library_module(one.__module__)
            for name in sorted(members.keys() & (self._names | self.assigned)):
                member = members[name]
                if not library:
                    self._visit(f"{one.__qualname__}.{name}", members, name, member, one, at=id(one), of=(one,))
                elif is_module and isinstance(member, types.FunctionType) and id(member) not in self._seen:
                    self._seen.add(id(member))
                    self._names |= names_in(member.__code__).read
                    self._add_computed(one, names_in(member.__code__).assigned)
            if library or is_module:
                continue
            for name in sorted(members.keys() - _IDLE):
                if name.startswith("__") and not _is_generated(one, members[name]):
                    of = () if name in _SETTERS else (one,)
                    self._visit(f"{one.__qualname__}.{name}", members, name, members[name], one, at=id(one), of=of)

    def _visit(
        self,
        path: str,
        owner: Any,
        key: Any,
        value: Any,
        holder: Any,
        at: int | None = None,
        of: Iterable[type] = (),
    ) -> None:
        """Note what is read and follow it; ``of`` are the classes whose method it is, if it is one."""
        place = (id(owner) if at is None else at, key)
        if place in self._visited:
            return
        if len(self._found) >= _MOST:
            self.complete = False
            return
        self._visited.add(place)
        self._found.append(Part(path, owner, key, value, holder))
        self._follow(path, value, of)

    def _follow(self, path: str, value: Any, of: Iterable[type] = ()) -> None:
        if isinstance(value, (*PLAIN, torch.Tensor, np.ndarray, np.ufunc)):
            return
        if isinstance(value, types.FunctionType):
            self._classes_of.setdefault(id(value), {}).update(dict.fromkeys(of))
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, types.FunctionType):
            self._code.append((path, value))
        elif isinstance(value, nn.Module):
            for inner, module in value.named_modules(prefix=path):
                self._add_module(inner, module, hidden=True)
        elif isinstance(value, types.ModuleType):
            if not is_library_module(value.__name__):
                self._add_owner(path, value)
        elif isinstance(value, type):
            if not _counts_by_name(value):
                self._classes.setdefault(value, path)
        elif isinstance(value, CONTAINERS):
            self._follow_elements(path, value)
        else:
            inner = list(wrapped(value))
            if isinstance(value, types.MethodType):
                of = () if isinstance(value.__self__, type) else (type(value.__self__),)
            elif isinstance(value, (staticmethod, classmethod)):
                of = ()
            for name, part in inner:
                self._visit(f"{path}.{name}", (part,), 0, part, value, of=of if name in _OF_METHODS else ())
            if not inner:
                self._follow_object(path, value)

    def _follow_elements(self, path: str, value: Any) -> None:
        if isinstance(value, (set, frozenset)):
            return
        for key, element in elements(value):
            self._visit(f"{path}[{key!r}]", value, key, element, value)

    def _follow_object(self, path: str, value: Any) -> None:
        cls: Any = type(value)
        if not is_library_module(cls.__module__):
            if not _counts_by_name(cls):
                self._classes.setdefault(cls, path)
            self._add_owner(path, value)
        elif cls.__module__.partition(".")[0] in _HOLDERS and isinstance(getattr(value, "__dict__", None), dict):
            for name in sorted(value.__dict__.keys() - changed_by_methods(cls)):
                self._visit(_dotted(path, name), value.__dict__, name, value.__dict__[name], value)

    def _add_module(self, path: str, module: nn.Module, *, hidden: bool = False) -> None:
        self._seen.add(id(module))
        self._add_owner(path, module)
        cls: Any = type(module)
        if not is_library_module(cls.__module__):
            self._classes.setdefault(cls, path)
        else:
            self._add_computed(cls, of_library_class(cls).assigned)
            forward = getattr(cls, "forward", None)
            if isinstance(forward, types.FunctionType) and not is_library_code(forward.__code__):
                # Somebody has replaced the method of PyTorch's own class.
                self._visit(f"{cls.__name__}.forward", cls, "forward", forward, cls)
        for label, name in HOOKS:
            if getattr(module, name, None):
                self._add_hooks(path, label, getattr(module, name), module)
        if hidden:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    self._visit(_dotted(path, name), table, name, tensor, module)

    def _add_hooks(self, path: str, label: str, table: Mapping[int, Any], module: nn.Module | None) -> None:
        for i, (key, hook) in enumerate(table.items()):
            if is_library_module(type(hook).__module__) and hasattr(hook, "__dict__"):
                # Hooks of torch.nn.utils (weight_norm, spectral_norm, pruning) compute the attribute that they name.
                self._add_computed(module, {text for text in vars(hook).values() if isinstance(text, str)})
            if module is not None and module is self._unhooked:
                continue
            self._visit(f"{path} {label} {i}".strip(), table, key, hook, module)

    def _add_computed(self, owner: Any, names: Iterable[str]) -> None:
        """Note attributes that PyTorch's own code assigns to the objects of a class, to one module, or to any."""
        self.assigned.update(names)
        self._computed_by_library.setdefault(owner, set()).update(names)

    def _add_owner(self, path: str, owner: Any) -> None:
        self.owners.append((path, owner))
        self._kept.append(owner)


def read_model(model: nn.Module, fixed: Mapping[LeafPath, Any] | None = None, left: Left | None = None) -> Reading:
    """Return what the call of a whole model reads.

    Args:
        model: the model.
        fixed: what it is called with besides tensors, by path. The functions and modules among it are read, too.
        left: what a call of it was seen to leave; None where none was watched.
    """
    called = {
        f"argument {path_name(path)}": value
        for path, value in (fixed or {}).items()
        if isinstance(value, _OF_ARGUMENTS)
    }
    return Reading(dict(model.named_modules()), called, global_hooks=True, left=left)


def is_own_method(module: nn.Module, name: str, value: Any) -> bool:
    """Return whether an attribute of a module is its class's method of this name, bound to the module.

    accelerate leaves ``forward`` like that when it removes its hooks; it means the same as no attribute.
    """
    own = getattr(type(module), name, None)
    return isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is own


def plain_tensors(model: nn.Module, reading: Reading) -> dict[str, torch.Tensor]:
    """Return the tensors that a model reads and that are neither its parameters nor its buffers, by where they are."""
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[str, torch.Tensor] = {}
    for part in reading.firm:
        if isinstance(part.value, torch.Tensor) and id(part.value) not in seen:
            seen.add(id(part.value))
            found[unique(part.path, found)] = part.value
    return found


def elements(value: Any) -> Iterator[tuple[Any, Any]]:
    """Return the keys and the elements of a list, tuple or dict that are no plain values."""
    items = value.items() if isinstance(value, (dict, types.MappingProxyType)) else enumerate(value)
    count = 0
    for key, element in items:
        if not isinstance(element, PLAIN):
            yield key, element
            count += 1
            if count >= _MOST_ELEMENTS:
                return


def _absolute(imported: Import, of: Mapping[str, Any]) -> str:
    """Return the full name of an imported module, empty where there is none.

    Args:
        imported: the import.
        of: the global names of the function that imports.
    """
    package = of.get("__package__")
    if package is None:
        name = str(of.get("__name__", ""))
        package = name if "__path__" in of else name.rpartition(".")[0]
    try:
        return importlib.util.resolve_name("." * imported.level + imported.module, package)
    except (ImportError, ValueError):
        return ""


def _counts_by_name(cls: type) -> bool:
    """Return whether a class's methods are left out: those of an installed package that is no module reach too far."""
    return is_library_module(cls.__module__) or is_installed_module(cls.__module__)


def _is_generated(cls: type, member: Any) -> bool:
    """Return whether dataclasses, attrs or namedtuple wrote a method, so that the class's fields say what it does."""
    by_fields = any(hasattr(cls, name) for name in ("__dataclass_fields__", "__attrs_attrs__", "_fields"))
    return by_fields and isinstance(member, types.FunctionType) and member.__code__.co_filename.startswith("<")


def _slots(cls: type) -> set[str]:
    slots = (vars(one).get("__slots__", ()) for one in cls.__mro__ if not is_library_module(one.__module__))
    return {name for one in slots for name in ((one,) if isinstance(one, str) else one)}


def _around(path: str) -> Iterator[str]:
    """Return the path of a part, and those of the lists and dicts around it."""
    yield path
    yield from (path[:i] for i, character in enumerate(path) if character == "[")


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
