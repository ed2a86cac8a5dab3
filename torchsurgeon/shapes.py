"""Run a traced model on meta tensors: what every step gives, what shares memory, what is overwritten, how many flops.

Nothing is computed and no memory is taken; the common layer types have their shape rule here, the others run PyTorch's own
meta kernels. Steps that need values (data-dependent ones) make the caller run the example for real instead.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchsurgeon.program import Constant, Environment, Step, map_refs, returning_first
from torchsurgeon.structure import flatten

META = torch.device("meta")


@dataclasses.dataclass
class Shapes:
    """What each step of a program gave: its value (meta tensors keep shape, dtype and sharing of memory), the storages it
    overwrote, its flops (multiply and add counted as two), and the operators whose flops nobody knows how to count."""

    values: Environment
    overwrites: list[frozenset[int]]
    flops: list[int]
    uncounted: list[frozenset[str]]


def storage_of(tensor: torch.Tensor) -> int:
    """Return an identity of the memory behind ``tensor``, valid while the tensor lives."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor in a nested value."""
    return [leaf for _, leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]


class MetaModel:
    """A model's modules and attributes with meta tensors in place of weights, made as they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: dict[int, torch.Tensor] = {}
        self._modules: dict[int, nn.Module] = {}

    def tensor(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._tensors:
            self._tensors[id(value)] = value.detach().to(META)
        return self._tensors[id(value)]

    def attribute(self, target: str | Constant) -> Any:
        if isinstance(target, Constant):
            return self.tensor(target.tensor)
        return self.tensor(operator.attrgetter(target)(self._model))

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._modules:
            twin = type(module).__new__(type(module))
            self._modules[id(module)] = twin
            twin.__dict__ = dict(module.__dict__)
            for table in ("_parameters", "_buffers"):
                twin.__dict__[table] = {key: self.tensor(value) for key, value in module.__dict__[table].items()}
            twin.__dict__["_modules"] = {
                key: None if child is None else self.module(child) for key, child in module._modules.items()
            }
        return self._modules[id(module)]


class RealModel(MetaModel):
    """The model itself, for graphs whose shapes depend on values."""

    def tensor(self, value: Any) -> Any:
        return value

    def module(self, module: nn.Module) -> nn.Module:
        return module


class _CountFlops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        elif func.namespace not in ("aten", "prims"):
            self.uncounted.add(f"{func.namespace}::{func._schema.name.rpartition('::')[2]}")
        return out


def propagate(
    steps: Sequence[Step], inputs: Iterable[torch.Tensor], source: MetaModel, *, count_flops: bool = True
) -> Shapes:
    """Return what every step gives for ``inputs``, which are neither changed nor kept.

    Raises whatever the model raises on meta tensors; pass a :class:`RealModel` to run on the real ones.
    """
    real = isinstance(source, RealModel)
    given = iter(inputs)
    result = Shapes([None] * len(steps), [], [], [])
    values = result.values
    with torch.inference_mode(False), torch.no_grad():
        for step in steps:
            overwrites: frozenset[int] = frozenset()
            flops, uncounted = 0, frozenset[str]()
            if step.kind == "input":
                tensor = next(given)
                values[step.index] = tensor.detach().clone() if real else tensor.detach().to(META)
            elif step.kind == "attr":
                values[step.index] = source.attribute(step.target)
            elif step.kind == "output":
                values[step.index] = None
            else:
                args, kwargs = map_refs(lambda ref: values[ref.step], (step.args, step.kwargs))
                rule = None if real else _rule(step)
                outcome = NotImplemented if rule is None else rule(step.target, *args, **kwargs)
                if outcome is not NotImplemented:
                    values[step.index], flops, overwritten = outcome
                    if overwritten:
                        overwrites = frozenset([storage_of(args[0])])
                else:
                    before = [(t, t._version) for t in tensors_in([args, kwargs]) if not t.is_inference()]
                    call = _callable(step, source)
                    if count_flops:
                        with _CountFlops() as counter:
                            values[step.index] = call(*args, **kwargs)
                        flops, uncounted = counter.flops, frozenset(counter.uncounted)
                    else:
                        values[step.index] = call(*args, **kwargs)
                    overwrites = frozenset(storage_of(t) for t, version in before if t._version != version)
                    if overwrites and values[step.index] is None and args and isinstance(args[0], torch.Tensor):
                        # After x[0] = y later readers need a value to read.
                        step.target = returning_first(step.target, step.is_method)
                        values[step.index] = args[0]
            result.overwrites.append(overwrites)
            result.flops.append(flops or _known_flops(step, values))
            result.uncounted.append(uncounted)
    return result


def _callable(step: Step, source: MetaModel) -> Callable[..., Any]:
    if step.is_module:
        return source.module(step.target)
    if step.is_method:
        return lambda first, *rest, **named: getattr(first, step.target)(*rest, **named)
    return step.target  # type: ignore[no-any-return]


def _known_flops(step: Step, values: Environment) -> int:
    """Flops of fused layers whose inner products the registry does not see."""
    mha = step.target
    if isinstance(mha, nn.MultiheadAttention):
        named = dict(zip(("query", "key"), step.args, strict=False)) | step.kwargs
        query, key = values[named["query"].step], values[named["key"].step]
        batch_dim, length_dim = (0, 1) if mha.batch_first else (1, 0)
        batch = query.shape[batch_dim] if query.dim() == 3 else 1
        target, source = (
            query.shape[length_dim if query.dim() == 3 else 0],
            key.shape[length_dim if key.dim() == 3 else 0],
        )
        width = mha.embed_dim
        projections = 2 * batch * (2 * target * width * width + source * width * (mha.kdim + mha.vdim))
        return int(projections + 4 * batch * target * source * width)
    return 0


# --- shape rules: (target, *args) → (value, flops, whether the first argument was overwritten), or NotImplemented ---

Outcome = tuple[Any, int, bool]


def _elementwise(module: nn.Module, x: torch.Tensor) -> Outcome:
    if getattr(module, "inplace", False):
        return x, 0, True
    return torch.empty_like(x), 0, False


def _same_object(module: nn.Module, x: torch.Tensor, *_: Any) -> Outcome:
    return (x, 0, False) if not module.training else NotImplemented


def _normalization(module: nn.Module, x: torch.Tensor) -> Outcome:
    return torch.empty_like(x), 0, False


def _linear(module: nn.Linear, x: torch.Tensor) -> Outcome:
    if x.shape[-1:] != (module.in_features,):
        return NotImplemented
    out = torch.empty((*x.shape[:-1], module.out_features), dtype=x.dtype, device=META)
    return out, 2 * out.numel() * module.in_features, False


def _convolution(module: Any, x: torch.Tensor) -> Outcome:
    spatial = len(module.kernel_size)
    if x.dim() != spatial + 2 or isinstance(module.padding, str) or x.shape[1] != module.in_channels:
        return NotImplemented
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True
        )
    ]
    if min(size) < 1:
        return NotImplemented
    last = spatial == 2 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (x.shape[0], module.out_channels, *size),
        dtype=x.dtype,
        device=META,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    products = module.in_channels // module.groups
    for k in module.kernel_size:
        products *= k
    return out, 2 * out.numel() * products, False


def _binary(target: Any, x: Any, y: Any, **kwargs: Any) -> Outcome:
    if kwargs or not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return NotImplemented
    if isinstance(y, torch.Tensor):
        if y.dtype != x.dtype or y.shape != x.shape or y.stride() != x.stride():
            return NotImplemented
    elif not isinstance(y, (int, float)):
        return NotImplemented
    return torch.empty_like(x), 0, False


def _binary_in_place(target: Any, x: Any, y: Any) -> Outcome:
    if not isinstance(x, torch.Tensor) or _binary(target, x, y) is NotImplemented:
        return NotImplemented
    return x, 0, True


def _cat(target: Any, tensors: Any, dim: Any = 0, **kwargs: Any) -> Outcome:
    if kwargs or not isinstance(dim, int) or not all(isinstance(t, torch.Tensor) for t in tensors):
        return NotImplemented
    first = tensors[0]
    dim = dim % first.dim() if first.dim() else 0
    shape = list(first.shape)
    for t in tensors[1:]:
        if t.dim() != len(shape) or t.dtype != first.dtype or not t.is_contiguous():
            return NotImplemented
        if any(a != b for i, (a, b) in enumerate(zip(t.shape, shape, strict=True)) if i != dim):
            return NotImplemented
        shape[dim] += t.shape[dim]
    if not first.is_contiguous():
        return NotImplemented
    return torch.empty(shape, dtype=first.dtype, device=META), 0, False


_MODULE_RULES: dict[type, Callable[..., Outcome]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.Linear: _linear,
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.Softmax), _normalization
    ),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU),
        _elementwise,
    ),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity), _same_object),
}
_FUNCTION_RULES: dict[Any, Callable[..., Outcome]] = {
    **dict.fromkeys((operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul), _binary),
    **dict.fromkeys((operator.iadd, operator.isub, operator.imul), _binary_in_place),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
}


def _rule(step: Step) -> Callable[..., Outcome] | None:
    if step.is_module:
        return _MODULE_RULES.get(type(step.target))
    return None if step.is_method else _FUNCTION_RULES.get(step.target)
