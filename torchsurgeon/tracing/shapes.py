"""Run a traced model on meta tensors: what every step gives, what shares memory, what is overwritten, how many flops.

Nothing is computed and no memory is taken. Common layers have a shape rule (``shape_rules``), the others run PyTorch's
own meta kernels. Where a step needs the values of tensors, ``propagate()`` raises, and the caller runs the example for
real instead, with a ``RealModel``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.reading import is_own_method
from torchsurgeon.tracing.shape_rules import META, Outcome, rule_for
from torchsurgeon.tracing.step import Constant, Environment, ModelDevice, Step, clone, map_refs, returning_first
from torchsurgeon.tracing.structure import flatten


@dataclasses.dataclass
class Shapes:
    """What each step of a program gave. Lists are indexed by step.

    Attributes:
        values: its value; meta tensors keep shape, dtype and which of them share memory.
        overwrites: the storages it overwrote, as ``storage_of()`` names them.
        flops: its floating-point operations; multiply and add count as two.
        uncounted: its operators whose flops are unknown and not in ``flops``.
        random: the indices of the steps that draw random numbers.
        bound: the indices of the steps whose sizes are only the largest there can be, since values decide them.
    """

    values: Environment
    overwrites: list[frozenset[int]]
    flops: list[int]
    uncounted: list[frozenset[str]]
    random: list[int] = dataclasses.field(default_factory=list)
    bound: list[int] = dataclasses.field(default_factory=list)


def storage_of(tensor: torch.Tensor) -> int:
    """Return an identity of the memory behind ``tensor``, valid while the tensor lives."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif "sparse" in str(tensor.layout) or tensor.layout is torch.jagged:
        tensor = tensor.values()
    elif tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def without_elements(tensor: torch.Tensor) -> torch.Tensor:
    """Return a meta tensor with the same strides, of which ``to()`` would take the gaps."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return tensor.detach().to(META)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor in a nested value."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for _, leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]


class MetaModel:
    """A model's modules and attributes with meta tensors in place of weights, each made at its first use."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: dict[int, torch.Tensor] = {}
        self._modules: dict[int, nn.Module] = {}

    def tensor(self, value: Any) -> Any:
        """Return the meta tensor that stands for a tensor, always the same one; other values as they are."""
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._tensors:
            with torch.inference_mode(False):
                self._tensors[id(value)] = value.detach().to(META)
        return self._tensors[id(value)]

    def attribute(self, target: str | Constant) -> Any:
        """Return the model's attribute of this dotted name, or a constant, with meta tensors."""
        if isinstance(target, Constant):
            return self.tensor(target.tensor)
        return self.tensor(operator.attrgetter(target)(self._model))

    def module(self, module: nn.Module) -> nn.Module:
        """Return a twin of a submodule whose parameters and buffers are meta tensors."""
        if id(module) not in self._modules:
            twin = type(module).__new__(type(module))
            self._modules[id(module)] = twin
            # A twin has dicts and lists of its own, so that what it puts into them does not reach the module.
            twin.__dict__ = {
                key: value.copy() if type(value) in (dict, list, set) else value
                for key, value in module.__dict__.items()
                if not is_own_method(module, key, value)
            }
            for table in ("_parameters", "_buffers"):
                twin.__dict__[table] = {key: self.tensor(value) for key, value in module.__dict__[table].items()}
            twin.__dict__["_modules"] = {
                key: None if child is None else self.module(child) for key, child in module._modules.items()
            }
        return self._modules[id(module)]


class RealModel(MetaModel):
    """The model itself with its own weights, for models whose shapes depend on values."""

    def tensor(self, value: Any) -> Any:
        """Return the tensor itself."""
        return value

    def module(self, module: nn.Module) -> nn.Module:
        """Return the submodule itself."""
        return module


def _lengths(sequences: torch.Tensor) -> list[int]:
    """Return the length of each sequence of a batch; padded ones come packed as a nested tensor."""
    if sequences.is_nested:
        return [t.shape[0] for t in sequences.unbind()]
    return [sequences.shape[1]] * sequences.shape[0]


def _attention_flops(query: Any, key: Any, value: Any, width: int, *args: Any, **kwargs: Any) -> int:
    pairs = zip(_lengths(query), _lengths(key), strict=True)
    return sum(4 * (target + source) * width * width + 4 * target * source * width for target, source in pairs)


def _encoder_flops(x: Any, width: int, *args: Any, **kwargs: Any) -> int:
    hidden: int = args[12].shape[0]
    return _attention_flops(x, x, x, width) + sum(4 * length * width * hidden for length in _lengths(x))


def _recurrent_flops(x: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Count each weight matrix once for every sample of every time step, which are all but the last dimension."""
    matrices = weights if isinstance(weights, (list, tuple)) else (weights, args[0])
    samples: int = math.prod(x.shape[:-1])
    return sum(2 * samples * int(t.numel()) for t in matrices if t.dim() == 2)


def _vector_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * max(t.numel() for t in args if isinstance(t, torch.Tensor))


_ATEN = torch.ops.aten
# Operators that PyTorch's own flop counter does not see, or whose parts it does not see because they are fused.
_FUSED: dict[Any, Callable[..., int]] = {
    _ATEN._native_multi_head_attention: _attention_flops,
    _ATEN._transformer_encoder_layer_fwd: _encoder_flops,
    **dict.fromkeys((_ATEN.mkldnn_rnn_layer, _ATEN._cudnn_rnn, _ATEN.miopen_rnn), _recurrent_flops),
    **dict.fromkeys((_ATEN.mv, _ATEN.addmv, _ATEN.dot, _ATEN.vdot), _vector_flops),
}
# Operators that multiply and add more than once per element, by what their names hold. Those without a formula are
# listed as uncounted. All others work element by element, which is not counted, as in PyTorch's flop counter.
_ARITHMETIC = re.compile(
    r"(?<![au])mm|mv$|dot|conv(?!ert)|(?<!bi)(?<!tri)linear(?!1d)|^_trilinear|attention|encoder_layer"
    r"|rnn|(?<!fused_)(lstm|gru)|_fft_|[cp]dist|euclidean_dist|cholesky|(?<!re)solve|^_?lu_|(ge|orm|org)qr|^inverse|ctc_loss"
    r"|linalg_(?!vector_norm|cross|diagonal|check|_powsum)"
)


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator draws random numbers; attention whose dropout is off does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= dict(zip(names, args, strict=False)) | dict(kwargs)
    return given.get("dropout_p") != 0.0


class _CountFlops(TorchDispatchMode):
    """Counts the flops of the operators that run in its block, and notes whether any draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.uncounted: set[str] = set()
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.random = self.random or _draws(func, args, kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        fused = _FUSED.get(func._overloadpacket)
        name = func._schema.name.rpartition("::")[2]
        try:
            if fused is not None:
                self.flops += fused(*args, **(kwargs or {}))
            elif formula is not None:
                self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
            elif func.namespace not in ("aten", "prims") or _ARITHMETIC.search(name):
                self.uncounted.add(f"{func.namespace}::{name}")
        except Exception:
            # A formula that does not take such tensors (nested ones have no shape).
            self.uncounted.add(f"{func.namespace}::{name}")
        return out


class Propagation:
    """Runs steps one by one, and notes what each gives, overwrites and costs.

    A step that overwrites its first argument and returns None (``x[0] = y``) is changed to return that argument, so
    that later readers have a value to read.

    Attributes:
        source: the model with meta tensors, or a ``RealModel`` to compute the values.
        shapes: what was found so far.

    Args:
        source: that model.
        count_flops: whether to count the flops of steps without a shape rule, which takes time.
    """

    def __init__(self, source: MetaModel, *, count_flops: bool = True) -> None:
        self.source, self._count_flops = source, count_flops
        self.shapes = Shapes([], [], [], [])

    def _note(self, value: Any, overwrites: frozenset[int] = frozenset(), flops: int = 0, uncounted: Any = ()) -> Any:
        self.shapes.values.append(value)
        self.shapes.overwrites.append(overwrites)
        self.shapes.flops.append(flops)
        self.shapes.uncounted.append(frozenset(uncounted))
        return value

    def input(self, step: Step, tensor: torch.Tensor) -> torch.Tensor:
        """Take an input tensor, which is neither changed nor kept, and return what stands for it."""
        real = isinstance(self.source, RealModel)
        return self._note(clone(tensor.detach()) if real else without_elements(tensor))  # type: ignore[no-any-return]

    def attribute(self, step: Step) -> Any:
        """Return what stands for the attribute of the model that a step reads."""
        return self._note(self.source.attribute(step.target))

    def output(self, step: Step) -> None:
        """Note the last step, which computes nothing."""
        self._note(None)

    def call(self, step: Step) -> Any:
        """Run a step and return its value.

        Raises:
            TraceError: the step changes the model's own parameters or buffers, or a real run fails.
            Exception: whatever the model raises on meta tensors.
        """
        values = self.shapes.values
        args, kwargs = map_refs(lambda ref: values[ref.step], (step.args, step.kwargs))
        outcome = _known(step, self.source, args, kwargs)
        if outcome is not None:
            if outcome.bound:
                self.shapes.bound.append(step.index)
            overwritten = frozenset([storage_of(args[0])] if outcome.overwritten else [])
            return self._note(outcome.value, overwritten, outcome.flops, outcome.uncounted)
        # PyTorch raises a tensor's version, and that of its views, with every write to its memory.
        before = [(t, t._version) for t in tensors_in([args, kwargs]) if not t.is_inference()]
        # The tensors of inference mode have no versions.
        mode = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with mode, _CountFlops() if self._count_flops else nullcontext() as counter:
            value = _run(step, self.source, args, kwargs)
        overwrites = frozenset(storage_of(t) for t, version in before if t._version != version)
        if overwrites and value is None and args and isinstance(args[0], torch.Tensor):
            step.target, value = returning_first(step.target, step.is_method), args[0]
        if counter is None:
            return self._note(value, overwrites)
        if counter.random:
            self.shapes.random.append(step.index)
        return self._note(value, overwrites, counter.flops, counter.uncounted)


def without_dynamo(mode: type[TorchDispatchMode]) -> None:
    """Spare the first use of a mode the import of torch.compile's compiler, which takes seconds.

    PyTorch hides the methods of its modes from that compiler, and imports it to do so. Nothing here runs inside of it.
    """
    raw = getattr(mode.__torch_dispatch__, "__wrapped__", None)
    if raw is not None:
        raw.__dict__.setdefault("__dynamo_disable", raw)


without_dynamo(_CountFlops)


def propagate(
    steps: Sequence[Step], inputs: Iterable[torch.Tensor], source: MetaModel, *, count_flops: bool = True
) -> Shapes:
    """Return what every step gives; see ``Propagation``.

    Args:
        steps: the traced program.
        inputs: the model's input tensors, which are neither changed nor kept.
        source: the model with meta tensors, or a ``RealModel`` to compute the values.
        count_flops: whether to count the flops of steps without a shape rule, which takes time.

    Raises:
        TraceError: a step changes the model's own parameters or buffers, or a real run fails.
        Exception: whatever the model raises on meta tensors.
    """
    given = iter(inputs)
    run = Propagation(source, count_flops=count_flops)
    with torch.inference_mode(False), torch.no_grad():
        for step in steps:
            if step.kind == "input":
                run.input(step, next(given))
            elif step.kind == "attr":
                run.attribute(step)
            elif step.kind == "output":
                run.output(step)
            else:
                run.call(step)
    return run.shapes


def with_selections(steps: Sequence[Step], shapes: Shapes) -> Shapes:
    """Return the shapes of a program after getitem steps were inserted before its last step.

    Args:
        steps: the program, with those steps.
        shapes: what was found before they were inserted.
    """
    start = len(shapes.values) - 1
    values = shapes.values[:start]
    for step in steps[start:-1]:
        values.append(step.target(*map_refs(lambda ref: values[ref.step], step.args)))
    added = len(values) - start
    return Shapes(
        [*values, None],
        [*shapes.overwrites[:start], *[frozenset[int]()] * added, *shapes.overwrites[start:]],
        [*shapes.flops[:start], *[0] * added, *shapes.flops[start:]],
        [*shapes.uncounted[:start], *[frozenset[str]()] * added, *shapes.uncounted[start:]],
        shapes.random,
        shapes.bound,
    )


def dry_run(steps: Iterable[Step], values: Environment, source: MetaModel) -> None:
    """Run steps on meta tensors, to find out whether the model takes tensors of these shapes.

    Args:
        steps: the steps, in the order they run.
        values: what they read, by index of the step that gives it; what they give is added.
        source: the model with meta tensors.

    Raises:
        Exception: whatever the model raises on tensors of shapes that it does not take.
    """
    with torch.inference_mode(False), torch.no_grad():
        for step in steps:
            if step.kind == "attr":
                values[step.index] = source.attribute(step.target)
            elif step.kind == "call":
                args, kwargs = map_refs(lambda ref: values[ref.step], (step.args, step.kwargs))
                outcome = _known(step, source, args, kwargs)
                values[step.index] = _run(step, source, args, kwargs) if outcome is None else outcome.value


def _known(step: Step, source: MetaModel, args: Any, kwargs: Any) -> Outcome | None:
    """Return what a shape rule computes for a step; None where no rule applies."""
    if isinstance(source, RealModel) or step.is_method:
        return None
    if isinstance(step.target, ModelDevice):
        return Outcome(META)
    rule = rule_for(step.target)
    return None if rule is None else rule(step.target, *args, **kwargs)


def _on_meta(step: Step, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a call's arguments with the meta device in the place of any other."""
    to_device = step.target in ("to", "new_tensor", "new_zeros", "new_ones", "new_empty", "new_full")

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) or (to_device and isinstance(value, str) and step.target == "to"):
            return META
        return value

    args, kwargs = tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()}
    if step.target in _device_constructors() or "device" in kwargs:
        kwargs["device"] = META
    return args, kwargs


def _run(step: Step, source: MetaModel, args: Any, kwargs: Any) -> Any:
    """Run a step by PyTorch's kernels, and see to it that it leaves the model's own tensors as they are."""
    if not isinstance(source, RealModel) and not step.is_module:
        if step.target in ("cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return args[0]
        args, kwargs = _on_meta(step, args, kwargs)
    if step.is_method:
        return step.under_settings(getattr(args[0], step.target))(*args[1:], **kwargs)
    call = source.module(step.target) if step.is_module else step.target
    run = step.under_settings(call.forward if step.bare else call)
    held = _held(call) if step.is_module else {}
    try:
        value = run(*args, **kwargs)
    except Exception as error:
        if not isinstance(source, RealModel):
            raise
        shapes = ", ".join(
            f"{t.dtype}{'[nested]' if t.is_nested else list(t.shape)}" for t in tensors_in([args, kwargs])
        )
        raise TraceError(
            f"layer {step.name!r} failed on the example, which gives it {short(shapes, quote=False)}: {short(error)}; "
            "give an example that the model takes"
        ) from error
    for name, before in held.items():
        if _held(call).get(name) != before:
            raise drifting(step, f"the model's own {step.module_path + '.' + name!r}")
    return value


def _held(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the identity and version of each of a module's parameters and buffers, which change when one does."""
    return {name: (id(t), t._version) for name, t in (*module.named_parameters(), *module.named_buffers())}


def drifting(step: Step, what: str) -> TraceError:
    """Return the error for a step that overwrites what must be the same in every call.

    Args:
        step: the step.
        what: what it overwrites, as the message names it.
    """
    return TraceError(
        f"layer {step.name!r} overwrites {what}: device and server would drift apart. Keep the state outside of "
        "forward, pass it in and return it; or clone the tensor before writing to it"
    )
