"""Which names the code of functions and classes reads and writes, found without running it."""

from __future__ import annotations

import ast
import dis
import functools
import re
import types
import weakref
from collections import UserDict, UserList
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from torchsurgeon.tracing.source import is_library_module, tree

_READS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"}
_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_WRITES = {"STORE_ATTR", "DELETE_ATTR"}
# Instructions that put a variable on top of the stack.
_LOADS = re.compile("LOAD_FAST|LOAD_DEREF")
# Functions that import what a text names.
_IMPORTS = {"import_module", "__import__"}
# Functions that reach attributes by names that are values.
_BY_NAME = {"getattr", "hasattr", "attrgetter", "methodcaller", "vars", "__dict__", "get_submodule", "get_parameter"}
_SETS = {"setattr", "delattr", "__setattr__", "register_buffer", "register_parameter"}
_FILLS = {
    "append",
    "appendleft",
    "extend",
    "insert",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "popleft",
    "clear",
    "add",
}
_FILLS |= {"remove", "discard", "__setitem__", "__delitem__", "sort", "reverse"}


# From a function's first argument to an attribute.
Way = tuple[str, ...]


class Filled(NamedTuple):
    """The lists, dicts and arrays that a function changes: ``self.cache[key] = y``.

    Attributes:
        own: those that it reaches from its first argument by attributes alone, by the way there.
        globals: those that are global names.
        elsewhere: the attributes that hold the others.
    """

    own: frozenset[Way] = frozenset()
    globals: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """The names of the attributes and global names."""
        return self.globals | self.elsewhere | {way[-1] for way in self.own}


class Import(NamedTuple):
    """An ``import`` inside a function.

    Attributes:
        level: how many dots stand before the name.
        module: the name of the module, without these dots.
        names: what is taken from it by ``from … import``; empty for ``import module``.
    """

    level: int
    module: str
    names: tuple[str, ...] = ()


class Names(NamedTuple):
    """The names in a function and in those that are defined inside it.

    Attributes:
        read: attributes that it reads.
        globals: global names that it reads.
        assigned: attributes that it assigns or deletes.
        own: those of them that it reaches from its first argument by attributes alone, by the way there: ``("x",)``
            for ``self.x = …``, ``("box", "x")`` for ``self.box.x = …``.
        elsewhere: those of them that it assigns to something else, of which only running it would tell what it is.
        computed: whether it may read attributes by names that it computes, as ``getattr(self, f"norm{i}")`` does.
        imports: what it imports while it runs.
    """

    read: frozenset[str]
    globals: frozenset[str]
    assigned: frozenset[str]
    computed: bool
    imports: frozenset[Import] = frozenset()
    own: frozenset[Way] = frozenset()
    elsewhere: frozenset[str] = frozenset()


@functools.lru_cache(maxsize=16_384)
def names_in(code: types.CodeType) -> Names:
    """Return the names in a function's code."""
    read: set[str] = set()
    global_names: set[str] = set()
    texts: set[str] = set()
    imports: set[Import] = set()
    own: set[Way] = set()
    elsewhere: set[str] = set()
    first, todo = _first_argument(code), [code]
    while todo:
        one = todo.pop()
        instructions = [each for each in dis.get_instructions(one) if each.opname != "EXTENDED_ARG"]
        for i, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":
                level, names = instructions[i - 2].argval, instructions[i - 1].argval
                imports.add(Import(int(level), str(instruction.argval), tuple(names or ())))
            elif instruction.opname in _READS:
                read.add(str(instruction.argval))
            elif instruction.opname in _GLOBALS:
                global_names.add(str(instruction.argval))
            elif instruction.opname in _WRITES:
                way = _way_to(instructions, i)
                if way[0] == first:
                    own.add(way[1:])
                else:
                    elsewhere.add(way[-1])
        todo += [constant for constant in one.co_consts if isinstance(constant, types.CodeType)]
        texts |= {constant for constant in one.co_consts if isinstance(constant, str) and _is_name(constant)}
    called = read | global_names
    if called & _IMPORTS:
        imports |= {Import(0, text) for text in texts}
    texts = set(filter(str.isidentifier, texts))
    if called & _SETS:
        elsewhere |= texts
    if "globals" in global_names:
        # As in globals()["SCALE"].
        global_names |= texts
    computed = bool(called & _BY_NAME)
    return Names(
        frozenset(read | texts if computed else read),
        frozenset(global_names),
        frozenset(elsewhere | {way[-1] for way in own}),
        computed,
        frozenset(imports),
        frozenset(own),
        frozenset(elsewhere),
    )


def texts_in(code: types.CodeType) -> Iterator[str]:
    """Yield the texts in a function's code that may be keys or names: ``"scale"``, ``"MY_SCALE"``."""
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, tuple):
            yield from (text for text in constant if isinstance(text, str) and text.isidentifier())
        elif isinstance(constant, types.CodeType):
            yield from texts_in(constant)


def _first_argument(code: types.CodeType) -> str:
    return code.co_varnames[0] if code.co_argcount else ""


def _way_to(instructions: list[dis.Instruction], i: int) -> Way:
    """Return the variable and the attributes by which instruction ``i`` reaches the attribute that it assigns.

    The variable is empty where it reaches that in another way.
    """
    name, j = str(instructions[i].argval), i - 1
    if instructions[j].opname in ("SWAP", "ROT_TWO"):
        # ``self.x += 1`` has read the attribute before.
        read = (k for k in range(j, 1, -1) if instructions[k].opname == "LOAD_ATTR" and instructions[k].argval == name)
        j = next((k - 2 for k in read if instructions[k - 1].opname in ("COPY", "DUP_TOP")), -1)
    way = [name]
    while j >= 0 and instructions[j].opname == "LOAD_ATTR":
        way.insert(0, str(instructions[j].argval))
        j -= 1
    loaded: Any = instructions[j].argval if j >= 0 and _LOADS.search(instructions[j].opname) else ""
    return (loaded[-1] if isinstance(loaded, tuple) else loaded, *way)


def _is_name(text: str) -> bool:
    return all(map(str.isidentifier, text.split(".")))


@functools.lru_cache(maxsize=4096)
def filled_by(code: types.CodeType) -> Filled:
    """Return what lists, dicts and arrays a function changes.

    Without source these are all the attributes that it reads, if it changes any list or dict.
    """
    node = tree(code)
    if node is None:
        stores = any(
            one.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE") for one in dis.get_instructions(code)
        )
        return Filled(elsewhere=names_in(code).read if stores or names_in(code).read & _FILLS else frozenset())
    aliases: dict[str, ast.expr] = {}
    filled: list[ast.expr] = []
    for one in ast.walk(node):
        if isinstance(one, ast.Assign) and isinstance(one.value, (ast.Attribute, ast.Subscript)):
            aliases |= {target.id: one.value for target in one.targets if isinstance(target, ast.Name)}
        if isinstance(one, ast.NamedExpr) and isinstance(one.value, (ast.Attribute, ast.Subscript)):
            aliases[one.target.id] = one.value
        if isinstance(one, ast.Subscript) and isinstance(one.ctx, (ast.Store, ast.Del)):
            filled.append(one.value)
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr in _FILLS:
            filled.append(one.func.value)
    first, own, elsewhere, global_names = _first_argument(code), set(), set(), set()
    for place in filled:
        for _ in range(8):
            if isinstance(place, ast.Subscript):
                place = place.value
            elif isinstance(place, ast.Name) and place.id in aliases:
                place = aliases[place.id]
        way = _written_way(place, first)
        if way is not None:
            own.add(way)
        elif isinstance(place, ast.Attribute):
            elsewhere.add(place.attr)
        elif isinstance(place, ast.Name) and place.id in names_in(code).globals:
            global_names.add(place.id)
    return Filled(frozenset(own), frozenset(global_names), frozenset(elsewhere))


def _written_way(place: ast.expr, first: str) -> Way | None:
    """Return the way from a function's first argument to an attribute; None where it is reached otherwise."""
    way: list[str] = []
    while isinstance(place, ast.Attribute):
        way.insert(0, place.attr)
        place = place.value
    return tuple(way) if way and isinstance(place, ast.Name) and place.id == first else None


@functools.lru_cache(maxsize=4096)
def overwritten_by(code: types.CodeType) -> frozenset[Way]:
    """Return the attributes that a function assigns whenever it is called, before it reads them: ``self.h = len(x)``.

    They are those that its source shows it to assign, outside of any branch and loop.
    """
    node = tree(code)
    found: set[Way] = set()
    read: set[str] = set()
    for statement in [] if node is None or isinstance(node, ast.Lambda) else _always(node.body):
        inside = list(ast.walk(statement))
        read |= {one.attr for one in inside if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Load)}
        if any(isinstance(one, ast.Return) for one in inside):
            break
        if isinstance(statement, ast.Assign):
            targets = [one for target in statement.targets for one in ast.walk(target)]
            ways = {_written_way(one, _first_argument(code)) for one in targets if isinstance(one, ast.Attribute)}
            found |= {way for way in ways if way is not None and way[-1] not in read}
    return frozenset(found)


def _always(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a function that run whenever those before them have run to their end."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _always([*(ast.Expr(item.context_expr) for item in statement.items), *statement.body])
        else:
            yield statement


def wrapped(value: Any) -> Iterator[tuple[str, Any]]:
    """Return the parts of a callable, descriptor, reference or container that wraps others."""
    if isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("__func__", value.__func__), ("__self__", value.__self__))
    elif isinstance(value, types.BuiltinFunctionType):
        if not isinstance(value.__self__, (types.ModuleType, type, type(None))):
            yield "__self__", value.__self__
    elif isinstance(value, property):
        yield from ((name, getattr(value, name)) for name in ("fget", "fset", "fdel") if getattr(value, name))
    elif isinstance(value, (staticmethod, classmethod)):
        yield "__func__", value.__func__
    elif isinstance(value, functools.cached_property):
        yield "func", value.func
    elif isinstance(value, functools._lru_cache_wrapper):
        yield "__wrapped__", value.__wrapped__
    elif isinstance(value, (UserDict, UserList)):
        yield "data", value.data
    elif isinstance(value, weakref.ReferenceType):
        referred = value()
        if referred is not None:
            yield "__call__()", referred


@functools.lru_cache(maxsize=4096)
def of_library_class(cls: Any) -> Names:
    """Return what a class of PyTorch's modules reads and assigns of itself while it runs; nothing for other classes."""
    read: set[str] = {"forward"}
    assigned: set[str] = set()
    computed = False
    if not is_library_module(cls.__module__):
        return Names(frozenset(), frozenset(), frozenset(), False)
    members: dict[str, Any] = {}
    for one in reversed(cls.__mro__):
        if one not in nn.Module.__mro__:
            members.update(vars(one))
    done: set[str] = set()
    while todo := (read | assigned) & members.keys() - done:
        done |= todo
        for name in todo:
            for function in _functions(members[name]):
                names = names_in(function.__code__)
                read |= names.read
                assigned |= names.assigned
                computed |= names.computed
    return Names(frozenset(read), frozenset(), frozenset(assigned), computed)


@functools.lru_cache(maxsize=4096)
def changed_by_methods(cls: Any) -> frozenset[str]:
    """Return the attributes that methods of a class assign, save those that only ``__init__`` does."""
    changed: set[str] = set()
    for one in cls.__mro__:
        for name, member in vars(one).items():
            if name not in ("__init__", "__new__"):
                changed.update(*(names_in(function.__code__).assigned for function in _functions(member)))
    return frozenset(changed)


def _functions(member: Any) -> list[types.FunctionType]:
    parts = [part for _, part in wrapped(member)] or [member]
    return [part for part in parts if isinstance(part, types.FunctionType)]
