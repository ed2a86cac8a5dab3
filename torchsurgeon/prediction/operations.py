"""Describe a traced model's layers as operations, from shapes alone: nothing is computed.

A layer that is one call of PyTorch is described by its arguments. Another layer (a module kept whole, a function of the
user's or of torchvision's) is run once on meta tensors, and each call of PyTorch that it makes is described.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from torchsurgeon.prediction.calls import VIEW, described, is_known, unknown
from torchsurgeon.prediction.kinds import KINDS, Operation
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.shapes import MetaModel, tensors_in
from torchsurgeon.tracing.specs import Layer
from torchsurgeon.tracing.step import Step, function_name, map_refs


def operations(graph: LayerGraph) -> list[list[Operation]]:
    """Return each layer's operations, in the layers' order.

    A step that is no layer (it reads a size, or takes one of several results) counts to the layer after it, as in a
    measured profile.
    """
    found: list[list[Operation]] = [[] for _ in graph.layers]
    ranks = {step: rank for rank, step in enumerate(graph.flow.layers)}
    source, values = MetaModel(graph.model), graph.shapes.values
    followed: dict[Any, list[Operation]] = {}
    column = len(graph.layers) - 1
    for step in reversed(list(graph.flow.running())):
        column = ranks.get(step.index, column)
        if step.kind == "call":
            found[column] = [*_of_step(step, values, source, followed), *found[column]]
    return found


def layer_kinds(graph: LayerGraph) -> tuple[str, ...]:
    """Return the kind of each layer: that of the operation that moves most elements; ``view`` where there is none."""
    return tuple(max(found, key=_moved, default=VIEW).kind for found in operations(graph))


def moved_bytes(layer: Layer) -> int:
    """Return the bytes that a layer reads and writes, its parameters included."""
    return sum(spec.size_bytes for spec in (*layer.inputs, *layer.outputs)) + int(layer.parameter_bytes)


def live_bytes(graph: LayerGraph) -> NDArray[np.int64]:
    """Return the bytes of the tensors that are alive while each layer runs, shape (layers,).

    These are the tensors that cross the cut before it, and its own outputs.
    """
    crossing = {point.index: point.size_bytes for point in graph.points}
    live, last = [], 0
    for layer in graph.layers:
        last = crossing.get(layer.index, last)
        live.append(last + sum(spec.size_bytes for spec in layer.outputs))
    return np.array(live, dtype=np.int64)


def _moved(operation: Operation) -> float:
    if operation.kind not in KINDS:
        return float(operation.sizes[0])
    return float(KINDS[operation.kind].work(np.array([operation.sizes], dtype=np.float64))[1][0])


def _of_step(
    step: Step, values: Sequence[Any], source: MetaModel, followed: dict[Any, list[Operation]]
) -> list[Operation]:
    args, kwargs = map_refs(lambda ref: values[ref.step], (step.args, step.kwargs))
    out = values[step.index]
    if step.is_module:
        flat = _MODULES.get(type(step.target))
        if flat is not None and not kwargs:
            name, rest = flat(step.target)
            return described(name, out, (*args, *rest), {})
    else:
        name = step.type_name.strip("_")
        if not tensors_in(out):
            return []
        if is_known(name):
            return described(name, out, args, kwargs)
    key = _configuration(step, args, kwargs)
    if key not in followed:
        followed[key] = _follow(step, source, args, kwargs, out)
    return followed[key]


def _configuration(step: Step, args: Any, kwargs: Any) -> Any:
    """Return what two steps have in common whose operations are the same, so that only one of them is followed."""
    tensors = tuple((t.dtype, tuple(t.shape), t.stride()) for t in tensors_in([args, kwargs]))
    settings = repr([value for value in (*args, *kwargs.items()) if not tensors_in(value)])
    if not step.is_module:
        return step.target, tensors, settings
    parts = tuple((type(part), part.extra_repr(), _plain_attributes(part)) for part in step.target.modules())
    return parts, tuple(tuple(p.shape) for p in step.target.parameters()), tensors, settings


def _plain_attributes(module: nn.Module) -> str:
    plain = (int, float, str, tuple, list)
    settings = {
        k: v if isinstance(v, plain) else id(v) for k, v in vars(module).items() if isinstance(v, plain) or callable(v)
    }
    return repr(settings)


def _follow(step: Step, source: MetaModel, args: Any, kwargs: Any, out: Any) -> list[Operation]:
    # The twin of the module is made first: making it calls PyTorch, which is not part of the layer.
    target: Any = source.module(step.target) if step.is_module else step.target
    with torch.inference_mode(False), torch.no_grad(), _Follow() as follow:
        try:
            if step.is_method:
                getattr(args[0], target)(*args[1:], **kwargs)
            else:
                target(*args, **kwargs)
        except Exception:
            # The layer needs the values of tensors, which meta tensors do not have.
            return [unknown(step.type_name, out, args, kwargs)]
    return follow.found or ([unknown(step.type_name, out, args, kwargs)] if tensors_in(out) else [])


class _Follow(TorchFunctionMode):
    """Describes every call of PyTorch that is made in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func).strip("_")
        if name == "get":  # a property of a tensor, such as its shape
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if tensors_in(out):
            self.found += described(name, out, args, kwargs) if is_known(name) else [unknown(name, out, args, kwargs)]
        return out


def _recurrent_module(module: nn.RNNBase) -> tuple[str, tuple[Any, ...]]:
    weights = module._flat_weights
    name = module.mode.lower()
    return name, (None, weights, True, module.num_layers, 0.0, False, module.bidirectional, module.batch_first)


def _plain(name: str) -> Callable[[Any], tuple[str, tuple[Any, ...]]]:
    return lambda module: (name, ())


def _conv_module(name: str, module: Any) -> tuple[str, tuple[Any, ...]]:
    settings: tuple[Any, ...] = (module.weight, module.bias, module.stride, module.padding)
    if module.transposed:
        return name, (*settings, module.output_padding, module.groups, module.dilation)
    return name, (*settings, module.dilation, module.groups)


_MODULES: dict[type[nn.Module], Callable[[Any], tuple[str, tuple[Any, ...]]]] = {
    **{
        getattr(nn, f"Conv{kind}{d}d"): functools.partial(_conv_module, f"conv{'_transpose' if kind else ''}{d}d")
        for kind in ("", "Transpose")
        for d in (1, 2, 3)
    },
    nn.Linear: lambda module: ("linear", (module.weight,)),
    **{getattr(nn, f"BatchNorm{d}d"): _plain("batch_norm") for d in (1, 2, 3)},
    nn.LayerNorm: lambda module: ("layer_norm", (module.normalized_shape,)),
    nn.GroupNorm: lambda module: ("group_norm", (module.num_groups,)),
    **{
        getattr(nn, f"{mode}Pool{d}d"): functools.partial(
            lambda name, module: (name, (module.kernel_size,)), f"{mode.lower()}_pool{d}d"
        )
        for mode in ("Max", "Avg")
        for d in (1, 2, 3)
    },
    **{
        getattr(nn, f"Adaptive{mode}Pool{d}d"): _plain(f"adaptive_{mode.lower()}_pool{d}d")
        for mode in ("Max", "Avg")
        for d in (1, 2, 3)
    },
    **{
        getattr(nn, name): _plain(name.lower())
        for name in ("ReLU", "ReLU6", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "SiLU", "ELU", "Mish", "Softplus")
    },
    nn.LeakyReLU: _plain("leaky_relu"),
    nn.GELU: lambda module: ("gelu", (module.approximate,)),
    nn.Softmax: lambda module: ("softmax", (module.dim,)),
    nn.LogSoftmax: lambda module: ("log_softmax", (module.dim,)),
    nn.Embedding: lambda module: ("embedding", (module.weight,)),
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent_module),
    nn.Flatten: _plain("flatten"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity), _plain("identity")),
}
