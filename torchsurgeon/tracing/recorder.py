"""From a model to its steps, by calling it and recording what it calls.

The model is really called, as its user calls it, with tensors on the meta device in place of the example's: ordinary
tensors, so that tests of type, dtype, attributes and sizes take the path that they take in a real call, but without
elements, so that nothing that depends on elements can be read off them unnoticed. Every call of PyTorch becomes a
``Step``, and so does every call of one of PyTorch's own layers. Sizes are followed (see ``sizes``).

Where a call needs the elements of tensors, the model is recorded a second time, with the example's own elements.
"""

from __future__ import annotations

import builtins
import functools
import linecache
import operator
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.adapters import Adapter, adapter_for
from torchsurgeon.tracing.ambient import Ambient, settings
from torchsurgeon.tracing.call import Call, Output
from torchsurgeon.tracing.following import begin, end, follower_here, is_following
from torchsurgeon.tracing.guards import Guards
from torchsurgeon.tracing.operators import Kind, describe
from torchsurgeon.tracing.shapes import (
    MetaModel,
    Propagation,
    RealModel,
    Shapes,
    drifting,
    propagate,
    storage_of,
    tensors_in,
)
from torchsurgeon.tracing.sizes import Number, number
from torchsurgeon.tracing.state import State
from torchsurgeon.tracing.step import Constant, ModelDevice, Ref, Step, unique
from torchsurgeon.tracing.structure import LEAF, flatten

_LIBRARY = str(FilePath(torch.__file__).parent) + os.sep
_THIS_PACKAGE = str(FilePath(__file__).parent) + os.sep
# While one thread follows a model, PyTorch is patched for all of them, so only one does so at a time.
TRACING = threading.Lock()


_IN_PLACE = frozenset(
    ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
)
_PLAIN = frozenset((int, float, bool, str, complex, bytes, type(None), type(...), Ref, torch.dtype))


class UnfollowedError(TraceError):
    """The model cannot be recorded.

    Args:
        message: what the user reads.
        module_path: the innermost module that failed; empty at the root.
        line: the line and the reason in one line, for ``LayerGraph.opaque``.
    """

    def __init__(self, message: str, module_path: str, line: str) -> None:
        super().__init__(message)
        self.module_path, self.line = module_path, line


class _Refusal(Exception):
    """Something that leaves no trace; whoever catches it in the model's own code does not change that."""


class _NeedsElements(Exception):
    """A call cannot be made without the elements of tensors."""


class _NeedsDevice(_NeedsElements):
    """A call gives another dtype on the meta device than on a real one."""


class Recording:
    """A model's steps, and what was found out while it was recorded.

    Attributes:
        steps: the program, inputs first and output last.
        shapes: what every step gave for the example.
        source: the model that gave it: with meta tensors, or the real one.
        whole: by path, the modules that stayed one layer each, and why.
        guards: what the model's path depends on, besides values.
        only_settings: whether the real model was needed only for autocast, which does not act on meta tensors, so that
            no shape depends on values.
    """

    def __init__(
        self, steps: list[Step], shapes: Shapes, source: MetaModel, whole: Mapping[str, str], guards: Guards
    ) -> None:
        self.steps, self.shapes, self.source, self.whole, self.guards = steps, shapes, source, whole, guards
        self.only_settings = False


def record(
    model: nn.Module, call: Call, tensors: Sequence[torch.Tensor], whole: Mapping[str, str], adapter: Adapter | None
) -> Recording:
    """Record a model.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        tensors: the example's tensors, in the order of ``call.names``.
        whole: by path, the modules to keep as one layer each, and why.
        adapter: what is recorded in place of the model's own ``forward``; None for the model itself.

    Raises:
        UnfollowedError: something the model does leaves no trace.
    """
    try:
        return _recorded(model, call, tensors, whole, adapter, MetaModel(model))
    except _NeedsElements as needed:
        recording = _recorded(model, call, tensors, whole, adapter, RealModel(model))
        recording.only_settings = isinstance(needed, _NeedsDevice) and _runs_on_meta(recording, tensors, model)
        return recording


def _runs_on_meta(recording: Recording, tensors: Sequence[torch.Tensor], model: nn.Module) -> bool:
    try:
        shapes = propagate(recording.steps, tensors, MetaModel(model), count_flops=False)
    except Exception:
        return False
    return all(
        [t.shape for t in tensors_in(a)] == [t.shape for t in tensors_in(b)]
        for a, b in zip(shapes.values, recording.shapes.values, strict=True)
    )


def _recorded(
    model: nn.Module,
    call: Call,
    tensors: Sequence[torch.Tensor],
    whole: Mapping[str, str],
    adapter: Adapter | None,
    source: MetaModel,
) -> Recording:
    before = State(model)
    try:
        first = Recorder(model, call, whole, adapter, source)
        recording = first.run(tensors)
        changed = before.changed()
        if changed:
            # What the model left behind is there in the next call. If that does the same, it reads none of it.
            second = Recorder(model, call, whole, adapter, source, earlier=first)
            again = second.run(tensors)
            if not _alike(recording.steps, again.steps):
                # A cache that was filled may be read instead of being computed again, but always the same one.
                third = Recorder(model, call, whole, adapter, source, earlier=second)
                if not second.read_cache or not _alike(again.steps, third.run(tensors).steps):
                    raise TraceError(keeps_state(model, changed))
        return recording
    finally:
        before.restore()


def keeps_state(model: nn.Module, names: Sequence[str]) -> str:
    """Return the message for a model whose calls depend on earlier ones."""
    return (
        f"{type(model).__name__} keeps state between calls: a call reads what an earlier one left in "
        f"{', '.join(map(repr, names[:5]))}, so its answer depends on the calls before, and device and server would "
        "drift apart. Pass the state in and return it, or compute what is kept in __init__"
    )


def _alike(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    """Return whether two programs are the same."""

    def same(a: Step, b: Step) -> bool:
        if isinstance(a.target, Constant) and isinstance(b.target, Constant):
            x, y = a.target.tensor, b.target.tensor
            known = x.shape == y.shape and x.dtype == y.dtype and x.device.type != "meta" != y.device.type
            return x is y or (known and torch.equal(x, y))
        if a.kind == "output":
            return bool(a.args == b.args and a.target.paths == b.target.paths)
        targets = a.target is b.target or a.target == b.target or a.target.__class__ is b.target.__class__
        return (a.name, a.kind, repr(a.args), repr(a.kwargs)) == (
            b.name,
            b.kind,
            repr(b.args),
            repr(b.kwargs),
        ) and targets

    return len(steps) == len(others) and all(map(same, steps, others))


class _Escapes(TorchDispatchMode):
    """Notices operators that run on followed tensors outside of every recorded call, such as those of TorchScript."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        recorder = self.recorder
        if not recorder.paused and any(recorder.follows(t) for t in _tensors([args, kwargs])):
            raise recorder.refuse(
                f"the operator {func} runs outside of what Python can follow (TorchScript, functorch)"
            )
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Recorder(TorchFunctionMode):
    """Follows one call of a model. See ``record()``."""

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        whole: Mapping[str, str],
        adapter: Adapter | None,
        source: MetaModel,
        earlier: Recorder | None = None,
    ) -> None:
        super().__init__()
        self.model, self.model_call, self.whole, self.adapter, self.source = model, call, dict(whole), adapter, source
        self.real = isinstance(source, RealModel)
        self.propagation = Propagation(source)
        self.steps: list[Step] = []
        self.taken: set[str] = set()
        self.guards = Guards(self.steps)
        self.thread = threading.get_ident()
        self.paused = 0
        self.stack: list[str] = [""]
        self.failed_in: str | None = None
        self.refusal: BaseException | None = None
        # By identity: each followed tensor or object, which step gave it, and where in that step's value it lies. The
        # tensors are held, so that no other gets the same identity.
        self.places: dict[int, tuple[Any, int, tuple[str, ...]]] = {}
        self.selected: dict[tuple[int, tuple[str, ...]], Ref] = {}
        self.attributes: dict[str, Ref] = {}
        self.constants: dict[int, tuple[torch.Tensor, Ref]] = {}
        self.earlier, self.read_cache = earlier, False
        # By memory, the names of the model's own tensors; empty for constants.
        self.owners: dict[int, str] = {}
        self.paths: dict[int, str] = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.stored: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.stored.setdefault(id(tensor), name)
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
        self.device_ref: Ref | None = None

    # --- the run ---

    def run(self, tensors: Sequence[torch.Tensor]) -> Recording:
        """Call the model and return what was recorded.

        Args:
            tensors: the example's tensors, in the order of ``call.names``.
        """
        if self.device is None:
            self.device = tensors[0].device
        given: dict[int, Any] = {}
        values = {}
        for path, name, tensor in zip(self.model_call.paths, self.model_call.names, tensors, strict=True):
            made = self._input(name, tensor)
            # One tensor that is passed twice stays one; ``Call`` sees to it that it is so in every call.
            given.setdefault(id(tensor), made)
            values[path] = given[id(tensor)]
        args, kwargs = self.model_call.rebuild(values)
        self.base = settings()
        try:
            with (
                TRACING,
                torch.random.fork_rng(devices=[]),
                torch.inference_mode(False),
                torch.no_grad(),
                self._followed(),
            ):
                self.base = settings()
                result = (
                    self.adapter.forward(self.model, *args, **kwargs) if self.adapter else self.model(*args, **kwargs)
                )
                self._raise_refusal()
                with self._unfollowing():
                    self._output(result)
        except _NeedsElements:
            raise
        except Exception as error:
            if isinstance(self.refusal, _NeedsElements):
                raise self.refusal from error
            raise self._unfollowed(self.refusal or error) from error
        return Recording(self.steps, self.propagation.shapes, self.source, self.whole, self.guards)

    def _raise_refusal(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    @contextmanager
    def _followed(self) -> Iterator[None]:
        called = nn.Module.__call__
        length = builtins.len

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if follower_here() is not self:
                return called(module, *args, **kwargs)
            return self.call_module(module, called, args, kwargs)

        def len_(value: Any) -> Any:
            # Python's own ``len`` would turn a followed size into a plain number.
            if type(value) is torch.Tensor and follower_here() is self and value.dim():
                return value.shape[0]
            return length(value)

        # Functions that a library has asked torch.fx to keep whole stay one layer here, too.
        wrapped = [
            (held, name, held[name])
            for (_, name), held in fx._symbolic_trace._wrapped_fns_to_patch.items()
            if name in held
        ]

        def kept_whole(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def keep(*args: Any, **kwargs: Any) -> Any:
                here = follower_here()
                return function(*args, **kwargs) if here is None else here.call(function, args, kwargs)

            return keep

        begin(self)
        for held, name, function in wrapped:
            held[name] = kept_whole(function)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        builtins.len = len_
        try:
            with _Escapes(self), self:
                yield
        finally:
            for held, name, function in wrapped:
                held[name] = function
            builtins.len = length
            nn.Module.__call__ = called  # type: ignore[method-assign]
            end()

    def _input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        step = self._add("input", name, name.replace(".", "_"))
        made: torch.Tensor = self.propagation.input(step, tensor)
        self.places[id(made)] = (made, step.index, ())
        return made

    def _output(self, result: Any) -> None:
        leaves, structure = flatten(result)
        computed = {path: self._ref(leaf) for path, leaf in leaves if isinstance(leaf, (torch.Tensor, Number))}
        for path, leaf in leaves:
            if isinstance(leaf, torch.Size) and any(isinstance(size, Number) for size in leaf):
                step = self._add("call", "", torch.Size, (list(self._arguments(tuple(leaf))),))
                self._run(step)
                computed[path] = Ref(step.index)
            elif path not in computed and id(leaf) in self.places:
                computed[path] = self._ref(leaf)
        fixed = {path: leaf for path, leaf in leaves if path not in computed}
        paths = tuple(path for path, _ in leaves if path in computed)
        step = self._add("output", "output", Output(structure, paths, fixed), tuple(computed[path] for path in paths))
        self.propagation.output(step)

    # --- steps ---

    def _add(self, kind: str, name: str, target: Any, args: Any = (), kwargs: Any = None, path: str = "") -> Step:
        step = Step(len(self.steps), name, kind, target, args, kwargs or {}, path)
        if kind == "call":
            base = name or ".".join(filter(None, (path, step.type_name)))
            step.name = unique(base, self.taken)
        self.taken.add(step.name)
        self.steps.append(step)
        return step

    def refuse(self, reason: str) -> _Refusal:
        """Return the error to raise for something that leaves no trace; it counts even where the model catches it."""
        refusal = _Refusal(reason)
        if self.refusal is None:
            self.refusal = refusal
            self.failed_in = self.stack[-1]
        return refusal

    def needs_elements(self, error: BaseException) -> BaseException:
        """Return the error to raise where a call failed on tensors without elements."""
        if self.real:
            return error
        needed = error if isinstance(error, _NeedsElements) else _NeedsElements(str(error))
        if self.refusal is None or not isinstance(self.refusal, _NeedsElements):
            self.refusal = needed
        return needed

    def follows(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor was made in this call from the model's inputs, or by PyTorch."""
        return id(tensor) in self.places

    def _place(self, value: Any, step: int, path: tuple[str, ...] = ()) -> None:
        self.places[id(value)] = (value, step, path)

    def _ref(self, value: Any) -> Ref:
        """Return a reference to the step that gives a tensor, a number or an object."""
        if isinstance(value, Number):
            return value.ref()
        place = self.places.get(id(value))
        if place is not None:
            return self._select(place[1], place[2])
        if not isinstance(value, torch.Tensor):
            raise self.refuse(f"an object of the class {type(value).__name__} is passed on")
        name = self.stored.get(id(value))
        if name is not None:
            if name not in self.attributes:
                step = self._add("attr", name, name)
                self._own(self.propagation.attribute(step), name)
                self.attributes[name] = Ref(step.index)
            return self.attributes[name]
        kept = self._kept_by_an_earlier_call(value)
        if kept is not None:
            if kept._depends(id(value)):
                raise TraceError(keeps_state(self.model, self._where_kept(value)))
            self.read_cache = True
        elif value.device.type == "meta" and not self.real and not self._model_on_meta():
            raise self.refuse(
                "a tensor comes out of a call that leaves no trace (TorchScript, functorch, nn.Parameter of a result)"
            )
        if id(value) not in self.constants:
            step = self._add("attr", unique("constant", self.taken), Constant(value))
            self._own(self.propagation.attribute(step), "")
            self.constants[id(value)] = (value, Ref(step.index))
        return self.constants[id(value)][1]

    def _own(self, tensor: torch.Tensor, name: str) -> None:
        """Note that a tensor's memory is the model's."""
        if tensor.layout is torch.strided:
            self.owners[storage_of(tensor)] = name

    def _kept_by_an_earlier_call(self, value: torch.Tensor) -> Recorder | None:
        earlier = self.earlier
        while earlier is not None and id(value) not in earlier.places:
            earlier = earlier.earlier
        return earlier

    def _depends(self, identity: int) -> bool:
        """Return whether a followed tensor depends on the elements of the model's inputs, and not only on sizes."""
        shapes = self.propagation.shapes
        depends: set[int] = set()
        written: set[int] = set()
        for step in self.steps[: len(shapes.values)]:
            tensors = tensors_in(shapes.values[step.index])
            if not tensors and step.target != "item" and step.kind != "input":
                continue
            if step.kind == "input" or any(i in depends for i in step.uses()) or step.index in shapes.random:
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
            if held is value or (isinstance(held, (dict, list, tuple)) and any(t is value for t in _tensors(held)))
        ] or ["an object outside of its modules"]

    def _select(self, step: int, path: tuple[str, ...]) -> Ref:
        """Return a reference to a leaf of a step's value; the steps that take it out are made when first needed."""
        if not path:
            return Ref(step)
        if (step, path) not in self.selected:
            inner = self._select(step, path[:-1])
            structure = flatten(self.propagation.shapes.values[step])[1].at(path[:-1])
            key = structure.keys[[str(k) for k in structure.keys].index(path[-1])]
            target = builtins.getattr if structure.is_by_attribute else operator.getitem
            made = self._add("call", "getitem", target, (inner, key))
            self.propagation.call(made)
            self.selected[(step, path)] = Ref(made.index)
        return self.selected[(step, path)]

    def number_step(self, target: Any, args: tuple[Any, ...]) -> Ref:
        """Make the step that computes a number.

        Args:
            target: what computes it.
            args: its arguments, with numbers among them.
        """
        with self._unfollowing():
            given = self._arguments(args)
            step = self._add("call", "", target, given, path=self.stack[-1])
            self.propagation.call(step)
        return Ref(step.index)

    @contextmanager
    def _unfollowing(self) -> Iterator[None]:
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
            raise self.refuse("what it does depends on the values of a tensor")
        if other is None:
            self.guards.equal(found.ref(), found.value)
            return found.value
        right = other.value if isinstance(other, Number) else other
        result = test(found.value, right)
        self.guards.test(test, self._arguments((found, other)), result)
        return result

    def _arguments(self, value: Any) -> Any:
        """Return arguments with references in the place of followed tensors, numbers and objects."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, (torch.Tensor, Number)):
            return self._ref(value)
        if id(value) in self.places and self.places[id(value)][0] is value:
            return self._ref(value)
        if isinstance(value, torch.Size):
            return tuple(map(self._arguments, value)) if any(isinstance(v, Number) for v in value) else value
        if isinstance(value, (tuple, list)):
            parts = [self._arguments(v) for v in value]
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*parts)
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, Number):
                    key.known()
            return {key: self._arguments(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._arguments(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device) and value == self.device:
            return self._device()
        if any(isinstance(leaf, (torch.Tensor, Number)) for _, leaf in flatten(value)[0]):
            raise self.refuse(f"an object of the class {type(value).__name__} that holds tensors is passed on")
        return value

    def _device(self) -> Ref:
        if self.device_ref is None:
            step = self._add("call", "device", ModelDevice(self.model))
            self.propagation.call(step)
            self.device_ref = Ref(step.index)
        return self.device_ref

    def _ambient(self) -> Ambient | None:
        now = settings()
        return None if now == self.base else Ambient(self.base, now)

    def call(self, target: Any, args: Any, kwargs: Any, *, bare: bool = False, name: str = "") -> Any:
        """Make a call, record it, and return what it gives, followed.

        Args:
            target: a function, a module, or the name of a method of the first argument.
            args: the positional arguments.
            kwargs: the keyword arguments.
            bare: whether only the ``forward`` of a module is called, because its hooks are followed on their own.
            name: the layer's name; empty to make one of the calling module's path and the function's name.
        """
        with self._unfollowing():
            ambient = self._ambient()
            if ambient is not None and ambient.autocasts and not self.real:
                raise self.needs_elements(_NeedsDevice("autocast does not act on meta tensors"))
            given, named = self._arguments(args), self._arguments(kwargs)
            step = self._add("call", name, target, given, named, path=name or self.stack[-1])
            step.ambient, step.bare = ambient, bare
            self._refuse_writing_to_the_model(step, args, kwargs)
            value = self._run(step)
        return self._result(step, value, by_value=self.real and not step.is_module)

    def _refuse_writing_to_the_model(self, step: Step, args: Any, kwargs: Any) -> None:
        """Raise for a call that overwrites the model's own tensors, before it does so."""
        name = step.target if step.is_method else getattr(step.target, "__name__", "")
        written = [kwargs["out"]] if kwargs.get("out") is not None else []
        if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("inplace") is True:
            written += args[:1]
        for tensor in _tensors(written):
            owner = self.owners.get(storage_of(self._lowered(tensor))) if tensor.layout is torch.strided else None
            if owner is not None:
                what = "a tensor that is the same in every call" if owner == "" else f"the model's own {owner!r}"
                raise drifting(step, what)

    def _lowered(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.follows(tensor) else self.source.tensor(tensor)

    def _run(self, step: Step) -> Any:
        """Run the step that was made last; it is taken back where that fails."""
        try:
            return self.propagation.call(step)
        except TraceError:
            raise
        except Exception as error:
            self.steps.pop()
            self.taken.discard(step.name)
            raise self.needs_elements(error) from error

    def _result(self, step: Step, value: Any, by_value: bool) -> Any:
        if isinstance(value, torch.Tensor):
            self._place(value, step.index)
            return value
        leaves, structure = flatten(value)
        if structure is LEAF:
            if type(value) in (int, float, bool):
                return self._numbered(value, step.index, (), by_value)
            if not isinstance(value, (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)):
                self._place(value, step.index)
            return value
        if not step.is_module and isinstance(value, (tuple, list)):
            self.guards.structure(step.index, structure)
        numbers = {}
        for path, leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                self._place(leaf, step.index, path)
            elif type(leaf) in (int, float):
                numbers[path] = self._numbered(leaf, step.index, path, by_value)
        if numbers:
            value = structure.rebuild(dict(leaves) | numbers)
        elif not isinstance(value, (tuple, list, dict)):
            self._place(value, step.index)
        return value

    def _numbered(self, value: Any, step: int, path: tuple[str, ...], by_value: bool) -> Any:
        made = number(self, value, None, (), by_value, type(value))
        if path:
            recorder = self
            made.__dict__["ref"] = lambda: recorder._select(step, path)
        else:
            made._ref = Ref(step)
        return made

    # --- what the model calls ---

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or follower_here() is not self:
            return func(*args, **kwargs)
        self._raise_refusal_again()
        self._refuse_transforms()
        operation = describe(func, args, kwargs)
        if operation.kind is Kind.REFUSED:
            raise self.refuse(operation.reason)
        if operation.kind is Kind.STATIC:
            return self._static(operation.name, func, args, kwargs)
        if operation.kind is Kind.SIZE:
            return self._size(operation.target, operation.args, kwargs)
        if operation.kind is Kind.VALUE:
            return self._value(operation.name, func, args, kwargs)
        return self.call(operation.target, operation.args, kwargs)

    def _refuse_transforms(self) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise self.refuse("torch.func changes what its calls compute")

    def _raise_refusal_again(self) -> None:
        """Stop a model that caught a refusal and goes on."""
        if self.refusal is not None:
            raise self.refusal

    def _static(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what is the same for all values and sizes: dtype, rank, device, and the like."""
        tensor = args[0]
        with self._unfollowing():
            if name in (
                "device",
                "is_cuda",
                "is_cpu",
                "is_meta",
                "is_xpu",
                "is_mps",
                "get_device",
                "type",
                "is_xla",
                "is_hpu",
            ):
                if not self.follows(tensor):
                    return func(*args, **kwargs)
                if self.device is not None:
                    tensor = torch.empty(0, dtype=tensor.dtype, device=self.device)
                return func(tensor, *args[1:], **kwargs)
            return func(*args, **kwargs)

    def _size(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return sizes of a tensor as numbers that are followed."""
        tensor = args[0]
        if not self.follows(tensor):
            # A parameter's sizes are the same in every call.
            with self._unfollowing():
                return getattr(tensor, target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args)
        with self._unfollowing():
            step = self._add("call", "", target, self._arguments(args), self._arguments(kwargs), path=self.stack[-1])
            value = self._run(step)
        if target in ("stride", "storage_offset") or (target is builtins.getattr and args[1] == "strides"):
            self.guards.layouts = True
        if isinstance(value, (tuple, list)):
            numbers = [number(self, v, operator.getitem, (Ref(step.index), i), False, int) for i, v in enumerate(value)]
            return torch.Size(numbers) if isinstance(value, torch.Size) else tuple(numbers)
        if isinstance(value, bool):
            self.guards.layouts = True
            self.guards.equal(Ref(step.index), value)
            return value
        return self._numbered(value, step.index, (), by_value=False)

    def _value(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what is read off a tensor's elements; a model whose path depends on it cannot be followed."""
        tensor = args[0]
        if isinstance(tensor, torch.Tensor) and not self.follows(tensor) and tensor.device.type != "meta":
            # The model's own tensors, and constants, have the same elements in every call.
            with self._unfollowing():
                if id(tensor) in self.stored:
                    self.guards.stored.add(self.stored[id(tensor)])
                return func(*args, **kwargs)
        constant = self._elements(tensor) if isinstance(tensor, torch.Tensor) else None
        if constant is not None:
            with self._unfollowing():
                return func(constant, *args[1:], **kwargs)
        if name == "item":
            if tensor.dtype.is_complex:
                raise self.refuse("the values of a complex tensor are read in Python")
            if self.real:
                with self._unfollowing():
                    step = self._add("call", "", "item", self._arguments(args[:1]), path=self.stack[-1])
                    value = self._run(step)
                return self._numbered(value, step.index, (), by_value=True)
            raise self.needs_elements(RuntimeError("a number is read off a tensor"))
        raise self.refuse(f"the values of a tensor are read in Python, by {name!r}")

    def _elements(self, tensor: torch.Tensor) -> torch.Tensor | None:
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
        place = self.places[id(tensor)]
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
        with self._unfollowing():
            for step in self.steps:
                if step.index not in needed:
                    continue
                if step.index in sizes:
                    known = shapes.values[step.index]
                    environment[step.index] = self.device if isinstance(known, torch.device) else known
                elif step.kind == "attr":
                    environment[step.index] = real.attribute(step.target)
                    if isinstance(step.target, str):
                        self.guards.stored.add(step.target)
                else:
                    environment[step.index] = step.compiled()(environment)
        found: torch.Tensor = environment[place[1]]
        return dict(flatten(found)[0])[place[2]] if place[2] else found

    def call_module(self, module: nn.Module, called: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a call of a module: as one layer, by an adapter, or into it.

        Args:
            module: the module.
            called: PyTorch's own way to call a module.
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        self._raise_refusal_again()
        self._refuse_transforms()
        if "_orig_mod" in module._modules:
            # torch.compile wraps a module; the wrapped one is followed instead.
            return module._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]
        path = self.paths.get(id(module))
        if path is None or path == "":
            return called(module, *args, **kwargs)
        self.stack.append(path)
        try:
            if path in self.whole:
                return self.call(module, args, kwargs, name=path)
            replaced = "forward" in module.__dict__
            if not replaced:
                adapter = adapter_for(module)
                if (
                    adapter is not None
                    and not _hooked(module)
                    and (adapter.applies is None or adapter.applies(*args, **kwargs))
                ):
                    self.whole |= {f"{path}.{part}": why for part, why in adapter.whole.items()}
                    return adapter.forward(module, *args, **kwargs)
                if _is_layer(module):
                    if not _hooked(module):
                        return self.call(module, args, kwargs, name=path)
                    return self._with_hooks(module, called, args, kwargs, path)
            return called(module, *args, **kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = path
            raise
        finally:
            self.stack.pop()

    def _with_hooks(self, module: nn.Module, called: Callable[..., Any], args: Any, kwargs: Any, path: str) -> Any:
        """Follow a layer's hooks, and record its ``forward`` alone as the layer."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.call(module, args, kwargs, bare=True, name=path)

        module.__dict__["forward"] = forward
        try:
            return called(module, *args, **kwargs)
        finally:
            del module.__dict__["forward"]

    # --- what went wrong ---

    def _unfollowed(self, error: BaseException) -> TraceError:
        """Return the error that names the user's line: the last frame outside of PyTorch and torchsurgeon."""
        if isinstance(error, TraceError):
            return error
        where = self.failed_in or ""
        owner = self.model.get_submodule(where) if where else self.model
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_LIBRARY, _THIS_PACKAGE))
        ]
        reason = short(str(error).strip() or type(error).__name__, quote=False)
        lines = [f"{type(self.model).__name__} cannot be followed: {reason}"]
        if frames:
            frame = frames[-1]
            code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()[:300]
            lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n    {code}')
            reason = f"{os.path.basename(frame.filename)}:{frame.lineno}: {code}: {reason}"
        if where:
            lines.append(
                f"What to try: keep {where!r} ({type(owner).__name__}) whole, as one layer: leaf_modules=[{where!r}]"
            )
        else:
            lines.append(
                "What to try: move the line's control flow into a submodule and keep that whole with leaf_modules=[…], "
                "or make it depend on configuration, not on the values of a tensor"
            )
        return UnfollowedError("\n".join(lines), where, reason)


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is one of PyTorch's own, which is recorded as one layer."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential)


def _hooked(module: nn.Module) -> bool:
    shared = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or shared._global_forward_hooks
        or shared._global_forward_pre_hooks
    )
