"""Describe calls of PyTorch as operations, from their names, arguments and outputs, which are meta tensors."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchsurgeon.prediction import composites
from torchsurgeon.prediction.kinds import Operation
from torchsurgeon.tracing.shapes import storage_of, tensors_in

Describe = Callable[..., "Operation | Sequence[Operation]"]
"""Takes (name, output, *args, **kwargs) of a call and returns its operations."""

VIEW = Operation("view", "view", ())
"""A call that reads and writes nothing."""


def is_known(name: str) -> bool:
    """Return whether calls of a function or method of this name can be described."""
    return name in _CALLS


def described(name: str, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Operation]:
    """Return the operations of a call.

    Args:
        name: the name of the function or method, for which ``is_known()`` returns True.
        out: what the call returned.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    named = {key: value for key, value in kwargs.items() if key != "out"}
    try:
        found = _CALLS[name](name, out, *args, **named)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        # The descriptions take arguments in their usual places; this call has them in others.
        return [unknown(name, out, args, kwargs)]
    operations = [found] if isinstance(found, Operation) else found
    return [operation if all(operation.sizes) else VIEW for operation in operations]


def unknown(name: str, out: Any, args: Any, kwargs: Any) -> Operation:
    """Return an operation that stands for a call without a description: the elements it reads and writes.

    Args:
        name: the name of the function or method.
        out: what the call returned.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    moved = [*tensors_in(out), *tensors_in([args, kwargs])]
    elements = sum(t.numel() for t in moved)
    return Operation("unknown", name, (elements,), max((t.element_size() for t in moved), default=4))


def _item(tensor: torch.Tensor) -> int:
    return tensor.element_size()


def _suffix(*tensors: torch.Tensor) -> str:
    """Return the end of a variant's name; reading memory in another order than it lies in takes longer."""
    return "" if all(t.is_contiguous() for t in tensors) else " strided"


def _convolution(
    name: str,
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    *more: Any,
    **named: Any,
) -> Operation:
    transposed = "transpose" in name
    names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    settings = dict(zip(names, more, strict=False)) | named
    groups = int(settings.get("groups", 1))
    dims = weight.dim() - 2
    batch = input.shape[0] if input.dim() == weight.dim() else 1
    channels = input.shape[-dims - 1]
    out_channels = out.shape[-dims - 1]
    if transposed:
        kind = "transposed convolution"
    elif groups == 1:
        kind = "convolution"
    else:
        kind = "depthwise convolution" if groups == channels else "grouped convolution"
    last = input.dim() == 4 and not input.is_contiguous()
    return Operation(
        kind,
        f"{dims}d" + (" channels last" if last else ""),
        (
            batch,
            channels,
            out_channels,
            groups,
            math.prod(input.shape[-dims:]),
            math.prod(out.shape[-dims:]),
            math.prod(weight.shape[2:]),
            _product(stride, dims),
            _product(settings.get("dilation", 1), dims),
        ),
        _item(input),
    )


def _product(value: Any, dims: int) -> int:
    """Return the product of a setting over all dimensions; one number stands for all of them."""
    sizes = [value] * dims if isinstance(value, int) else list(value)
    return math.prod(int(size) for size in (sizes if len(sizes) == dims else sizes[:1] * dims))


def _linear(name: str, out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> Operation:
    inner = input.shape[-1]
    rows = input.numel() // max(inner, 1)
    return Operation("linear", "linear" + _suffix(input), (rows, inner, out.shape[-1]), _item(input))


def _matmul(name: str, out: torch.Tensor, *args: Any, **named: Any) -> Operation:
    a, b = tensors_in([args, named])[-2:]
    inner = a.shape[-1]
    rows, columns = (a.shape[-2] if a.dim() > 1 else 1), (b.shape[-1] if b.dim() > 1 else 1)
    batch = out.numel() // max(rows * columns, 1)
    return Operation("matmul", "matmul", (batch, rows, inner, columns), _item(a))


def _attention(
    name: str,
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Operation:
    heads = query.numel() // max(query.shape[-1] * query.shape[-2], 1)
    # One of the two products has the width of queries and keys, the other that of the values.
    width = (query.shape[-1] + value.shape[-1] + 1) // 2
    variant = "masked" if attn_mask is not None or is_causal else "plain"
    return Operation("attention", variant, (heads, query.shape[-2], key.shape[-2], width), _item(query))


def _einsum(name: str, out: torch.Tensor, equation: str, *tensors: Any) -> list[Operation]:
    """Return an einsum of two tensors as the batched matrix product that PyTorch computes it by.

    One of more tensors is not described.
    """
    given = tensors_in(tensors)
    if len(given) != 2:
        return [unknown(name, out, given, {})]
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    # The dimensions that an ellipsis stands for get letters, from the last one on, as broadcasting aligns them.
    ranks = [tensor.dim() - len(term.replace("...", "")) for term, tensor in zip(terms, given, strict=True)]
    spare = "".join(sorted(set(string.ascii_letters) - set(equation)))[: max(*ranks, 0)]
    a, b = (term.replace("...", spare[len(spare) - n :]) for term, n in zip(terms, ranks, strict=True))
    result = result.replace("...", spare) if arrow else spare
    sizes = dict(zip(a, given[0].shape, strict=True))
    for letter, size in zip(b, given[1].shape, strict=True):
        sizes[letter] = max(size, sizes.get(letter, 1))
    both = set(a) & set(b)
    batch, inner = (math.prod(sizes[c] for c in both if (c in result) is kept) for kept in (True, False))
    rows, columns = (math.prod(sizes[c] for c in term if c not in both) for term in (a, b))
    return [Operation("matmul", "matmul", (batch, rows, inner, columns), _item(given[0]))]


def _pooling(name: str, out: Any, input: torch.Tensor, kernel: Any = None, *_: Any, **named: Any) -> Operation:
    result = tensors_in(out)[0]
    dims = next(int(d) for d in name if d in "123")
    in_size, out_size = math.prod(input.shape[-dims:]), math.prod(result.shape[-dims:])
    adaptive = name.startswith("adaptive")
    window = named.get("kernel_size", kernel)
    taps = max(in_size // max(out_size, 1), 1) if adaptive else _product(window, dims)
    variant = ("adaptive " if adaptive else "") + ("max" if "max" in name else "average")
    last = input.dim() == 4 and not input.is_contiguous()
    variant += " channels last" if last else ""
    return Operation("pooling", variant, (input.numel() // max(in_size, 1), in_size, out_size, taps), _item(input))


def _activation(name: str, out: torch.Tensor, input: torch.Tensor, *_: Any, **named: Any) -> Operation:
    variant = _ACTIVATION_NAMES.get(name, name)
    if named.get("approximate", "none") != "none" or (name == "gelu" and _ and _[0] != "none"):
        variant += f" {named.get('approximate', _[0] if _ else '')}"
    shared = out is input or storage_of(out) == storage_of(input)
    return Operation("activation", variant + (" in place" if shared else ""), (input.numel(),), _item(input))


def _elementwise(name: str, out: torch.Tensor, *args: Any, **named: Any) -> Operation:
    tensors = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor)]
    spread = any(t.numel() not in (1, out.numel()) for t in tensors)
    order = "" if all(t.is_contiguous() or t.numel() == 1 for t in tensors) else " strided"
    variant = _ELEMENTWISE_NAMES.get(name, name) + (" broadcast" if spread else order)
    if not out.dtype.is_floating_point:
        variant += f" {str(out.dtype).removeprefix('torch.')}"
    read = sum(t.numel() for t in tensors)
    return Operation("elementwise", variant, (out.numel(), read), max((_item(t) for t in tensors), default=_item(out)))


def _normalization(name: str, out: Any, input: torch.Tensor, *args: Any, **named: Any) -> Operation:
    elements = input.numel()
    if name in ("layer_norm", "rms_norm"):
        rows = elements // max(math.prod(args[0] if args else named["normalized_shape"]), 1)
    elif name == "group_norm":
        rows = input.shape[0] * int(args[0] if args else named["num_groups"])
    else:
        rows = input.shape[0] * (input.shape[1] if input.dim() > 1 else 1)
    variant = name + _suffix(input)
    return Operation("normalization", variant, (rows, elements // max(rows, 1)), _item(input))


def _softmax(name: str, out: torch.Tensor, input: torch.Tensor, dim: Any = -1, *_: Any, **named: Any) -> Operation:
    along = dim if isinstance(dim, int) else -1
    length = input.shape[along] if input.dim() else 1
    inner = along in (-1, input.dim() - 1)
    return Operation(
        "softmax", name + ("" if inner else " outer"), (input.numel() // max(length, 1), length), _item(input)
    )


def _reduction(name: str, out: Any, input: torch.Tensor, *_: Any, **named: Any) -> Operation:
    rows = max((t.numel() for t in tensors_in(out)), default=1)
    return Operation("reduction", name, (rows, input.numel() // max(rows, 1)), _item(input))


def _embedding(name: str, out: torch.Tensor, *args: Any, **named: Any) -> Operation:
    given = tensors_in([args, named])
    table = next((t for t in given if t.is_floating_point()), given[0])
    width = table.shape[-1] if table.dim() > 1 else 1
    sizes = (out.numel() // max(width, 1), width, table.numel() // max(width, 1))
    return Operation("embedding", name, sizes, _item(table))


def _copy(name: str, out: Any, *args: Any, **named: Any) -> Operation:
    """Return a copy; a view where the result shares the memory of an argument."""
    results, given = tensors_in(out), tensors_in([args, named])
    if not results:
        return VIEW
    homes = {storage_of(t) for t in given}
    if all(storage_of(t) in homes for t in results) and name not in _WRITING:
        return VIEW
    variant = "cat" if name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack") else _COPY_NAMES.get(name)
    elements = sum(t.numel() for t in results)
    run = min((_run(t) for t in given), default=elements)
    if variant is None:
        variant = "copy" if all(t.is_contiguous() for t in given) else "copy strided"
    if variant == "cat" and len(results) == 1:
        dim = next((a for a in (*args[1:], named.get("dim")) if isinstance(a, int)), 0)
        run = min(math.prod(t.shape[dim:]) if dim >= 0 else math.prod(t.shape[t.dim() + dim :]) for t in given)
    return Operation("copy", variant, (elements, max(len(given), 1), max(run, 1)), _item(results[0]))


def _run(tensor: torch.Tensor) -> int:
    """Return how many elements that follow one another in the tensor also do so in memory."""
    length = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != length and size != 1:
            break
        length *= size
    return length


def _interpolation(name: str, out: torch.Tensor, input: torch.Tensor, *args: Any, **named: Any) -> Operation:
    words = [named["mode"]] if "mode" in named else [name, *(a for a in args if isinstance(a, str))]
    mode = next((m for m in ("bilinear", "bicubic", "nearest", "linear", "area") if any(m in w for w in words)), None)
    mode = mode or ("bilinear" if name.startswith("grid") else "nearest")
    in_size, out_size = math.prod(input.shape[2:]), math.prod(out.shape[2:])
    return Operation("interpolation", mode, (input.numel() // max(in_size, 1), in_size, out_size), _item(input))


def _nothing(name: str, out: Any, *args: Any, **named: Any) -> Operation:
    return VIEW


_ACTIVATION_NAMES = {
    "hardtanh": "relu6",
    "relu_": "relu",
    "clamp": "relu6",
    "swish": "silu",
    "log_sigmoid": "logsigmoid",
}
_ELEMENTWISE_NAMES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "radd": "add",
    "rsub": "sub", "rmul": "mul", "rtruediv": "div", "greater_equal": "ge",
}  # fmt: skip
_COPY_NAMES = {
    "pad": "pad", "roll": "roll", "unfold": "unfold", "fold": "fold", "im2col": "unfold", "col2im": "fold",
    "flip": "copy strided", "getitem": "copy strided", "setitem": "copy", "zero": "copy", "fill": "copy",
    "repeat": "repeat", "repeat_interleave": "repeat", "tile": "repeat",
    "pixel_shuffle": "copy strided", "pixel_unshuffle": "copy strided", "channel_shuffle": "copy strided",
}  # fmt: skip
_WRITING = {"setitem", "copy", "zero", "fill"}


def _names(describe: Describe, names: str) -> dict[str, Describe]:
    return dict.fromkeys(names.split(), describe)


_CALLS: dict[str, Describe] = {
    **_names(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_names(_linear, "linear"),
    **_names(_matmul, "matmul mm bmm baddbmm addmm rmatmul mv dot"),
    **_names(_attention, "scaled_dot_product_attention"),
    **_names(composites.fused_attention, "native_multi_head_attention"),
    **_names(composites.attention_forward, "multi_head_attention_forward"),
    **_names(_einsum, "einsum"),
    **_names(composites.fused_encoder, "transformer_encoder_layer_fwd"),
    **_names(
        _pooling,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices "
        "max_pool2d_with_indices max_pool3d_with_indices",
    ),
    **_names(
        _activation,
        "relu relu6 hardtanh hardswish hardsigmoid sigmoid tanh silu gelu elu selu celu leaky_relu prelu softplus "
        "mish logsigmoid softsign hardshrink tanhshrink clamp clamp_min clamp_max exp log sqrt rsqrt square abs neg "
        "erf sin cos reciprocal rrelu softshrink threshold glu log_sigmoid exp2 log2 log1p expm1 sign round floor ceil",
    ),
    **_names(
        _elementwise,
        "add sub mul div truediv true_divide divide multiply subtract radd rsub rmul rtruediv floordiv floor_divide "
        "pow remainder mod maximum minimum where masked_fill eq ne lt le gt ge greater_equal and or xor logical_and "
        "logical_or logical_not invert bitwise_and bitwise_or bitwise_not addcmul addcdiv lerp atan2 diff tril triu "
        "isnan isinf isfinite",
    ),
    **_names(_normalization, "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm"),
    **_names(_softmax, "softmax log_softmax softmin"),
    **_names(composites.normalize, "normalize"),
    **_names(
        _reduction,
        "argmax argmin mean sum max min amax amin prod norm vector_norm var std var_mean topk sort all any cumsum "
        "cumprod logsumexp median count_nonzero",
    ),
    **_names(_embedding, "embedding embedding_bag gather index_select take_along_dim index"),
    **_names(composites.recurrent, "lstm gru rnn_tanh rnn_relu"),
    **_names(
        _copy,
        "cat concat concatenate stack hstack vstack contiguous clone reshape flatten pad roll unfold fold im2col "
        "col2im flip setitem repeat repeat_interleave tile pixel_shuffle pixel_unshuffle channel_shuffle to type_as "
        "getitem float half bfloat16 double int long bool copy expand_as meshgrid reshape_as zero fill lift_fresh_copy",
    ),
    **_names(
        _interpolation,
        "interpolate upsample upsample_nearest2d upsample_bilinear2d upsample_bicubic2d grid_sample "
        "grid_sampler grid_sampler_2d",
    ),
    **_names(
        _nothing,
        "view permute transpose t squeeze unsqueeze expand slice select narrow chunk split unbind dropout "
        "alpha_dropout feature_dropout dropout2d stochastic_depth detach size dim numel movedim swapaxes unflatten "
        "view_as broadcast_to alias getattr zeros ones empty full arange zeros_like ones_like empty_like full_like "
        "new_zeros new_ones new_empty new_full tensor as_tensor scalar_tensor split_with_sizes identity lift_fresh "
        "requires_grad as_strided diagonal real T mT assert_async item is_contiguous stride tensor_split hsplit vsplit "
        "linspace view_as_complex view_as_real unsafe_chunk unsafe_split",
    ),
}
"""The description of each call, by the name that torch, ``torch.nn.functional``, methods and ATen share."""
