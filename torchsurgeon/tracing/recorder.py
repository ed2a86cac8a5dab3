"""From a model to its steps, by calling it and recording what it calls.

The model is really called, as its user calls it, with tensors on the meta device in place of the example's: ordinary
tensors, so that tests of type, dtype, attributes and sizes take the path that they take in a real call, but without
elements, so that nothing that depends on elements can be read off them unnoticed. Every call of PyTorch becomes a
``Step``, and so does every call of one of PyTorch's own layers. Sizes are followed (see ``sizes``).

Where a call needs the elements of tensors, the model is recorded a second time, with the example's own elements.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.adapters import Adapter, adapter_for
from torchsurgeon.tracing.alone import TRACING
from torchsurgeon.tracing.ambient import Ambient, settings
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.following import begin, end, follower_here
from torchsurgeon.tracing.gradients import OF_TENSORS, QUESTIONS, noticed
from torchsurgeon.tracing.operators import OF_DEVICE, Kind, describe
from torchsurgeon.tracing.program import NOTHING, Assumed, Program, tensors_within
from torchsurgeon.tracing.python_numbers import Table, followed
from torchsurgeon.tracing.replaced import has_another_forward
from torchsurgeon.tracing.shapes import MetaModel, without_dynamo
from torchsurgeon.tracing.sizes import Number, number
from torchsurgeon.tracing.step import Constant, Ref, Step
from torchsurgeon.tracing.structure import LEAF, flatten
from torchsurgeon.tracing.unfollowed import NeedsDevice, NeedsElements, unfollowed

# What gives a bool for the values of a tensor.
_TESTS = frozenset(("__bool__", "is_nonzero", "equal", "__contains__"))
# What tells how a tensor lies in memory, and so may differ between calls of the same sizes.
_OF_STRIDES = frozenset(("dim_order", "is_non_overlapping_and_dense"))
# What tells the form of a tensor, which for a weight may be another once a program has replaced it.
_OF_FORM = frozenset(
    ("dtype", "ndim", "dim", "ndimension", "itemsize", "element_size", "is_floating_point", "is_complex", "is_signed")
)


class _Escapes(TorchDispatchMode):
    """Notices operators that run on followed tensors outside of every recorded call, such as those of TorchScript."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        recorder = self.recorder
        if not recorder.paused and any(recorder.follows(t) for t in tensors_within([args, kwargs])):
            raise recorder.refuse(
                f"the operator {func} runs outside of what Python can follow (TorchScript, functorch)"
            )
        return func(*args, **(kwargs or {}))


without_dynamo(_Escapes)


class Recorder(Program, TorchFunctionMode):
    """Follows one call of a model. See ``record()``."""

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        whole: Mapping[str, str],
        adapter: Adapter | None,
        source: MetaModel,
        earlier: Recorder | None = None,
        tables: Sequence[Table] = (),
        assumed: Assumed = NOTHING,
    ) -> None:
        super().__init__(model, source, earlier)
        self.tables, self.assumed = tables, assumed
        self.asked_whether_compiling = False
        self.model_call, self.whole, self.adapter = call, dict(whole), adapter
        self.paths: dict[int, str] = {id(module): path for path, module in reversed(list(model.named_modules()))}

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        """Call the model and record what it does.

        Args:
            tensors: the example's tensors, in the order of ``call.names``.
        """
        self.example = tensors
        if self.device is None:
            self.device = tensors[0].device
        given: dict[int, Any] = {}
        values = {}
        for path, name, tensor in zip(self.model_call.paths, self.model_call.names, tensors, strict=True):
            made = self.input(name, tensor)
            # One tensor that is passed twice stays one; ``Call`` sees to it that it is so in every call.
            given.setdefault(id(tensor), made)
            values[path] = given[id(tensor)]
        args, kwargs = self.model_call.rebuild(values)
        try:
            with (
                TRACING,
                torch.inference_mode(False),
                torch.no_grad(),
                self._followed(),
            ):
                self.base = settings()
                result = (
                    self.adapter.forward(self.model, *args, **kwargs) if self.adapter else self.model(*args, **kwargs)
                )
                self._raise_refusal()
                with self.unfollowing():
                    self.output(result)
        except NeedsElements:
            raise
        except Exception as error:
            if isinstance(self.refusal, NeedsElements):
                raise self.refusal from error
            raise unfollowed(self.model, self.failed_in or "", self.refusal or error) from error

    def _raise_refusal(self) -> None:
        """Stop a model whose own code caught a refusal."""
        if self.refusal is not None:
            raise self.refusal

    @contextmanager
    def _followed(self) -> Iterator[None]:
        called = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if follower_here() is not self:
                return called(module, *args, **kwargs)
            return self.call_module(module, called, args, kwargs)

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

        def here() -> bool:
            return follower_here() is self

        begin(self)
        for held, name, function in wrapped:
            held[name] = kept_whole(function)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with (
                followed(self.tables, here),
                self._compiling(here),
                _Escapes(self),
                self,
                noticed(self.guards.asked, here),
            ):
                yield
        finally:
            for held, name, function in wrapped:
                held[name] = function
            nn.Module.__call__ = called  # type: ignore[method-assign]
            end()

    @contextmanager
    def _compiling(self, here: Callable[[], bool]) -> Iterator[None]:
        """Answer the model's question whether it is compiled or exported, as its own way to be followed."""
        original = torch.compiler.is_compiling

        def is_compiling() -> bool:
            if not here():
                return original()
            self.asked_whether_compiling = True
            return self.assumed.compiling

        torch.compiler.is_compiling = is_compiling
        try:
            yield
        finally:
            torch.compiler.is_compiling = original

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
        called = target if isinstance(target, str) else getattr(target, "__name__", "")
        if called in _OF_STRIDES:
            self.guards.layouts = True
        elif called.startswith("as_strided"):
            self._refuse_beyond(called, args, kwargs)
        with self.unfollowing():
            ambient = self._ambient()
            if ambient is not None and ambient.autocasts and not self.real:
                raise self.needs_elements(NeedsDevice("autocast does not act on meta tensors"))
            given, named = self.arguments(args), self.arguments(kwargs)
            step = self.add("call", name, target, given, named, path=name or self.stack[-1])
            step.ambient, step.bare = ambient, bare
            self.refuse_writing_to_the_model(step, args, kwargs)
            value = self.run_last(step)
        return self._result(step, value, by_value=self.real and not step.is_module)

    def _refuse_beyond(self, called: str, args: Any, kwargs: Any) -> None:
        """Refuse ``as_strided`` where it reads memory outside of its tensor, which does not cross at a cut."""
        given = dict(zip(("input", "size", "stride", "storage_offset"), args, strict=False)) | kwargs
        tensor = given.get("input", given.get("self"))
        if called == "as_strided" and given.get("storage_offset") is None and isinstance(tensor, torch.Tensor):
            sizes, strides = (
                [one.value if isinstance(one, Number) else one for one in given[key]] for key in ("size", "stride")
            )
            reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
            with self.unfollowing():
                inside = reach <= tensor.numel()
            if inside and self._size("is_contiguous", (tensor,), {}):
                return
        raise self.refuse(f"{called!r} may read memory outside of its tensor, which does not cross at a cut")

    def _result(self, step: Step, value: Any, by_value: bool) -> Any:
        if isinstance(value, torch.Tensor):
            self.place(value, step.index)
            return value
        leaves, structure = flatten(value)
        if structure is LEAF:
            if type(value) in (int, float, bool):
                return self.numbered(value, step.index, (), by_value)
            if not isinstance(value, (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)):
                self.place(value, step.index)
            return value
        if not step.is_module and isinstance(value, (tuple, list)):
            if self.real and not self._of_sizes(Ref(step.index)):
                raise self.refuse("how many tensors a call gives depends on the values of a tensor")
            self.guards.structure(step.index, structure)
        numbers = {}
        for path, leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                self.place(leaf, step.index, path)
            elif type(leaf) in (int, float):
                numbers[path] = self.numbered(leaf, step.index, path, by_value)
        if numbers:
            value = structure.rebuild(dict(leaves) | numbers)
        elif not isinstance(value, (tuple, list, dict)):
            self.place(value, step.index)
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or follower_here() is not self:
            return func(*args, **kwargs)
        self._raise_refusal()
        self._refuse_transforms()
        operation = describe(func, args, kwargs)
        if operation.kind is Kind.REFUSED:
            raise self.refuse(operation.reason)
        if operation.kind is Kind.UNTOLD and self.follows(args[0]):
            self._refuse_at_once(operation.name)
        if operation.kind in (Kind.STATIC, Kind.UNTOLD):
            return self._static(operation.name, func, args, kwargs)
        if operation.kind is Kind.SIZE:
            return self._size(operation.target, operation.args, kwargs)
        if operation.kind is Kind.VALUE:
            return self._value(operation.name, func, args, kwargs)
        return self.call(operation.target, operation.args, kwargs)

    def _refuse_transforms(self) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise self.refuse("torch.func changes what its calls compute")

    def _static(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what is the same for all values and sizes: dtype, rank, device, and the like."""
        tensor = args[0]
        if name in QUESTIONS and isinstance(tensor, torch.Tensor) and self.follows(tensor):
            self._asked_of_gradients(name)
        if name in _OF_FORM:
            self._note_form(tensor)
        with self.unfollowing():
            if name in OF_DEVICE:
                if not self.follows(tensor):
                    return func(*args, **kwargs)
                if self.device is not None:
                    tensor = torch.empty(0, dtype=tensor.dtype, device=self.device)
                return func(tensor, *args[1:], **kwargs)
            return func(*args, **kwargs)

    def _note_form(self, tensor: Any) -> None:
        """Note that the code reads the dtype or the sizes of one of the model's own tensors."""
        if id(tensor) in self.stored:
            self.guards.formed.add(self.stored[id(tensor)])

    def _asked_of_gradients(self, name: str) -> None:
        """Note a question that a call's tensors may answer otherwise, or refuse it."""
        if name in OF_TENSORS and torch.is_grad_enabled():
            raise self.refuse(f"{name!r} of a tensor is asked where gradients are recorded; gradients end at a cut")
        self.guards.asked.add(name)

    def _refuse_at_once(self, name: str) -> None:
        """Refuse the model for a question that neither torch.export nor a module kept whole would answer as it does."""
        what = "how often a tensor was written to" if name == "_version" else "how a tensor lies in its caller's memory"
        self.refusal = TraceError(
            f"{type(self.model).__name__} asks {what} ({name}), which depends on what its caller did with the tensor, "
            "and is not sent; leave that question out of forward"
        )
        raise self.refusal

    def _size(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return sizes of a tensor as numbers that are followed."""
        tensor = args[0]
        if not self.follows(tensor):
            # A parameter's sizes are the same in every call.
            self._note_form(tensor)
            with self.unfollowing():
                return getattr(tensor, target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args)
        with self.unfollowing():
            step = self.add("call", "", target, self.arguments(args), self.arguments(kwargs), path=self.stack[-1])
            value = self.run_last(step)
        if target == "stride":
            self.guards.layouts = True
        if isinstance(value, (tuple, list)):
            numbers = [number(self, v, operator.getitem, (Ref(step.index), i), False, int) for i, v in enumerate(value)]
            return torch.Size(numbers) if isinstance(value, torch.Size) else tuple(numbers)
        if isinstance(value, bool):
            self.guards.layouts = True
            self.guards.equal(Ref(step.index), value)
            return value
        return self.numbered(value, step.index, (), by_value=False)

    def _value(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what is read off a tensor's elements; a model whose path depends on it cannot be followed."""
        read = {id(tensor): tensor for tensor in tensors_within([args, kwargs])}
        known = {key: self._known_elements(tensor) for key, tensor in read.items()}
        if None not in known.values():
            with self.unfollowing():
                return func(*(known.get(id(a), a) for a in args), **{k: known.get(id(a), a) for k, a in kwargs.items()})
        tensor = next(iter(read.values()))
        if self.assumed.values and (name in _TESTS or (name == "item" and tensor.dtype is torch.bool)):
            found = self.tested(func, args, kwargs)
            if found is not None:
                return found
        if name == "item":
            if tensor.dtype.is_complex:
                raise self.refuse("the values of a complex tensor are read in Python")
            if self.real:
                with self.unfollowing():
                    step = self.add("call", "", "item", self.arguments(args[:1]), path=self.stack[-1])
                    value = self.run_last(step)
                return self.numbered(value, step.index, (), by_value=True)
            raise self.needs_elements(RuntimeError("a number is read off a tensor"))
        raise self.refuse(f"the values of a tensor are read in Python, by {name!r}")

    def _known_elements(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor with its elements where they are the same in every call; None elsewhere."""
        if self.follows(tensor):
            return self.elements_of(tensor)
        if tensor.device.type == "meta":
            return None
        name = self.stored.get(id(tensor))
        self.decides(Constant(tensor) if name is None else name)
        return tensor

    def call_module(self, module: nn.Module, called: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a call of a module: as one layer, by an adapter, or into it.

        Args:
            module: the module.
            called: PyTorch's own way to call a module.
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        self._raise_refusal()
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
            replaced = has_another_forward(module)
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
            if follower_here() is not self:
                # Another thread runs the model meanwhile.
                return type(module).forward(module, *args, **kwargs)
            # The step calls the module's own forward, on the module itself where that is recorded with elements.
            del module.__dict__["forward"]
            try:
                return self.call(module, args, kwargs, bare=True, name=path)
            finally:
                module.__dict__["forward"] = forward

        before = module.__dict__.get("forward")
        module.__dict__["forward"] = forward
        try:
            return called(module, *args, **kwargs)
        finally:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


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
