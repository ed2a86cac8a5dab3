"""The traced model as a straight line of steps.

A :class:`Step` is one call of the traced graph with its arguments already looked up: running it costs one Python call
more than the eager model does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.structure import LEAF, Path, Structure

# The values of all steps of a program while it runs, by step index.
Environment = list[Any]
# One leaf of a step's value: the step's index, and the path in its value (empty when the value is the leaf itself).
Key = tuple[int, Path]


@dataclasses.dataclass(frozen=True)
class Ref:
    """The value of an earlier step, as it stands in a step's arguments."""

    step: int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A tensor the model makes out of nothing, the same in every call."""

    tensor: torch.Tensor
    __name__ = "constant"

    def __call__(self) -> torch.Tensor:
        return self.tensor


@dataclasses.dataclass(frozen=True)
class ModelDevice:
    """The device the model is on when asked: the two sides may run on different ones."""

    model: nn.Module
    __name__ = "device"

    def __call__(self) -> torch.device:
        tensor = next(iter((*self.model.parameters(), *self.model.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device


@dataclasses.dataclass
class Step:
    """One call of the traced graph.

    ``kind`` is ``input`` (a model input), ``attr`` (a parameter, buffer or constant of the model), ``call`` or
    ``output`` (the model's result, always the last step). ``target`` is a callable, a method's name, the dotted
    attribute or a :class:`Constant`. ``after`` lists steps that must have run before although no value of theirs is
    used: they overwrite memory this step reads. ``reads`` keeps what ``uses`` finds once the program is settled.
    """

    index: int
    name: str
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    module_path: str = ""
    after: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    structure: Structure = LEAF

    @property
    def is_module(self) -> bool:
        return isinstance(self.target, nn.Module)

    @property
    def is_method(self) -> bool:
        return self.kind == "call" and isinstance(self.target, str)

    @property
    def type_name(self) -> str:
        """Class of a module, name of a function or method, as users know it."""
        if self.is_module:
            return type(self.target).__name__
        return self.target.strip("_") if isinstance(self.target, str) else function_name(self.target)

    def uses(self) -> list[int]:
        """Return the steps whose values this one reads, in the order it names them, each once."""
        found: dict[int, None] = {}
        map_refs(lambda ref: found.setdefault(ref.step), (self.args, self.kwargs))
        return list(found)

    def replace(self, old: int, new: Any) -> None:
        """Read ``new``, another :class:`Ref` or a constant, wherever ``old`` was read."""

        def swap(ref: Ref) -> Any:
            return new if ref.step == old else ref

        self.args, self.kwargs = map_refs(swap, self.args), map_refs(swap, self.kwargs)

    def compiled(self) -> Callable[[Environment], Any]:
        """Return a function from the environment to this step's value."""
        return compile_call(self.target, self.is_method, self.args, self.kwargs)


def function_name(target: Any) -> str:
    """Return a function's plain name; an ATen overload is called by its operator, ``add`` for ``aten.add.Tensor``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    name: str = getattr(target, "__name__", type(target).__name__).strip("_")
    # y += x is the layer "add" to the user, whether it reuses y's memory or not.
    return name[1:] if getattr(target, "__module__", "") == "_operator" and name in _IN_PLACE else name


_IN_PLACE = {"iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"} | {
    "ilshift",
    "irshift",
}


def map_refs(change: Callable[[Ref], Any], args: Any) -> Any:
    """Return ``args`` with every :class:`Ref` in it, at any depth, replaced by ``change(ref)``."""
    if isinstance(args, Ref):
        return change(args)
    if isinstance(args, (tuple, list)):
        parts = [map_refs(change, a) for a in args]
        if isinstance(args, tuple) and hasattr(args, "_fields"):
            return type(args)(*parts)
        return type(args)(parts) if type(args) in (tuple, list) else tuple(parts)
    if isinstance(args, dict):
        return {key: map_refs(change, a) for key, a in args.items()}
    if isinstance(args, slice):
        return slice(*(map_refs(change, a) for a in (args.start, args.stop, args.step)))
    return args


def compile_call(
    target: Any, is_method: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Environment], Any]:
    """Return ``environment → target(*args, **kwargs)`` with every :class:`Ref` looked up in the environment.

    The source of each argument *shape* is compiled once and shared by all calls of that shape, in all graphs.
    """
    slots: list[int] = []
    constants: list[Any] = []

    def source(value: Any) -> str:
        if isinstance(value, Ref):
            slots.append(value.step)
            return f"e[i{len(slots) - 1}]"
        if type(value) is tuple and contains_ref(value):
            return "(" + "".join(source(v) + "," for v in value) + ")"
        if type(value) is list:
            return "[" + ",".join(source(v) for v in value) + "]"
        if type(value) is dict and contains_ref(value):
            constants.append(tuple(value))
            keys = f"c{len(constants) - 1}"
            return f"dict(zip({keys},({''.join(source(v) + ',' for v in value.values())})))"
        if isinstance(value, slice) and contains_ref((value.start, value.stop, value.step)):
            return f"slice({source(value.start)},{source(value.stop)},{source(value.step)})"
        constants.append(value)
        return f"c{len(constants) - 1}"

    positional = [source(a) for a in args]
    named = [f"{key}={source(a)}" for key, a in kwargs.items()]
    if is_method:
        call = f"{positional[0]}.{target}({','.join(positional[1:] + named)})"
    else:
        call = f"f({','.join(positional + named)})"
    return _call_factory(call, len(slots), len(constants))(None if is_method else target, *slots, *constants)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4096)
def _call_factory(call: str, slots: int, constants: int) -> Callable[..., Any]:
    names = ["f", *(f"i{i}" for i in range(slots)), *(f"c{i}" for i in range(constants))]
    # Only names made here and the fixed forms of ``compile_call`` stand in the text; values come as arguments.
    return eval(f"lambda {','.join(names)}: lambda e: {call}")  # type: ignore[no-any-return]  # noqa: S307


def returning_first(target: Any, is_method: bool) -> Callable[..., Any]:
    """Return ``target`` made to return its first argument, which it overwrites."""

    def call(first: Any, *rest: Any, **named: Any) -> Any:
        (getattr(first, target) if is_method else functools.partial(target, first))(*rest, **named)
        return first

    call.__name__ = target if is_method else function_name(target)
    return call


def contains_ref(args: Any) -> bool:
    """Return whether a :class:`Ref` stands anywhere in ``args``."""
    found: list[Ref] = []
    map_refs(found.append, args)
    return bool(found)


def number_to_tensor(value: bool | int | float | Sequence[int]) -> torch.Tensor:
    """Return a Python number, or a sequence of ints such as ``torch.Size``, as the tensor that carries it."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else torch.int64)


def restorer(value: Any) -> Callable[[torch.Tensor], Any] | None:
    """Return what turns the tensor that carries a number, or a sequence of ints, back into it; None for other
    values."""
    if isinstance(value, (bool, int, float)):
        return lambda t: t.item()
    if isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
        kind = type(value)
        return lambda t: kind(t.tolist())
    return None


def plain(value: Any) -> Any:
    """Return fx's immutable lists and dicts as ordinary ones, which is what the eager model passes."""
    if isinstance(value, tuple):
        parts = [plain(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def unique(name: str, taken: Collection[str]) -> str:
    """The second layer that would be called ``relu`` is ``relu_1``, as in torchvision's feature extraction."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
