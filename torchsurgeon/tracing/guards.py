"""What a model's path through its source depends on besides values: sizes that it compares, counts, loops over.

A trace holds for all calls in which these are what they were in the example. Guards tell whether they are, by running
the steps that they need on meta tensors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import short
from torchsurgeon.tracing.shapes import MetaModel, dry_run, without_elements
from torchsurgeon.tracing.step import Environment, Ref, Step, map_refs
from torchsurgeon.tracing.structure import flatten

_MOST_KNOWN = 256
MOST_VALUE_STEPS, _MOST_VALUE_TESTS = 64, 32
_SIGNS = {"eq": "", "ne": "other than", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_NEGATED = {"eq": "other than", "ne": "", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}


class Guards:
    """The guards of one recorded model.

    Attributes:
        layouts: whether the path depends on the strides of tensors, too.
        stored: the names of the model's own tensors whose elements the path depends on.
        constants: other tensors whose elements it depends on, by identity.
        formed: the names of the model's own tensors whose dtype or sizes the code reads.
        asked: what the model asks of its caller's gradient mode; see ``gradients``.
        values: tests of the values of whole or truth-valued inputs, as ``mask.all()``: what is called, with which
            arguments, and what it gave for the example.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._tests: dict[str, tuple[Callable[..., Any], Any, Any]] = {}
        self._structures: dict[int, Any] = {}
        self.layouts = False
        self.stored: set[str] = set()
        self.constants: dict[int, torch.Tensor] = {}
        self.formed: set[str] = set()
        self.asked: set[str] = set()
        self.values: list[tuple[Callable[..., Any], Any, Any, bool]] = []
        self._value_calls: list[tuple[int, Callable[[Environment], Any]]] | None = None
        self._known: dict[Any, str] = {}

    def __bool__(self) -> bool:
        return bool(self._tests or self._structures)

    def equal(self, ref: Ref, value: Any) -> None:
        """Hold for calls in which a step gives this value."""
        self.test(operator.eq, (ref, value), True)

    def test(self, test: Callable[..., Any], args: Any, result: Any) -> None:
        """Hold for calls in which a test of steps' values gives this result."""
        self._tests.setdefault(f"{test.__name__}{args}", (test, args, result))

    def structure(self, step: int, structure: Any) -> None:
        """Hold for calls in which a step gives as many tensors as in the example."""
        self._structures[step] = structure

    def check(self, source: MetaModel, tensors: Sequence[torch.Tensor]) -> None:
        """Check that the path would be the same for these input tensors.

        Args:
            source: the model with meta tensors.
            tensors: the model's input tensors, of which only shapes and strides matter.

        Raises:
            TypeError: it would not be; the message names the size.
        """
        if not self:
            return
        key = tuple([(t.shape, t.stride()) for t in tensors] if self.layouts else [t.shape for t in tensors])
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._wrong(source, tensors)
        if self._known[key]:
            raise TypeError(self._known[key])

    def _wrong(self, source: MetaModel, tensors: Sequence[torch.Tensor]) -> str:
        values: Environment = [None] * len(self._steps)
        given = iter(tensors)
        shapes = ", ".join(short(list(t.shape), 100, quote=False) for t in tensors)
        ask = "trace it again with an example of these sizes"
        try:
            for step in self._steps:
                if step.kind == "input":
                    values[step.index] = without_elements(next(given))
            dry_run(self.needed(), values, source)
        except Exception as error:
            # Mostly because the path is another one, which an earlier step tells.
            for why in self.broken(values):
                return f"{why} ({shapes}); {ask}"
            return f"the model does not run on tensors of these sizes ({shapes}): {short(error)}; {ask}"
        return next((f"{why} ({shapes}); {ask}" for why in self.broken(values)), "")

    def broken(self, values: Environment) -> list[str]:
        """Return what differs from the example, as the beginnings of sentences.

        Args:
            values: by step, what it gives for other tensors.
        """
        begin = "with tensors of these sizes the model takes another path than with the example it was traced with"
        found = []
        for test, args, result in self._tests.values():
            if any(isinstance(arg, Ref) and values[arg.step] is None for arg in args):
                continue
            left, *rest = map_refs(lambda ref: values[ref.step], args)
            if test(left, *rest) == result:
                continue
            what = self._described(args[0])
            if test is operator.eq and result is True:
                found.append(f"{begin}: {what} must be {rest[0]}, and is {left}")
            else:
                must = _NEGATED[test.__name__] if result is False else _SIGNS[test.__name__]
                found.append(f"{begin}: {what} must be {must} {rest[0]}, and is {left}")
        for step, structure in self._structures.items():
            if values[step] is not None and flatten(values[step])[1] != structure:
                found.append(f"{begin}: {short(self._steps[step].name, 80)} gives another number of tensors")
        return found

    def _described(self, value: Any) -> str:
        """Return how a message calls a number: as a dimension of a tensor, or by the step that computes it."""
        if not isinstance(value, Ref):
            return str(value)
        step = self._steps[value.step]
        if step.target is operator.getitem and isinstance(step.args[0], Ref):
            shape = self._steps[step.args[0].step]
            if shape.args and isinstance(shape.args[0], Ref) and ("shape" in shape.args or shape.target == "size"):
                return f"dimension {step.args[1]} of {short(self._steps[shape.args[0].step].name, 80)}"
        if step.target == "size" and len(step.args) == 2:
            return f"dimension {step.args[1]} of {short(self._steps[step.args[0].step].name, 80)}"
        if step.target is len and isinstance(step.args[0], Ref):
            return f"dimension 0 of {short(self._steps[step.args[0].step].name, 80)}"
        return short(step.name, 80)

    def value(self, test: Callable[..., Any], args: Any, kwargs: Any, result: bool) -> bool:
        """Hold for calls in which a test of input values gives this result; return whether there is room for it."""
        if len(self.values) >= _MOST_VALUE_TESTS:
            return False
        self.values.append((test, args, kwargs, result))
        return True

    def check_values(self, model: nn.Module, tensors: Sequence[torch.Tensor]) -> None:
        """Check that the path would be the same for the values of these input tensors.

        Args:
            model: the model.
            tensors: the model's input tensors.

        Raises:
            TypeError: it would not; the message names the test.
        """
        if self._value_calls is None:
            wanted: set[int] = set()
            for _, args, kwargs, _ in self.values:
                map_refs(lambda ref: wanted.add(ref.step), (args, kwargs))
            self._value_calls = [
                (step.index, functools.partial(_read, step, model) if step.kind == "attr" else step.compiled())
                for step in self._leading_to(wanted)
                if step.kind != "input"
            ]
        values: Environment = [None] * len(self._steps)
        given = iter(tensors)
        for step in self._steps[: len(tensors)]:
            values[step.index] = next(given)
        for index, call in self._value_calls:
            values[index] = call(values)
        for test, args, kwargs, result in self.values:
            got, named = map_refs(lambda ref: values[ref.step], (args, kwargs))
            if bool(test(*got, **named)) is not result:
                name = short(self._steps[args[0].step].name, 80) if isinstance(args[0], Ref) else test.__name__
                raise TypeError(
                    "for values like these the model takes another path than with the example it was traced with: the "
                    f"test of {name} must be {result}, and is {not result}; trace it again with an example of such "
                    "values"
                )

    def needed(self) -> list[Step]:
        """Return the steps that the guards read, and those that lead to them."""
        wanted = set(self._structures)
        for _, args, _ in self._tests.values():
            map_refs(lambda ref: wanted.add(ref.step), args)
        return self._leading_to(wanted)

    def _leading_to(self, wanted: set[int]) -> list[Step]:
        for step in reversed(self._steps):
            if step.index in wanted:
                wanted.update((*step.uses(), *step.after))
        return [self._steps[i] for i in sorted(wanted) if self._steps[i].kind != "output"]


def _read(step: Step, model: nn.Module, values: Environment) -> Any:
    return step.attribute_of(model)
