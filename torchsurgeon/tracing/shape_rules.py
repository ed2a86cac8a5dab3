"""The shapes and flops of common layers, computed from the shapes of their inputs without calling a kernel.

A rule takes the layer (a module or a function) and its arguments, in which tensors are meta tensors, and returns an
``Outcome``. It returns None for a case it does not know; then PyTorch's own meta kernels are run, which takes many
times as long.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

META = torch.device("meta")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a layer does to shapes.

    Attributes:
        value: what it returns, with meta tensors.
        flops: its floating-point operations; multiply and add count as two.
        overwritten: whether it overwrites its first argument.
        uncounted: the operators inside it whose flops are unknown and not in ``flops``.
        bound: whether values decide its sizes, so that these are only the largest there can be.
    """

    value: Any
    flops: int = 0
    overwritten: bool = False
    uncounted: tuple[str, ...] = ()
    bound: bool = False


Rule = Callable[..., "Outcome | None"]


def rule_for(target: Any) -> Rule | None:
    """Return the rule for a module, by its exact class, or for a function; None where there is none."""
    if isinstance(target, nn.Module):
        kind = type(target)
        return _MODULE_RULES.get(kind) or _MODULE_RULES.get(f"{kind.__module__}.{kind.__qualname__}")
    if hasattr(target, "shape_rule"):
        return _own
    known = _FUNCTION_RULES.get(target)
    if known is None and isinstance(target, FunctionType):
        known = _FUNCTION_RULES.get(f"{target.__module__}.{target.__name__}")
    return known


def _own(target: Any, *args: Any) -> Outcome:
    return target.shape_rule(*args)  # type: ignore[no-any-return]


def register_shape_rule(module_class: type[nn.Module] | str, rule: Rule) -> None:
    """Use a shape rule for modules of exactly this class.

    Args:
        module_class: the class, or its qualified name, so that it need not be imported.
        rule: takes the module and its arguments and returns an ``Outcome``, or None for a case it does not know.
    """
    _MODULE_RULES[module_class] = rule


def _elementwise(module: nn.Module, x: torch.Tensor) -> Outcome | None:
    if getattr(module, "inplace", False):
        return Outcome(x, overwritten=True)
    return Outcome(torch.empty_like(x))


def _alike(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides that arithmetic gives its result.

    ``empty_like`` and PyTorch's meta kernels give dimensions of size one other strides, and those decide in which order
    in memory later kernels work.
    """
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device=META)
    if x.numel() == 1 + sum(stride * (size - 1) for size, stride in zip(x.shape, x.stride(), strict=True)):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return torch.empty_like(x)


def _row_major(module: nn.Module, x: torch.Tensor) -> Outcome | None:
    return Outcome(torch.empty(x.shape, dtype=x.dtype, device=META))


def _group_normalization(module: nn.GroupNorm, x: torch.Tensor) -> Outcome | None:
    if x.dim() == 4 and _suggests_channels_last(x):
        return Outcome(torch.empty_like(x))
    return _row_major(module, x) if x.dim() <= 4 or x.is_contiguous() else None


def _suggests_channels_last(x: torch.Tensor) -> bool:
    """Return whether PyTorch's kernels take images as lying channels last, by all strides, of sizes of one too."""
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        if not size or not stride or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * max(size, 1)
    return not x.is_contiguous()


def _same_object(module: nn.Module, x: torch.Tensor, *_: Any) -> Outcome | None:
    return Outcome(x) if not module.training else None


def _normalization(module: nn.Module, x: torch.Tensor) -> Outcome | None:
    return Outcome(torch.empty_like(x))


def _linear(module: nn.Linear, x: torch.Tensor) -> Outcome | None:
    if x.shape[-1:] != (module.in_features,):
        return None
    out = torch.empty((*x.shape[:-1], module.out_features), dtype=x.dtype, device=META)
    return Outcome(out, 2 * out.numel() * module.in_features)


def _convolution(module: Any, x: torch.Tensor) -> Outcome | None:
    spatial = len(module.kernel_size)
    if x.dim() != spatial + 2 or isinstance(module.padding, str) or x.shape[1] != module.in_channels:
        return None
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True
        )
    ]
    if min(size) < 1:
        return None
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
    return Outcome(out, 2 * out.numel() * products)


def _transposed_convolution(module: Any, x: torch.Tensor) -> Outcome | None:
    spatial = len(module.kernel_size)
    if x.dim() != spatial + 2 or x.shape[1] != module.in_channels or not x.is_contiguous():
        return None
    settings = zip(
        x.shape[2:],
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.output_padding,
        strict=True,
    )
    size = [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in settings]
    if min(size) < 1:
        return None
    out = torch.empty((x.shape[0], module.out_channels, *size), dtype=x.dtype, device=META)
    products = module.out_channels // module.groups
    for k in module.kernel_size:
        products *= k
    return Outcome(out, 2 * x.numel() * products)


def _binary(target: Any, x: Any, y: Any, **kwargs: Any) -> Outcome | None:
    if kwargs or not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return None
    if isinstance(y, torch.Tensor):
        if y.dtype != x.dtype:
            return None
        if y.shape != x.shape and x.dim() == y.dim() and x.is_contiguous() and y.is_contiguous():
            return _broadcast(x, y)
        if y.shape != x.shape or y.stride() != x.stride():
            return None
    elif not isinstance(y, (int, float)):
        return None
    return Outcome(_alike(x))


def _broadcast(x: torch.Tensor, y: torch.Tensor) -> Outcome | None:
    if any(a != b and a != 1 and b != 1 for a, b in zip(x.shape, y.shape, strict=True)):
        return None
    shape = tuple(max(a, b) if a and b else 0 for a, b in zip(x.shape, y.shape, strict=True))
    return Outcome(torch.empty(shape, dtype=x.dtype, device=META))


def _binary_in_place(target: Any, x: Any, y: Any) -> Outcome | None:
    known = _binary(target, x, y) if isinstance(x, torch.Tensor) else None
    if known is None or known.value.shape != x.shape:
        return None
    return Outcome(x, overwritten=True)


def _cat(target: Any, tensors: Any, dim: Any = 0, **kwargs: Any) -> Outcome | None:
    if kwargs or not isinstance(dim, int) or not all(isinstance(t, torch.Tensor) for t in tensors):
        return None
    first = tensors[0]
    dim = dim % first.dim() if first.dim() else 0
    shape = list(first.shape)
    for t in tensors[1:]:
        if t.dim() != len(shape) or t.dtype != first.dtype or not t.is_contiguous():
            return None
        if any(a != b for i, (a, b) in enumerate(zip(t.shape, shape, strict=True)) if i != dim):
            return None
        shape[dim] += t.shape[dim]
    if not first.is_contiguous():
        return None
    return Outcome(torch.empty(shape, dtype=first.dtype, device=META))


def _attention(
    module: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> Outcome | None:
    if query.dim() != 3 or kwargs.get("need_weights", True):
        return None
    batch, length = (0, 1) if module.batch_first else (1, 0)
    width, targets, sources = module.embed_dim, query.shape[length], key.shape[length]
    projections = 2 * targets * width + sources * (module.kdim + module.vdim)
    flops = 2 * query.shape[batch] * width * (projections + 2 * targets * sources)
    return Outcome((torch.empty_like(query), None), flops)


def _encoder_layer(module: Any, x: torch.Tensor, *_: Any, **__: Any) -> Outcome | None:
    if x.dim() != 3 or not x.is_contiguous() or not module.self_attn.batch_first:
        return None
    batch, length, width = x.shape
    products = 4 * width + 2 * length + 2 * module.linear1.out_features
    return Outcome(torch.empty_like(x), 2 * batch * length * width * products)


def _encoder(module: nn.TransformerEncoder, x: torch.Tensor, *_: Any, **__: Any) -> Outcome | None:
    # Padded sequences are packed by the values of their mask, which are not known: the flops are those without padding.
    parts = [_encoder_layer(layer, x) for layer in module.layers if type(layer) is nn.TransformerEncoderLayer]
    known = [part.flops for part in parts if part is not None]
    return Outcome(torch.empty_like(x), sum(known)) if len(known) == len(module.layers) else None


def _recurrent(module: nn.RNNBase, x: Any, state: Any = None) -> Outcome | None:
    if not isinstance(x, torch.Tensor) or x.dim() != 3 or module.proj_size:
        return None
    kept = 2 if isinstance(module, nn.LSTM) else 1
    weights = sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))
    layers, both = module.num_layers, module.bidirectional
    found = _over_time(x, module.hidden_size, layers, both, module.batch_first, kept, weights)
    out, *states = found.value
    return dataclasses.replace(found, value=(out, tuple(states) if kept > 1 else states[0]))


def _recurrent_function(
    target: Any,
    x: Any,
    state: Any,
    weights: Any,
    bias: Any,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Outcome | None:
    """The call by which a recurrent module that is itself the model runs; packed sequences have other arguments."""
    several = isinstance(state, (tuple, list))
    if not isinstance(weights, (tuple, list)) or not isinstance(x, torch.Tensor) or x.dim() != 3:
        return None
    hidden = state[0].shape[-1] if several else state.shape[-1]
    if several and state[1].shape[-1] != hidden:
        return None  # projections
    products = sum(one.numel() for one in weights if one.dim() == 2)
    return _over_time(x, hidden, layers, bidirectional, batch_first, 2 if several else 1, products)


def _over_time(
    x: torch.Tensor, hidden: int, layers: int, bidirectional: bool, batch_first: bool, kept: int, weights: int
) -> Outcome:
    """Return the output and the states of a recurrent network; PyTorch's meta kernels would take every step of time."""
    directions = 2 if bidirectional else 1
    outer, inner = (1, 0) if batch_first else (0, 1)
    # The kernel keeps time as the outer dimension, which the strides of its result show.
    out = torch.empty((x.shape[outer], x.shape[inner], directions * hidden), dtype=x.dtype, device=META)
    shape = (directions * layers, x.shape[inner], hidden)
    states = tuple(torch.empty(shape, dtype=x.dtype, device=META) for _ in range(kept))
    result = out.transpose(0, 1) if batch_first else out
    return Outcome((result, *states), 2 * x.shape[0] * x.shape[1] * weights)


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if not isinstance(value, (tuple, list)) else (value[0], value[1])


def _pooling(module: Any, x: torch.Tensor) -> Outcome | None:
    if module.ceil_mode or getattr(module, "return_indices", False) or x.dim() != 4 or not x.is_contiguous():
        return None
    parameters = (_pair(getattr(module, key, 1)) for key in ("kernel_size", "stride", "padding", "dilation"))
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], *parameters, strict=True)]
    return Outcome(torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=META)) if min(size) > 0 else None


def _adaptive_pooling(module: nn.AdaptiveAvgPool2d, x: torch.Tensor) -> Outcome | None:
    if x.dim() != 4 or not x.is_contiguous():
        return None
    size = [n if wanted is None else wanted for n, wanted in zip(x.shape[2:], _pair(module.output_size), strict=True)]
    return Outcome(torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=META))


def _interpolate(target: Any, x: Any, size: Any = None, *args: Any, **kwargs: Any) -> Outcome | None:
    # Where a size of one allows either memory order, only PyTorch's own kernel says which it takes.
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_contiguous() or min(x.shape[1:]) < 2:
        return None
    if size is None or any(args) or kwargs.get("scale_factor") is not None:
        return None
    return Outcome(torch.empty((*x.shape[:2], *_pair(size)), dtype=x.dtype, device=META))


def _window_attention(
    target: Any, x: torch.Tensor, qkv: Any, projection: Any, bias: Any, window: Any, *_: Any, **__: Any
) -> Outcome | None:
    if not x.is_contiguous():
        return None
    *outer, channels = x.shape
    if len(window) == 3:
        window = [min(size, side) for size, side in zip(outer[1:], window, strict=True)]
    tokens = outer[0] * math.prod(-(-size // side) * side for size, side in zip(outer[1:], window, strict=True))
    return Outcome(torch.empty_like(x), 4 * tokens * channels * (2 * channels + math.prod(window)))


def _window_bias(target: Any, table: torch.Tensor, index: Any, window: Any) -> Outcome:
    side = math.prod(window)
    return Outcome(torch.empty((1, table.shape[1], side, side), dtype=table.dtype, device=META))


def _embedding(module: nn.Embedding, tokens: torch.Tensor) -> Outcome | None:
    if module.max_norm is not None or not tokens.is_contiguous():
        return None
    shape = (*tokens.shape, module.embedding_dim)
    return Outcome(torch.empty(shape, dtype=module.weight.dtype, device=META))


_MODULE_RULES: dict[type | str, Rule] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _recurrent),
    nn.Embedding: _embedding,
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d), _pooling),
    nn.AdaptiveAvgPool2d: _adaptive_pooling,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed_convolution),
    nn.Linear: _linear,
    nn.MultiheadAttention: _attention,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _normalization),
    **dict.fromkeys((nn.LayerNorm, nn.Softmax), _row_major),
    nn.GroupNorm: _group_normalization,
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU),
        _elementwise,
    ),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity), _same_object),
}
_FUNCTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys((operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul), _binary),
    **dict.fromkeys((operator.truediv, torch.div), _binary),
    **dict.fromkeys((operator.iadd, operator.isub, operator.imul), _binary_in_place),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent_function),
    nn.functional.interpolate: _interpolate,
    "torchvision.models.swin_transformer.shifted_window_attention": _window_attention,
    "torchvision.models.swin_transformer._get_relative_position_bias": _window_bias,
    "torchvision.models.video.swin_transformer.shifted_window_attention_3d": _window_attention,
}
