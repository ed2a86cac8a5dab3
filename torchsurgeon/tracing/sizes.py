"""Numbers that a model reads off tensors while it is recorded: its sizes, mostly.

A stand-in has the number's value and is followed: arithmetic with it, and calls that take it, become steps. Wherever
Python needs the number itself (a comparison, ``range``, a key of a dict), the recorder notes what was found, so that a
call with tensors of other sizes, for which it would be something else, is not answered by this trace.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch

from torchsurgeon.tracing.step import Ref


class Follower(Protocol):
    """Follows the numbers of a model that is recorded."""

    def number_step(self, target: Any, args: tuple[Any, ...]) -> Ref:
        """Make the step that computes a number."""

    def decided(self, found: Any, test: Callable[[Any, Any], Any], other: Any) -> Any:
        """Return what a comparison of a number gives, and note that the model's path depends on it."""


class Number:
    """A number that stands for the value of a step.

    Attributes:
        recorder: who follows it.
        target: what computes it.
        args: the arguments of ``target``, with numbers and references among them.
        value: what it is in the example.
        by_value: whether it depends on the elements of tensors, and not only on their sizes.
    """

    recorder: Follower
    target: Any
    args: tuple[Any, ...]
    value: Any
    by_value: bool
    _ref: Ref | None

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __copy__(self) -> Any:
        return self

    def ref(self) -> Ref:
        """Return a reference to the step that gives this number; the step is made when first asked for."""
        if self._ref is None:
            self._ref = self.recorder.number_step(self.target, self.args)
        return self._ref

    def known(self) -> Any:
        """Return the value, and have the recorder note that the model's path depends on it."""
        return self.recorder.decided(self, operator.eq, None)


def number(recorder: Follower, value: Any, target: Any, args: tuple[Any, ...], by_value: bool, kind: type) -> Any:
    """Return the stand-in for a number.

    Args:
        recorder: who follows it.
        value: the number in the example.
        target: what computes it.
        args: the arguments of ``target``.
        by_value: whether it depends on the elements of tensors.
        kind: ``int``, ``float`` or ``bool``.
    """
    made: Any = object.__new__({int: Int, float: Float}.get(kind, Truth))
    made.recorder, made.target, made.args, made._ref = recorder, target, args, None
    made.value, made.by_value = value, by_value
    return made


def computed(target: Callable[..., Any], *args: Any) -> Any:
    """Return what ``target`` gives for numbers of which at least one is a stand-in, as a stand-in."""
    first = next(a for a in args if isinstance(a, Number))
    by_value = any(a.by_value for a in args if isinstance(a, Number))
    values = [a.value if isinstance(a, Number) else a for a in args]
    value = target(*values)
    if type(value) is tuple:
        # divmod
        pair = number(first.recorder, None, target, args, by_value, bool)
        return tuple(
            number(first.recorder, v, operator.getitem, (pair, i), by_value, type(v)) for i, v in enumerate(value)
        )
    if type(value) not in (int, float):
        for a in args:
            if isinstance(a, Number):
                a.known()
        return value
    return number(first.recorder, value, target, args, by_value, type(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or type(value) in (int, float, bool)


def _arithmetic(target: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        return computed(target, other, self) if swapped else computed(target, self, other)

    return method


def _compared(test: Callable[[Any, Any], bool]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        return self.recorder.decided(self, test, other)

    return method


_MESSAGES = frozenset(
    "_assert print warn warning info debug error exception critical log".split()  # noqa: SIM905
)


def in_a_message(frame: types.FrameType) -> bool:
    """Return whether the statement that a frame is in only warns, prints or logs, or is a ``torch._assert``."""
    return frame.f_lineno in _message_lines(frame.f_code)


@functools.lru_cache(maxsize=1024)
def _message_lines(code: types.CodeType) -> frozenset[int]:
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    messages: set[int] = set()
    others: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        name = getattr(call.func, "attr", getattr(call.func, "id", "")) if call is not None else ""
        # Of a statement with others inside, only its own beginning counts; they may stand on the same line.
        inside = getattr(node, "body", None)
        last = inside[0].lineno - 1 if inside else node.end_lineno or node.lineno
        lines_of_it = range(node.lineno, max(last, node.lineno) + 1)
        (messages if name in _MESSAGES else others).update(line + first - 1 for line in lines_of_it)
    return frozenset(messages - others)


def _alone(target: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *rest: computed(target, self, *rest)


def _shown(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method for the text of a number, which decides nothing where it only goes into a message."""
    return lambda self, *rest: convert(self.value if in_a_message(sys._getframe(1)) else self.known(), *rest)


def _hash(self: Number) -> int:
    # einops remembers what it did by shape, unless a shape cannot be hashed; then its batch and sizes stay free.
    if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "einops":
        raise TypeError("unhashable type: a size that is followed")
    return hash(self.known())


def _read(convert: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *rest: convert(self.known(), *rest)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor"):
    _target = getattr(operator, _name)
    setattr(Number, f"__{_name.strip('_')}__", _arithmetic(_target))
    setattr(Number, f"__r{_name.strip('_')}__", _arithmetic(_target, swapped=True))
for _name, _swapped in {"divmod": False, "rdivmod": True}.items():
    setattr(Number, f"__{_name}__", _arithmetic(divmod, _swapped))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _compared(getattr(operator, _name)))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Number, f"__{_name}__", _alone(getattr(operator, _name)))
_converters: dict[str, Callable[..., Any]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
    "round": round,
}
for _name, _target in _converters.items():
    setattr(Number, f"__{_name}__", _alone(_target))
_converters = {"bool": bool, "int": int, "float": float, "complex": complex}
for _name, _target in _converters.items():
    setattr(Number, f"__{_name}__", _read(_target))
Number.__hash__ = _hash  # type: ignore[assignment, method-assign]
_converters = {"str": str, "repr": repr, "format": format}
for _name, _target in _converters.items():
    setattr(Number, f"__{_name}__", _shown(_target))
for _name in ("bit_length", "is_integer", "as_integer_ratio"):
    setattr(Number, _name, _read(operator.methodcaller(_name)))


# NumPy asks the objects that it computes with for these.
Number.item = lambda self: self  # type: ignore[attr-defined]
Number.sqrt = _alone(math.sqrt)  # type: ignore[attr-defined]


class Int(Number, torch.SymInt):
    """An ``int``. PyTorch takes it where it takes sizes, because it is a subclass of PyTorch's own symbolic int.

    A subclass of ``int`` could not tell who reads it; so this class only says that it is one.
    """

    __class__ = property(lambda self: int)
    __index__ = _read(operator.index)
    real = numerator = property(lambda self: self)
    imag = property(lambda self: 0)
    denominator = property(lambda self: 1)


class Float(Number, torch.SymFloat):
    """A ``float``, likewise."""

    __class__ = property(lambda self: float)
    real = property(lambda self: self)
    imag = property(lambda self: 0.0)


class Truth(Number):
    """A ``bool``, such as ``item()`` of a tensor of them."""

    __class__ = property(lambda self: bool)
