"""Which attributes, lists, dicts and arrays the code of a model assigns or fills: results of a call, not premises.

An attribute is a result where a call with the example was seen to change it, and where ``forward`` assigns it in each
call before it reads it: ``self.height = x.shape[2]``. Where no call was watched, all of the code tells.
What a method assigns to ``self`` is found by the method's class, and what it reaches from there by attributes alone, as
in ``self.box.count += 1``, by looking there. Of ``out.scale = 2.0`` only the name is known, which counts everywhere.

Lists, dicts and arrays that a method fills are results whether or not the example's call has changed them: a cache may
have had its entry for the example.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torchsurgeon.tracing.names import Way, filled_by, names_in, overwritten_by

# What these assign to their first argument is of an object that they make.
MAKING = frozenset(("__init__", "__new__", "__post_init__"))


_SINGLE: frozenset[type] = frozenset((bool, int, float, complex, str, type(None), torch.dtype))


ABSENT = "(absent)"
Settled = Mapping[tuple[int, Any], tuple[Any, Any] | None]


class Left(NamedTuple):
    """What a call of a model was seen to leave.

    Attributes:
        watched: the ids of the dicts (also ``__dict__`` of modules and objects), lists and sets that were watched.
        changed: by id and key, what changed in the dicts.
        filled: the ids of all of them that changed.
        settled: by id and key, what a call changed in the dicts when it was recorded. If it is a single number, text or
            the like that the next call left alone: what it was before, ``ABSENT`` where it was not there, and what it
            was afterwards. Otherwise None.
    """

    watched: frozenset[int]
    changed: frozenset[tuple[int, Any]]
    filled: frozenset[int]
    settled: Settled | None = None


def is_single(value: Any) -> bool:
    """Return whether a value is a single number, text or the like, and no stand-in for a number that is followed."""
    return type(value) in _SINGLE


class Results:
    """What functions assign and fill.

    Args:
        functions: the functions.
        classes_of: by their ids, the classes whose methods they are.
        owners: the modules and objects that they read attributes of.
    """

    def __init__(
        self, functions: Iterable[types.FunctionType], classes_of: Mapping[int, Collection[type]], owners: Iterable[Any]
    ) -> None:
        self._functions, self._classes_of = list(functions), classes_of
        self._owners: dict[type, list[Any]] = {}
        for owner in owners:
            for cls in type(owner).__mro__:
                self._owners.setdefault(cls, []).append(owner)
        # By class, or by the id of one object.
        self._assigned: dict[Any, set[str]] = {}
        self._filled: dict[Any, set[str]] = {}
        self._overwritten: dict[int, set[str]] = {}
        self._contents: set[int] = set()
        self._assigned_elsewhere: set[str] = set()
        self._filled_elsewhere: set[str] = set()
        for function in self._functions:
            names = names_in(function.__code__)
            if function.__code__.co_name not in MAKING:
                self._assigned_elsewhere |= names.elsewhere | self._without_class(function, names.own)
                for cls, way in self._ways(function, names.own):
                    self._note(self._assigned, self._assigned_elsewhere, cls, way)
            if function.__code__.co_name == "forward" and names.own:
                for cls, way in self._ways(function, overwritten_by(function.__code__)):
                    self._note_overwritten(cls, way)

    def add(self, owner: Any, names: set[str]) -> None:
        """Note attributes that are assigned to the objects of a class, to one module, or, with None, to any object."""
        if owner is None:
            self._assigned_elsewhere |= names
        else:
            self._assigned.setdefault(owner if isinstance(owner, type) else id(owner), set()).update(names)

    def look_for_filled(self, changeable: Collection[Any]) -> set[str]:
        """Look for lists, dicts and arrays that are filled, and return their names.

        Args:
            changeable: the names of those that are read.
        """
        found: set[str] = set()
        for function in self._functions:
            read = names_in(function.__code__)
            if not (read.read | read.globals).isdisjoint(changeable):
                filled = filled_by(function.__code__)
                found |= filled.names
                self._add_filled(function, filled.own, filled.globals, filled.elsewhere)
        return found

    def assigns(self, table: Any, name: str, holder: Any, left: Left | None) -> bool:
        """Return whether an attribute is a result.

        Args:
            table: the dict that holds it, or the object itself.
            name: its name.
            holder: the module, class or other object that it belongs to.
            left: what a call was seen to leave; None where none was watched.
        """
        if left is not None and id(table) in left.watched:
            # What is only assigned on a path that the example does not take is read on the path that it takes.
            return (id(table), name) in left.changed or self.overwrites(name, holder)
        if any(name in self._assigned.get(key, ()) for key in (*type(holder).__mro__, id(holder))):
            return True
        return name in self._assigned_elsewhere

    def overwrites(self, name: str, holder: Any) -> bool:
        """Return whether each call assigns an attribute of a module or object before it reads it."""
        return name in self._overwritten.get(id(holder), ())

    def fills(self, value: Any, name: str, holder: Any, left: Left | None) -> bool:
        """Return whether what a list, dict or array holds is a result; the arguments are those of ``assigns()``."""
        if id(value) in self._contents or (left is not None and id(value) in left.filled):
            return True
        if any(name in self._filled.get(key, ()) for key in (*type(holder).__mro__, id(holder))):
            return True
        return name in self._filled_elsewhere and (left is None or id(value) not in left.watched)

    def _add_filled(
        self, function: types.FunctionType, own: Collection[Way], names: Collection[str], elsewhere: Collection[str]
    ) -> None:
        self._contents |= {id(function.__globals__[name]) for name in names if name in function.__globals__}
        self._filled_elsewhere |= {*elsewhere, *self._without_class(function, own)}
        if function.__code__.co_name not in MAKING:
            for cls, way in self._ways(function, own):
                self._note(self._filled, self._filled_elsewhere, cls, way)

    def _without_class(self, function: types.FunctionType, ways: Collection[Way]) -> set[str]:
        return set() if self._classes_of.get(id(function)) else {way[-1] for way in ways}

    def _ways(self, function: types.FunctionType, ways: Collection[Way]) -> Iterable[tuple[type, Way]]:
        return ((cls, way) for cls in self._classes_of.get(id(function), ()) for way in ways)

    def _note_overwritten(self, cls: type, way: Way) -> None:
        """Note where a way ends that begins at modules whose ``forward`` is that of a class."""
        *before, name = way
        for owner in self._owners.get(cls, ()):
            own = next(one for one in type(owner).__mro__ if one is cls or "forward" in vars(one))
            if own is cls and "forward" not in vars(owner):
                reached = functools.reduce(_attribute, before, owner)
                self._overwritten.setdefault(id(reached), set()).add(name)

    def _note(self, by: dict[Any, set[str]], elsewhere: set[str], cls: type, way: Way) -> None:
        """Note where a way ends that begins at the objects of a class."""
        *before, name = way
        if not before:
            by.setdefault(cls, set()).add(name)
            return
        for owner in self._owners.get(cls, ()):
            reached = functools.reduce(_attribute, before, owner)
            if reached is None:
                elsewhere.add(name)
            else:
                by.setdefault(id(reached), set()).add(name)


def _attribute(value: Any, name: str) -> Any:
    """Return a module's or object's own attribute, without running any code; None where it has none."""
    own = getattr(value, "__dict__", None)
    tables = (own, value._modules) if isinstance(value, nn.Module) else (own,)
    return next((table[name] for table in tables if isinstance(table, dict) and name in table), None)
