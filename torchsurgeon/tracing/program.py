"""The steps of a model while it is recorded: which step gave which tensor, number or object."""

from __future__ import annotations

import builtins
import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.call import Output, check_result
from torchsurgeon.tracing.following import is_following
from torchsurgeon.tracing.guards import MOST_VALUE_STEPS, Guards
from torchsurgeon.tracing.shapes import (
    MetaModel,
    Propagation,
    RealModel,
    drifting,
    dry_run,
    storage_of,
    tensors_in,
    without_elements,
)
from torchsurgeon.tracing.sizes import Number, number
from torchsurgeon.tracing.step import Constant, ModelDevice, Ref, Step, map_refs
from torchsurgeon.tracing.structure import flatten
from torchsurgeon.tracing.unfollowed import NeedsElements, Refusal, keeps_state

_IN_PLACE = frozenset(
    ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
)
# Of these calls' tensors only the sizes, dtype and device count: of all, or of all but the first.
_OF_NO_ARGUMENT = frozenset(
    (
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
    )
)
_OF_FIRST_ARGUMENT = frozenset(("type_as", "to", "view_as", "expand_as", "reshape_as", "broadcast_to"))
_PLAIN = frozenset((int, float, bool, str, complex, bytes, type(None), type(...), Ref, torch.dtype))


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments: tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_within(one)
    elif isinstance(value, dict):
        yield from tensors_within(list(value.values()))


class Assumed(NamedTuple):
    """What is taken for granted while a model is recorded that takes its path by the values of tensors.

    Attributes:
        compiling: whether ``torch.compiler.is_compiling()`` is true, where many models ask for no values.
        values: whether tests of input values are guards of each call.
    """

    compiling: bool = False
    values: bool = False


NOTHING = Assumed()


class Program:
    """The steps recorded so far, and which of them gave what the model holds now.

    Args:
        model: the model.
        source: the model with meta tensors, or the real one.
        earlier: what was recorded of an earlier call, after which the model is called again.

    Attributes:
        steps: the program.
        propagation: what each step gave.
        guards: what the model's path depends on.
        places: by identity, each followed tensor or object, which step gave it, and where in that step's value it lies.
            The tensors are held, so that no other gets the same identity.
        owners: by memory, the names of the model's own tensors; empty for constants.
        stack: the path of the module that runs, below those of the modules around it.
        refusal: the first thing that left no trace.
        failed_in: the path of the innermost module in which that was.
        assumed: what is taken for granted, so that values decide nothing.
        example: the tensors that the model is called with.
        left: the names of what the call left in the model.
        read_cache: whether the model read something that an earlier call left, and that is the same in every call.
    """

    def __init__(self, model: nn.Module, source: MetaModel, earlier: Program | None = None) -> None:
        super().__init__()
        self.model, self.source = model, source
        self.real = isinstance(source, RealModel)
        self.propagation = Propagation(source)
        self.steps: list[Step] = []
        self.guards = Guards(self.steps)
        self.thread = threading.get_ident()
        self.paused = 0
        self.stack: list[str] = [""]
        self.failed_in: str | None = None
        self.refusal: BaseException | None = None
        self.places: dict[int, tuple[Any, int, tuple[str, ...]]] = {}
        self.owners: dict[int, str] = {}
        self.earlier, self.read_cache = earlier, False
        self.left: list[str] = []
        self._taken: set[str] = set()
        self._counted: dict[str, int] = {}
        self._selected: dict[tuple[int, tuple[str, ...]], Ref] = {}
        self._attributes: dict[str, Ref] = {}
        self._constants: dict[int, tuple[torch.Tensor, Ref]] = {}
        self.stored: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.stored.setdefault(id(tensor), name)
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
        self._device_ref: Ref | None = None
        self._known_on_meta: dict[int, bool] = {}
        self.assumed = NOTHING
        self.example: Sequence[torch.Tensor] = ()

    def add(self, kind: str, name: str, target: Any, args: Any = (), kwargs: Any = None, path: str = "") -> Step:
        """Append a step; a call gets a name of its own."""
        step = Step(len(self.steps), name, kind, target, args, kwargs or {}, path)
        if kind == "call":
            base = name or ".".join(filter(None, (path, step.type_name)))
            step.name = self._unique(base)
        self._taken.add(step.name)
        self.steps.append(step)
        return step

    def _unique(self, name: str) -> str:
        """Return what ``step.unique()`` returns, without counting from the start each time."""
        count = self._counted.get(name, 0)
        while (candidate := f"{name}_{count}" if count else name) in self._taken:
            count += 1
        self._counted[name] = count
        return candidate

    def input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Append the step of an input, and return what stands for it."""
        step = self.add("input", name, name.replace(".", "_"))
        try:
            made: torch.Tensor = self.propagation.input(step, tensor)
        except Exception as error:
            # There are no quantized tensors without elements.
            raise self.needs_elements(error) from error
        self.places[id(made)] = (made, step.index, ())
        return made

    def output(self, result: Any) -> None:
        """Append the last step, which gives the model's result."""
        check_result(self.model, result, lambda leaf: isinstance(leaf, Number) or id(leaf) in self.places)
        leaves, structure = flatten(result)
        computed = {path: self.ref(leaf) for path, leaf in leaves if isinstance(leaf, (torch.Tensor, Number))}
        for path, leaf in leaves:
            if isinstance(leaf, torch.Size) and any(isinstance(size, Number) for size in leaf):
                step = self.add("call", "", torch.Size, (list(self.arguments(tuple(leaf))),))
                self.run_last(step)
                computed[path] = Ref(step.index)
            elif path not in computed and id(leaf) in self.places:
                computed[path] = self.ref(leaf)
        fixed = {path: leaf for path, leaf in leaves if path not in computed}
        paths = tuple(path for path, _ in leaves if path in computed)
        step = self.add("output", "output", Output(structure, paths, fixed), tuple(computed[path] for path in paths))
        self.propagation.output(step)

    def refuse(self, reason: str) -> Refusal:
        """Return the error to raise for something that leaves no trace; it counts even where the model catches it."""
        refusal = Refusal(reason)
        if self.refusal is None:
            self.refusal = refusal
            self.failed_in = self.stack[-1]
        return refusal

    def needs_elements(self, error: BaseException) -> BaseException:
        """Return the error to raise where a call failed on tensors without elements."""
        if self.real:
            return error
        needed = error if isinstance(error, NeedsElements) else NeedsElements(str(error))
        if self.refusal is None or not isinstance(self.refusal, NeedsElements):
            self.refusal = needed
        return needed

    def follows(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor was made in this call from the model's inputs, or by PyTorch."""
        return id(tensor) in self.places

    def place(self, value: Any, step: int, path: tuple[str, ...] = ()) -> None:
        """Note that a step gave a tensor or an object, as its value or at ``path`` in it."""
        self.places[id(value)] = (value, step, path)

    def ref(self, value: Any) -> Ref:
        """Return a reference to the step that gives a tensor, a number or an object."""
        if isinstance(value, Number):
            return value.ref()
        place = self.places.get(id(value))
        if place is not None:
            return self.select(place[1], place[2])
        if not isinstance(value, torch.Tensor):
            raise self.refuse(f"an object of the class {type(value).__name__} is passed on")
        name = self.stored.get(id(value))
        if name is not None:
            if name not in self._attributes:
                step = self.add("attr", name, name)
                self._own(self.propagation.attribute(step), name)
                self._attributes[name] = Ref(step.index)
            return self._attributes[name]
        kept = self._kept_by_an_earlier_call(value)
        if kept is not None:
            if kept.depends(id(value)):
                raise TraceError(keeps_state(self.model, self._where_kept(value)))
            self.read_cache = True
        elif value.device.type == "meta" and not self.real and not self._model_on_meta():
            raise self.refuse(
                "a tensor comes out of a call that leaves no trace (TorchScript, functorch, nn.Parameter of a result)"
            )
        if id(value) not in self._constants:
            step = self.add("attr", self._unique("constant"), Constant(value))
            self._own(self.propagation.attribute(step), "")
            self._constants[id(value)] = (value, Ref(step.index))
        return self._constants[id(value)][1]

    def _own(self, tensor: torch.Tensor, name: str) -> None:
        """Note that a tensor's memory is the model's."""
        if tensor.layout is torch.strided:
            self.owners[storage_of(tensor)] = name

    def _kept_by_an_earlier_call(self, value: torch.Tensor) -> Program | None:
        earlier = self.earlier
        while earlier is not None and id(value) not in earlier.places:
            earlier = earlier.earlier
        return earlier

    def depends(self, identity: int) -> bool:
        """Return whether a followed tensor depends on the elements of the model's inputs, and not only on sizes."""
        shapes = self.propagation.shapes
        depends: set[int] = set()
        written: set[int] = set()
        for step in self.steps[: len(shapes.values)]:
            tensors = tensors_in(shapes.values[step.index])
            if not tensors and step.target != "item" and step.kind != "input":
                continue
            uses = step.uses()
            name = step.target if step.is_method else getattr(step.target, "__name__", "")
            if name in _OF_NO_ARGUMENT:
                uses = []
            elif name in _OF_FIRST_ARGUMENT:
                uses = uses[:1]
            if step.kind == "input" or any(i in depends for i in uses) or step.index in shapes.random:
                depends.add(step.index)
                written |= shapes.overwrites[step.index]
        held, index, _ = self.places[identity]
        return index in depends or storage_of(held) in written

    def _model_on_meta(self) -> bool:
        return self.device is not None and self.device.type == "meta"

    def _where_kept(self, value: torch.Tensor) -> list[str]:
        return [
            f"{path}.{key}".lstrip(".")
            for path, module in self.model.named_modules()
            for key, held in module.__dict__.items()
            if held is value
            or (isinstance(held, (dict, list, tuple)) and any(t is value for t in tensors_within(held)))
        ] or (self.earlier.left if self.earlier else [])

    def select(self, step: int, path: tuple[str, ...]) -> Ref:
        """Return a reference to a leaf of a step's value; the steps that take it out are made when first needed."""
        if not path:
            return Ref(step)
        if (step, path) not in self._selected:
            inner = self.select(step, path[:-1])
            structure = flatten(self.propagation.shapes.values[step])[1].at(path[:-1])
            key = structure.keys[[str(k) for k in structure.keys].index(path[-1])]
            target = builtins.getattr if structure.is_by_attribute else operator.getitem
            made = self.add("call", "getitem", target, (inner, key))
            self.propagation.call(made)
            self._selected[(step, path)] = Ref(made.index)
        return self._selected[(step, path)]

    def number_step(self, target: Any, args: tuple[Any, ...]) -> Ref:
        """Make the step that computes a number.

        Args:
            target: what computes it.
            args: its arguments, with numbers among them.
        """
        with self.unfollowing():
            given = self.arguments(args)
            step = self.add("call", "", target, given, path=self.stack[-1])
            self.propagation.call(step)
        return Ref(step.index)

    @contextlib.contextmanager
    def unfollowing(self) -> Iterator[None]:
        """Make calls of PyTorch that are not the model's."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def decided(self, found: Number, test: Callable[[Any, Any], Any], other: Any) -> Any:
        """Return what a comparison of a number gives, and note that the model's path depends on it.

        Args:
            found: the number.
            test: the comparison.
            other: what it is compared with; None where the number itself decides.
        """
        if not is_following(self):
            # Outside of the recorded call, in a message or a debugger.
            right = other.value if isinstance(other, Number) else found.value if other is None else other
            return found.value if other is None else test(found.value, right)
        if found.by_value or (isinstance(other, Number) and other.by_value):
            if self.assumed.values:
                # Where Python needs the number itself, it is compared with what it is in the example.
                known = self.tested(test, (found, found.value if other is None else other), {})
                if known is not None:
                    return found.value if other is None else known
            raise self.refuse("what it does depends on the values of a tensor")
        for one in (found, other):
            if self.real and isinstance(one, Number) and not self._of_sizes(one.ref()):
                raise self.refuse("what it does depends on a size that the values of a tensor decide")
        if other is None:
            self.guards.equal(found.ref(), found.value)
            return found.value
        right = other.value if isinstance(other, Number) else other
        result = test(found.value, right)
        self.guards.test(test, self.arguments((found, other)), result)
        return result

    def decides(self, target: str | Constant) -> None:
        """Note that the model's path depends on the elements of one of its tensors, or of a constant."""
        if isinstance(target, str):
            self.guards.stored.add(target)
        else:
            self.guards.constants[id(target.tensor)] = target.tensor

    def _of_sizes(self, ref: Ref) -> bool:
        """Return whether a step can be run on tensors without elements."""
        if ref.step not in self._known_on_meta:
            values: list[Any] = [None] * len(self.steps)
            needed = {ref.step}
            for step in reversed(self.steps[: ref.step + 1]):
                if step.index in needed:
                    needed.update((*step.uses(), *step.after))
                if step.kind == "input" and step.index in needed:
                    values[step.index] = without_elements(self.propagation.shapes.values[step.index])
            try:
                with self.unfollowing():
                    dry_run([self.steps[i] for i in sorted(needed)], values, MetaModel(self.model))
                self._known_on_meta[ref.step] = True
            except Exception:
                self._known_on_meta[ref.step] = False
        return self._known_on_meta[ref.step]

    def arguments(self, value: Any) -> Any:
        """Return arguments with references in the place of followed tensors, numbers and objects."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, (torch.Tensor, Number)):
            return self.ref(value)
        if id(value) in self.places and self.places[id(value)][0] is value:
            return self.ref(value)
        if isinstance(value, torch.Size):
            return tuple(map(self.arguments, value)) if any(isinstance(v, Number) for v in value) else value
        if isinstance(value, (tuple, list)):
            parts = [self.arguments(v) for v in value]
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*parts)
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, Number):
                    key.known()
            return {key: self.arguments(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.arguments(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device) and value == self.device:
            return self._device()
        if any(isinstance(leaf, (torch.Tensor, Number)) for _, leaf in flatten(value)[0]):
            raise self.refuse(f"an object of the class {type(value).__name__} that holds tensors is passed on")
        return value

    def _device(self) -> Ref:
        if self._device_ref is None:
            step = self.add("call", "device", ModelDevice(self.model))
            self.propagation.call(step)
            self._device_ref = Ref(step.index)
        return self._device_ref

    def refuse_writing_to_the_model(self, step: Step, args: Any, kwargs: Any) -> None:
        """Raise for a call that overwrites the model's own tensors, before it does so."""
        name = step.target if step.is_method else getattr(step.target, "__name__", "")
        written = [kwargs["out"]] if kwargs.get("out") is not None else []
        if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("inplace") is True:
            written += args[:1]
        for tensor in tensors_within(written):
            owner = self.owners.get(storage_of(self._lowered(tensor))) if tensor.layout is torch.strided else None
            if owner is not None:
                what = "a tensor that is the same in every call" if owner == "" else f"the model's own {owner!r}"
                raise drifting(step, what)

    def _lowered(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.follows(tensor) else self.source.tensor(tensor)

    def run_last(self, step: Step) -> Any:
        """Run the step that was made last; it is taken back where that fails."""
        try:
            return self.propagation.call(step)
        except TraceError:
            raise
        except Exception as error:
            if not self.real and self._with_numbers(step):
                with contextlib.suppress(Exception):
                    return self.propagation.call(step)
            self.steps.pop()
            self._taken.discard(step.name)
            self._counted.clear()
            raise self.needs_elements(error) from error

    def _with_numbers(self, step: Step) -> bool:
        """Give a step numbers in the place of tensors of one element that are the same in every call; say if any are.

        The call may only want the number, such as a stride that is kept in a buffer.
        """
        found = False
        for index in step.uses():
            value, source = self.propagation.shapes.values[index], self.steps[index]
            elements = None
            if isinstance(value, torch.Tensor) and value.dim() == 0 and source.kind == "attr":
                elements = RealModel(self.model).attribute(source.target)
                self.decides(source.target)
            elif isinstance(value, torch.Tensor) and value.dim() == 0:
                elements = self.elements_of(value)
            if elements is not None:
                step.replace(index, elements.item())
                found = True
        return found

    def numbered(self, value: Any, step: int, path: tuple[str, ...], by_value: bool) -> Any:
        """Return the stand-in for a number that a step gave."""
        made = number(self, value, None, (), by_value, type(value))
        if path:
            recorder = self
            made.__dict__["ref"] = lambda: recorder.select(step, path)
        else:
            made._ref = Ref(step)
        return made

    def tested(self, test: Callable[..., Any], args: Any, kwargs: Any) -> bool | None:
        """Return what a test of values gives, and note it as a guard; None where no guard can tell it in each call.

        It can where the values are computed in a few steps from whole or truth-valued inputs, which is quick.

        Args:
            test: what is called.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        shapes = self.propagation.shapes
        written = {storage for overwritten in shapes.overwrites for storage in overwritten}
        with self.unfollowing():
            given, named = self.arguments(args), self.arguments(kwargs)
            needed: set[int] = set()
            map_refs(lambda ref: needed.add(ref.step), (given, named))
            for step in reversed(self.steps):
                if step.index not in needed:
                    continue
                needed.update(step.uses())
                tensors = tensors_in(shapes.values[step.index])
                if (
                    len(needed) > MOST_VALUE_STEPS
                    or step.is_module
                    or step.index in shapes.random
                    or any(t.is_floating_point() or t.is_complex() or storage_of(t) in written for t in tensors)
                ):
                    return None
            environment: list[Any] = [None] * len(self.steps)
            inputs, real = iter(self.example), RealModel(self.model)
            for step in self.steps:
                if step.kind == "input":
                    environment[step.index] = next(inputs)
                elif step.index in needed and step.kind == "attr":
                    environment[step.index] = real.attribute(step.target)
                    self.decides(step.target)
                elif step.index in needed:
                    environment[step.index] = step.compiled()(environment)
            got, by_name = map_refs(lambda ref: environment[ref.step], (given, named))
            result = bool(test(*got, **by_name))
        return result if self.guards.value(test, given, named, result) else None

    def elements_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor with its elements where these depend on nothing that a call is given; None elsewhere.

        The steps that lead to it are run for real. Where the model's own tensors go into it, the trace holds as long as
        they stay the same.
        """
        if self.real and not self.follows(tensor):
            return tensor
        shapes = self.propagation.shapes
        written = {storage for overwritten in shapes.overwrites for storage in overwritten}
        if storage_of(tensor) in written:
            return None
        place = self.places.get(id(tensor))
        if place is None:
            return None
        needed = {place[1]}
        sizes: list[int] = []
        for step in reversed(self.steps):
            if step.index not in needed:
                continue
            if step.kind == "input" or step.index in shapes.random or step.target == "item":
                return None
            if step.kind == "call" and not tensors_in(shapes.values[step.index]):
                sizes.append(step.index)
            else:
                needed.update(step.uses())
        for index in sizes:
            if not isinstance(shapes.values[index], torch.device):
                self.guards.equal(Ref(index), shapes.values[index])
        real = RealModel(self.model)
        environment: list[Any] = [None] * len(self.steps)
        with self.unfollowing():
            for step in self.steps:
                if step.index not in needed:
                    continue
                if step.index in sizes:
                    known = shapes.values[step.index]
                    environment[step.index] = self.device if isinstance(known, torch.device) else known
                elif step.kind == "attr":
                    environment[step.index] = real.attribute(step.target)
                    self.decides(step.target)
                else:
                    environment[step.index] = step.compiled()(environment)
        found: torch.Tensor = environment[place[1]]
        return dict(flatten(found)[0])[place[2]] if place[2] else found
