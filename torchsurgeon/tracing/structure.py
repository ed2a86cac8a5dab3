"""Nested values (tuples, dicts, dataclasses, …) ↔ named leaves.

A model's inputs and outputs are rarely one tensor. ``flatten()`` gives every leaf a path from its place in the value
(``out``, ``0``, ``past.1.0``), and ``Structure`` puts leaves back in their places, so that only tensors and plain
numbers have to travel.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchsurgeon.errors import short

# Where a leaf lies in a nested value: the key at each level, from the outside in; empty when the value is the leaf.
LeafPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """How a value is nested, and how to rebuild it from its leaves.

    Attributes:
        kind: the class of the container; None for a leaf.
        keys: the container's keys, indices or attribute names, in order.
        children: the structure under each key.
        missing: what a ``defaultdict`` calls for a key that it has not got.
    """

    kind: type | None
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()
    # Not compared, since a program may make a new function for every dict.
    missing: Callable[[], Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def is_by_attribute(self) -> bool:
        """Whether the parts are attributes of an object, not items of a container."""
        return self.kind is not None and _family(self.kind) in ("dataclass", "leaf")

    def rebuild(self, leaves: Mapping[LeafPath, Any], at: LeafPath = ()) -> Any:
        """Return the nested value.

        Args:
            leaves: the leaf at each path.
            at: the path of this structure in the value that ``leaves`` describes.
        """
        if self.kind is None:
            return leaves[at]
        parts = [child.rebuild(leaves, (*at, str(key))) for key, child in zip(self.keys, self.children, strict=True)]
        family = _family(self.kind)
        if issubclass(self.kind, defaultdict):
            return self.kind(self.missing, zip(self.keys, parts, strict=True))
        return _BUILDERS["object" if family == "leaf" else family](self.kind, self.keys, parts)

    def paths(self, at: LeafPath = ()) -> list[LeafPath]:
        """Return the path of every leaf, in order; ``at`` is put before each."""
        if self.kind is None:
            return [at]
        return [
            path for key, child in zip(self.keys, self.children, strict=True) for path in child.paths((*at, str(key)))
        ]

    def replaced(self, path: LeafPath, part: Structure) -> Structure:
        """Return this structure with ``part`` in the place of what is at ``path``."""
        if not path:
            return part
        place = [str(k) for k in self.keys].index(path[0])
        child = self.children[place].replaced(path[1:], part)
        return dataclasses.replace(self, children=(*self.children[:place], child, *self.children[place + 1 :]))

    def at(self, path: LeafPath) -> Structure:
        """Return the part of the structure under ``path``."""
        part = self
        for key in path:
            part = part.children[[str(k) for k in part.keys].index(key)]
        return part


LEAF = Structure(None)
FIXED = (
    *(int, float, complex, str, bytes, type(None), type, range, slice, frozenset, type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.qscheme),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module),
)
"""Values that cannot change between two calls, and that are equal when they say the same."""
_ATOMS = (torch.Tensor, int, float, str, bytes, type(None), torch.dtype, torch.device, nn.Module)


def _family(kind: type) -> str:
    """Return the kind of container that a class is, by which it is taken apart and rebuilt."""
    if dataclasses.is_dataclass(kind):
        return "dataclass"
    if issubclass(kind, tuple):
        return "namedtuple" if hasattr(kind, "_fields") else "tuple"
    if issubclass(kind, list):
        return "list"
    if issubclass(kind, Mapping):
        return "mapping"
    return "leaf"


def _build_object(kind: type, keys: tuple[Any, ...], parts: list[Any]) -> Any:
    made: Any = object.__new__(kind)
    made.__dict__.update(zip(keys, parts, strict=True))
    return made


def _holds_tensor(value: Any, depth: int = 4) -> bool:
    """Return whether an object of some other class keeps tensors in its attributes, as an image list or a cache does.

    It looks ``depth`` objects deep, so that an object that holds itself ends the search.
    """
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, (type, nn.Module, ModuleType, FunctionType, int, float, str)):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensor(item, depth) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item, depth) for item in value)
    return any(_holds_tensor(item, depth - 1) for item in getattr(value, "__dict__", {}).values())


def _build_dataclass(kind: Any, keys: tuple[Any, ...], parts: list[Any]) -> Any:
    given = dict(zip(keys, parts, strict=True))
    passed = {field.name for field in dataclasses.fields(kind) if field.init}
    made = kind(**{key: part for key, part in given.items() if key in passed})
    for key in given.keys() - passed:
        # Past the class's own __setattr__, since it may be frozen.
        object.__setattr__(made, key, given[key])
    return made


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass instance that have a value, and whatever else was assigned to it."""
    fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    others = getattr(value, "__dict__", {}).keys() - set(fields)
    return [(name, getattr(value, name)) for name in (*fields, *sorted(others))]


def _build_mapping(kind: Any, keys: tuple[Any, ...], parts: list[Any]) -> Any:
    pairs = zip(keys, parts, strict=True)
    return OrderedDict(pairs) if kind is OrderedDict else kind(dict(pairs))


_BUILDERS: dict[str, Callable[[type, tuple[Any, ...], list[Any]], Any]] = {
    "object": _build_object,
    "dataclass": _build_dataclass,
    "namedtuple": lambda kind, _, parts: kind(*parts),
    # torch.return_types and other C sequences are built from one iterable, like tuple itself.
    "tuple": lambda kind, _, parts: kind(parts),
    "list": lambda kind, _, parts: list(parts),
    "mapping": _build_mapping,
}


def flatten(value: Any, at: LeafPath = ()) -> tuple[list[tuple[LeafPath, Any]], Structure]:
    """Return every leaf of a nested value with its path, and the structure that rebuilds the value.

    Tuples, named tuples, lists, mappings, dataclass instances and objects that keep tensors in their attributes are
    containers; all else is a leaf. A dataclass field that is ``None`` is a leaf, so an output object keeps the fields
    it was made with. ``torch.Size`` is a leaf, because models pass it on as one value.

    Args:
        value: any value.
        at: put before the path of each leaf.
    """
    kind = type(value)
    family = _family(kind) if kind.__name__ != "Size" and not isinstance(value, type) else "leaf"
    if family == "leaf" and not isinstance(value, _ATOMS) and _holds_tensor(value):
        family = "object"
    if family == "leaf":
        return [(at, value)], LEAF
    items: list[tuple[Any, Any]]
    if family == "dataclass":
        items = _attributes(value)
    elif family in ("mapping", "object"):
        items = list((value if family == "mapping" else value.__dict__).items())
    else:
        items = list(enumerate(value))
    leaves: list[tuple[LeafPath, Any]] = []
    children = []
    for key, item in items:
        inner, structure = flatten(item, (*at, str(key)))
        leaves += inner
        children.append(structure)
    missing = value.default_factory if isinstance(value, defaultdict) else None
    return leaves, Structure(kind, tuple(key for key, _ in items), tuple(children), missing)


def lost_in(value: Any, is_followed: Callable[[Any], bool] = lambda _: False) -> str | None:
    """Return in words what ``flatten()`` does not keep of a nested value; None where it keeps all of it.

    Args:
        value: any value.
        is_followed: tells of a leaf whether something else sees to it.
    """
    kind, structure = type(value), flatten(value)[1]
    what = f"an object of the class {short(kind.__name__, 100, quote=False)}"
    if isinstance(value, torch.Tensor):
        # Those of other classes keep what belongs to the class as attributes.
        own = value.__dict__ if kind is torch.Tensor else {}
        named = next((key for key in own if not key.startswith("_")), None)
        return None if named is None else f"a tensor with an attribute of its own, {short(named, 100)}"
    if structure.kind is None:
        closes_over = isinstance(value, FunctionType) and value.__closure__
        known = is_followed(value) or (isinstance(value, FIXED) and not closes_over)
        return None if known else f"{what}, in which no tensor is found"
    family = _family(kind)
    if family == "list" and kind is not list:
        return f"{what}, which is a list of another class"
    if family == "tuple" and kind is not tuple and not kind.__module__.startswith("torch"):
        return f"{what}, which is a tuple of another class"
    if len({str(key) for key in structure.keys}) < len(structure.keys):
        return f"{what} with two keys that read alike"
    if family == "mapping" and isinstance(value, dict) and getattr(value, "__dict__", None):
        return f"{what} with attributes beside its keys"
    by_attribute = family in ("dataclass", "leaf")
    parts = [getattr(value, key) if by_attribute else value[key] for key in structure.keys]
    return next((lost for part in parts if (lost := lost_in(part, is_followed)) is not None), None)


def with_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Return a nested value with ``function`` applied to every tensor in it."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        # PyTorch's own trees take mappings and objects that are not registered with them as leaves.
        leaves, structure = flatten(leaf)
        if not any(isinstance(inner, torch.Tensor) for _, inner in leaves):
            return leaf
        return structure.rebuild(
            {path: function(inner) if isinstance(inner, torch.Tensor) else inner for path, inner in leaves}
        )

    return pytree.tree_map(changed, value)


def is_mapping(value: Any) -> bool:
    """Return whether a value gives values by key: a mapping, or an object with ``keys()`` that is read like one."""
    if isinstance(value, (torch.Tensor, type)):
        return False
    return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(type(value), "__getitem__"))


def leaf_name(root: str, path: LeafPath) -> str:
    """Return the dotted name of the leaf at ``path`` of a value called ``root``."""
    return ".".join((root, *path))
