"""The traced model as a straight line of steps.

A ``Step`` is one call in the traced model. It is compiled to a function that takes its arguments from the values of
earlier steps, so running it costs one Python call more than running the eager model does.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.ambient import Ambient
from torchsurgeon.tracing.structure import LEAF, LeafPath, Structure

# The values of all steps of a program while it runs, by step index.
Environment = list[Any]
# One leaf of a step's value: the step's index, and the path in its value (empty when the value is the leaf itself).
Key = tuple[int, LeafPath]


@dataclasses.dataclass(frozen=True)
class Ref:
    """Stands in a step's arguments for the value of an earlier step."""

    step: int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that the model makes in its forward from no input, and that is the same in every call."""

    tensor: torch.Tensor
    __name__ = "constant"

    def __call__(self) -> torch.Tensor:
        """Return the tensor."""
        return self.tensor


@dataclasses.dataclass(frozen=True)
class ModelDevice:
    """Calls return the device that the model is on at that time; head and tail may be on different ones."""

    model: nn.Module
    __name__ = "device"

    def __call__(self) -> torch.device:
        """Return the device of the model's first parameter or buffer, the CPU for a model with neither."""
        tensor = next(iter((*self.model.parameters(), *self.model.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device


@dataclasses.dataclass
class Step:
    """One call in the traced model.

    Attributes:
        index: its place in the program, from 0.
        name: its name, unique in the program.
        kind: ``input`` (a model input), ``attr`` (a parameter, buffer or constant of the model), ``call``, or
            ``output`` (the model's result, always the last step).
        target: what is called or read: a callable, the name of a method, the dotted name of an attribute, or a
            ``Constant``.
        args: the positional arguments, in which ``Ref`` stands for values of earlier steps.
        kwargs: the keyword arguments, likewise.
        module_path: the path of the module that is called, or that calls the function.
        after: steps that must run before this one although it reads no value of theirs: they overwrite memory that it
            reads.
        reads: what ``uses()`` finds, kept once the program is settled.
        structure: how its value is nested.
        ambient: the settings of PyTorch that it runs under; None for those that the model is called under.
        bare: whether only the ``forward`` of the module is called, because its hooks are steps of their own.
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
    ambient: Ambient | None = None
    bare: bool = False

    @property
    def is_module(self) -> bool:
        """Whether it calls one of the model's modules."""
        return isinstance(self.target, nn.Module)

    @property
    def is_method(self) -> bool:
        """Whether it calls a method of its first argument."""
        return self.kind == "call" and isinstance(self.target, str)

    @property
    def type_name(self) -> str:
        """The class of the module, or the name of the function or method, as users know it."""
        if self.is_module:
            return type(self.target).__name__
        return self.target.strip("_") if isinstance(self.target, str) else function_name(self.target)

    def uses(self) -> list[int]:
        """Return the steps whose values this one reads, each once, in the order in which its arguments name them."""
        found: dict[int, None] = {}
        map_refs(lambda ref: found.setdefault(ref.step), (self.args, self.kwargs))
        return list(found)

    def replace(self, old: int, new: Any) -> None:
        """Put something else in the place of an earlier step's value.

        Args:
            old: the index of that step.
            new: a ``Ref`` to another step, or a constant.
        """

        def swap(ref: Ref) -> Any:
            return new if ref.step == old else ref

        self.args, self.kwargs = map_refs(swap, self.args), map_refs(swap, self.kwargs)

    def compiled(self) -> Callable[[Environment], Any]:
        """Return a function from the environment to this step's value."""
        target = self.target.forward if self.bare else self.target
        call = compile_call(target, self.is_method, self.args, self.kwargs)
        return call if self.ambient is None else self.ambient.around(call)

    def attribute_of(self, model: nn.Module) -> Any:
        """Return the attribute of the model, or the constant, that this step reads."""
        return self.target.tensor if isinstance(self.target, Constant) else operator.attrgetter(self.target)(model)

    def under_settings(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that makes a call under the settings that this step runs under."""
        return call if self.ambient is None else self.ambient.around(call)


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
    """Return arguments with every ``Ref`` in them, at any depth, replaced.

    Args:
        change: takes a reference and returns what stands in its place.
        args: the arguments: tuples, lists, dicts and slices of references and constants.
    """
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
    """Return a function that calls ``target`` with its arguments taken from an environment.

    Calls whose arguments have the same form (which are references, which constants, how they are nested) share one
    compiled function, in all graphs; so a large model compiles few.

    Args:
        target: what is called; the name of a method of the first argument if ``is_method``.
        is_method: whether ``target`` names a method.
        args: the positional arguments, in which ``Ref`` stands for values of earlier steps.
        kwargs: the keyword arguments, likewise.
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
    # Safe to evaluate: the text holds only names made above and what ``compile_call`` writes, and every value of the
    # model comes in as an argument.
    return eval(f"lambda {','.join(names)}: lambda e: {call}")  # type: ignore[no-any-return]  # noqa: S307


def returning_first(target: Any, is_method: bool) -> Callable[..., Any]:
    """Return a function that calls ``target`` and then returns its first argument, which ``target`` overwrites."""

    def call(first: Any, *rest: Any, **named: Any) -> Any:
        (getattr(first, target) if is_method else functools.partial(target, first))(*rest, **named)
        return first

    call.__name__ = target if is_method else function_name(target)
    return call


def contains_ref(args: Any) -> bool:
    """Return whether a ``Ref`` stands anywhere in ``args``."""
    found: list[Ref] = []
    map_refs(found.append, args)
    return bool(found)


def number_to_tensor(value: bool | int | float | complex | Sequence[int]) -> torch.Tensor:
    """Return the tensor that carries a number (rank 0), or a sequence of ints such as ``torch.Size`` (rank 1)."""
    if isinstance(value, (float, complex)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.complex128)
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else torch.int64)


def restorer(value: Any) -> Callable[[torch.Tensor], Any] | None:
    """Return the function that turns the tensor which carries a value back into it.

    Args:
        value: a number, or a sequence of ints, as in the traced example.

    Returns:
        The function; None for a value that no tensor carries.
    """
    if isinstance(value, (bool, int, float, complex)):
        return lambda t: t.item()
    if isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
        kind = type(value)
        return lambda t: kind(t.tolist())
    return None


def plain(value: Any) -> Any:
    """Return torch.fx's immutable lists and dicts as ordinary ones, as the eager model passes them."""
    if isinstance(value, tuple):
        parts = [plain(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def clone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides, on which the last bits of some results depend.

    PyTorch's own ``clone`` makes quantized tensors row-major.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if tensor.is_quantized and last is not None and tensor.is_contiguous(memory_format=last):
        return tensor.clone(memory_format=last)
    return tensor.clone()


def unique(name: str, taken: Collection[str]) -> str:
    """Return ``name``, numbered if it is taken: the second ``relu`` is ``relu_1``, as in torchvision's extraction.

    Args:
        name: the name that is wanted.
        taken: the names that are in use.
    """
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
