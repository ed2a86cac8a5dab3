"""Which operations a traced model's layers come to, from shapes alone: nothing is run.

A layer that is one call of PyTorch is described by its arguments. One that is more (a module kept whole, a function of
the user's or of torchvision's) is followed once on meta tensors and described call by call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchsurgeon.graph import LayerGraph
from torchsurgeon.predict.kinds import Operation
from torchsurgeon.program import Step, function_name, map_refs
from torchsurgeon.shapes import MetaModel, storage_of, tensors_in

Describe = Callable[..., "Operation | Sequence[Operation]"]
"""From (name, output, *args, **kwargs) of a call to what it comes to."""


def operations(graph: LayerGraph) -> list[list[Operation]]:
    """Return each layer's operations, in the layers' order.

    Steps that are no layer of their own (a size read, one of several results taken) count to the layer after them, as
    in a measured profile.
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


def _of_step(
    step: Step, values: Sequence[Any], source: MetaModel, followed: dict[Any, list[Operation]]
) -> list[Operation]:
    args, kwargs = map_refs(lambda ref: values[ref.step], (step.args, step.kwargs))
    out = values[step.index]
    if step.is_module:
        flat = _MODULES.get(type(step.target))
        if flat is not None and not kwargs:
            name, rest = flat(step.target)
            return _described(name, out, (*args, *rest), {})
    else:
        name = step.type_name.strip("_")
        if not tensors_in(out):
            return []
        if name in _CALLS:
            return _described(name, out, args, kwargs)
    key = _configuration(step, args, kwargs)
    if key not in followed:
        followed[key] = _follow(step, source, args, kwargs, out)
    return followed[key]


def _described(name: str, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Operation]:
    described = _CALLS[name](name, out, *args, **kwargs)
    return [described] if isinstance(described, Operation) else list(described)


def _configuration(step: Step, args: Any, kwargs: Any) -> Any:
    """Equal for steps that come to the same operations."""
    tensors = tuple((t.dtype, tuple(t.shape), t.stride()) for t in tensors_in([args, kwargs]))
    if not step.is_module:
        return step.type_name, tensors, repr([a for a in args if not tensors_in(a)])
    parts = tuple((type(part), part.extra_repr()) for part in step.target.modules())
    return parts, tuple(tuple(p.shape) for p in step.target.parameters()), tensors


def _follow(step: Step, source: MetaModel, args: Any, kwargs: Any, out: Any) -> list[Operation]:
    with torch.inference_mode(False), torch.no_grad(), _Follow() as follow:
        try:
            if step.is_method:
                getattr(args[0], step.target)(*args[1:], **kwargs)
            else:
                (source.module(step.target) if step.is_module else step.target)(*args, **kwargs)
        except Exception:
            # A layer that needs values cannot be followed on meta tensors.
            return [_unknown(step.type_name, out, args, kwargs)]
    return follow.found or ([_unknown(step.type_name, out, args, kwargs)] if tensors_in(out) else [])


class _Follow(TorchFunctionMode):
    """Notes every call of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func).strip("_")
        if name == "get":  # a property of a tensor, such as its shape
            return func(*args, **kwargs)
        if name in _CALLS:
            out = func(*args, **kwargs)
            if tensors_in(out):
                self.found += _described(name, out, args, kwargs)
            return out
        out = func(*args, **kwargs)
        if tensors_in(out):
            self.found.append(_unknown(name, out, args, kwargs))
        return out


def _unknown(name: str, out: Any, args: Any, kwargs: Any) -> Operation:
    moved = [*tensors_in(out), *tensors_in([args, kwargs])]
    elements = sum(t.numel() for t in moved)
    return Operation("unknown", name, (elements,), max((t.element_size() for t in moved), default=4))


def _item(tensor: torch.Tensor) -> int:
    return tensor.element_size()


def _suffix(*tensors: torch.Tensor) -> str:
    """Memory read in another order than it lies in costs more."""
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
    if isinstance(value, int):
        return value**dims
    return math.prod(value) if len(value) == dims else int(value[0]) ** dims


def _linear(name: str, out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> Operation:
    inner = input.shape[-1]
    rows = input.numel() // max(inner, 1)
    return Operation("linear", "linear" + _suffix(input), (rows, inner, out.shape[-1]), _item(input))


def _matmul(name: str, out: torch.Tensor, *args: torch.Tensor, **named: Any) -> Operation:
    a, b = (args[-2], args[-1]) if len(args) > 1 else (args[0], named.get("other", named.get("mat2")))
    inner = a.shape[-1]
    rows, columns = (a.shape[-2] if a.dim() > 1 else 1), (b.shape[-1] if b.dim() > 1 else 1)
    batch = out.numel() // max(rows * columns, 1)
    return Operation("matmul", "matmul", (batch, rows, inner, columns), _item(a))


def _attention(
    name: str, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: Any, attn_mask: Any = None, **_: Any
) -> Operation:
    heads = query.numel() // max(query.shape[-1] * query.shape[-2], 1)
    variant = "masked" if attn_mask is not None or _.get("is_causal") else "plain"
    return Operation("attention", variant, (heads, query.shape[-2], key.shape[-2], query.shape[-1]), _item(query))


def _fused_attention(
    name: str,
    out: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    width: int,
    heads: int,
    *_: Any,
    **__: Any,
) -> list[Operation]:
    batch, targets, sources = query.shape[0], query.shape[1], key.shape[1]
    item = _item(query)
    return [
        Operation("linear", "linear", (batch * targets, width, 3 * width), item),
        Operation("attention", "plain", (batch * heads, targets, sources, width // heads), item),
        Operation("linear", "linear", (batch * targets, width, width), item),
    ]


def _attention_forward(
    name: str,
    out: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    width: int,
    heads: int,
    *_: Any,
    **__: Any,
) -> list[Operation]:
    query, key = (t.transpose(0, 1) if t.dim() == 3 else t.unsqueeze(0) for t in (query, key))
    return _fused_attention(name, out, query, key, key, width, heads)


def _einsum(name: str, out: torch.Tensor, equation: str, *tensors: Any) -> list[Operation]:
    """A product of two as the batched matrix product PyTorch makes of it; more are taken one after another."""
    given = tensors_in(tensors)
    if len(given) != 2 or "." in equation:
        return [_unknown(name, out, given, {})]
    left, _, result = equation.replace(" ", "").partition("->")
    a, b = left.split(",")
    sizes = dict(zip(a, given[0].shape, strict=True)) | dict(zip(b, given[1].shape, strict=True))
    both = set(a) & set(b)
    batch, inner = (math.prod(sizes[c] for c in both if (c in result) is kept) for kept in (True, False))
    rows, columns = (math.prod(sizes[c] for c in term if c not in both) for term in (a, b))
    return [Operation("matmul", "matmul", (batch, rows, inner, columns), _item(given[0]))]


def _fused_encoder(
    name: str, out: Any, x: torch.Tensor, width: int, heads: int, *rest: Any, **named: Any
) -> list[Operation]:
    rows, item, hidden = x.shape[0] * x.shape[1], _item(x), rest[11].shape[0]
    return [
        *_fused_attention(name, out, x, x, x, width, heads),
        Operation("normalization", "layer_norm", (rows, width), item),
        Operation("linear", "linear", (rows, width, hidden), item),
        Operation("activation", "gelu" if rest[5] else "relu", (rows * hidden,), item),
        Operation("linear", "linear", (rows, hidden, width), item),
        Operation("elementwise", "add", (rows * width, 2 * rows * width), item),
        Operation("elementwise", "add", (rows * width, 2 * rows * width), item),
        Operation("normalization", "layer_norm", (rows, width), item),
    ]


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
    table = args[1] if name == "embedding" and args[0].dtype in (torch.int32, torch.int64) else args[0]
    width = table.shape[-1] if table.dim() > 1 else 1
    return Operation(
        "embedding",
        name,
        (out.numel() // max(width, 1), width, table.numel() // max(width, 1)),
        _item(table),
    )


def _recurrent(name: str, out: Any, input: torch.Tensor, *args: Any, **named: Any) -> Operation:
    weights = next(a for a in args if isinstance(a, (tuple, list)) and len(a) > 2)
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    first = bool(args[-1])
    hidden = weights[1].shape[1]
    layers, both = next((a, b) for a, b in zip(args[3:], [*args[6:], False], strict=False) if type(a) is int)
    steps, batch = (input.shape[1], input.shape[0]) if first else (input.shape[0], input.shape[1])
    sizes = (steps, batch, input.shape[2], hidden, gates, layers * (2 if both else 1))
    return Operation("recurrent", name.removesuffix("_tanh").removesuffix("_relu"), sizes, _item(input))


def _recurrent_module(module: nn.RNNBase) -> tuple[str, tuple[Any, ...]]:
    weights = module._flat_weights
    name = module.mode.lower()
    return name, (None, weights, True, module.num_layers, 0.0, False, module.bidirectional, module.batch_first)


def _copy(name: str, out: Any, *args: Any, **named: Any) -> Operation:
    """A copy, or a view where no memory moves."""
    results, given = tensors_in(out), tensors_in([args, named])
    if not results:
        return Operation("view", "view", ())
    homes = {storage_of(t) for t in given}
    if all(storage_of(t) in homes for t in results) and name not in _WRITING:
        return Operation("view", "view", ())
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
    """How many elements that follow one another in the tensor do so in memory."""
    length = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != length and size != 1:
            break
        length *= size
    return length


def _interpolation(name: str, out: torch.Tensor, input: torch.Tensor, *args: Any, **named: Any) -> Operation:
    mode = named.get("mode", next((a for a in args if isinstance(a, str)), "nearest"))
    in_size, out_size = math.prod(input.shape[2:]), math.prod(out.shape[2:])
    return Operation("interpolation", mode, (input.numel() // max(in_size, 1), in_size, out_size), _item(input))


def _nothing(name: str, out: Any, *args: Any, **named: Any) -> Operation:
    return Operation("view", "view", ())


_ACTIVATION_NAMES = {"hardtanh": "relu6", "relu_": "relu", "clamp": "relu6", "swish": "silu"}
_ELEMENTWISE_NAMES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "radd": "add",
    "rsub": "sub", "rmul": "mul", "rtruediv": "div", "greater_equal": "ge",
}  # fmt: skip
_COPY_NAMES = {
    "pad": "pad", "roll": "roll", "unfold": "unfold", "fold": "fold", "im2col": "unfold", "col2im": "fold",
    "flip": "copy strided", "setitem": "copy", "repeat": "repeat", "repeat_interleave": "repeat", "tile": "repeat",
    "pixel_shuffle": "copy strided", "pixel_unshuffle": "copy strided", "channel_shuffle": "copy strided",
}  # fmt: skip
_WRITING = {"setitem", "copy"}


def _names(describe: Describe, names: str) -> dict[str, Describe]:
    return dict.fromkeys(names.split(), describe)


_CALLS: dict[str, Describe] = {
    **_names(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_names(_linear, "linear"),
    **_names(_matmul, "matmul mm bmm baddbmm addmm rmatmul mv dot"),
    **_names(_attention, "scaled_dot_product_attention"),
    **_names(_fused_attention, "native_multi_head_attention"),
    **_names(_attention_forward, "multi_head_attention_forward"),
    **_names(_einsum, "einsum"),
    **_names(_fused_encoder, "transformer_encoder_layer_fwd"),
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
        "erf sin cos reciprocal",
    ),
    **_names(
        _elementwise,
        "add sub mul div truediv true_divide divide multiply subtract radd rsub rmul rtruediv floordiv floor_divide pow "
        "remainder mod maximum minimum where masked_fill eq ne lt le gt ge greater_equal and or xor logical_and "
        "logical_or logical_not invert bitwise_and bitwise_or bitwise_not addcmul addcdiv lerp",
    ),
    **_names(_normalization, "batch_norm layer_norm group_norm instance_norm rms_norm"),
    **_names(_softmax, "softmax log_softmax"),
    **_names(
        _reduction, "argmax argmin mean sum max min amax amin prod norm var std var_mean topk sort all any cumsum"
    ),
    **_names(_embedding, "embedding gather index_select take_along_dim index"),
    **_names(_recurrent, "lstm gru rnn_tanh rnn_relu"),
    **_names(
        _copy,
        "cat concat concatenate stack hstack vstack contiguous clone reshape flatten pad roll unfold fold im2col "
        "col2im flip setitem repeat repeat_interleave tile pixel_shuffle pixel_unshuffle channel_shuffle to type_as "
        "float half copy expand_as meshgrid",
    ),
    **_names(_interpolation, "interpolate upsample upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"),
    **_names(
        _nothing,
        "view permute transpose t squeeze unsqueeze expand getitem slice select narrow chunk split unbind dropout "
        "alpha_dropout feature_dropout dropout2d stochastic_depth detach size dim numel movedim swapaxes unflatten "
        "view_as broadcast_to alias getattr zeros ones empty full arange zeros_like ones_like empty_like full_like "
        "new_zeros new_ones new_empty new_full tensor as_tensor scalar_tensor split_with_sizes identity lift_fresh "
        "requires_grad as_strided diagonal real T mT assert_async item is_contiguous stride",
    ),
}
"""What each call of PyTorch comes to, by the name that torch, ``torch.nn.functional``, methods and ATen share."""


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


def leaves(graph: LayerGraph) -> Iterator[tuple[str, Operation]]:
    """Yield the layer's name with each of its operations."""
    for layer, found in zip(graph.layers, operations(graph), strict=True):
        for operation in found:
            yield layer.name, operation
