"""Draw layers to calibrate with, so that they cover the sizes that layers of real models have.

Each kind draws from a low-discrepancy sequence, so that any number of its samples covers the ranges evenly. The ranges
are those of the models in torchvision and timm: channels in multiples of eight, feature maps that shrink as channels
grow, one or few samples in a batch, token counts of images and sentences.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchsurgeon.prediction.samples import SampleTable

_MOST_FLOPS, _MOST_ELEMENTS, _MOST_WEIGHTS = 4e9, 4_000_000, 110_000_000
# Weights of so many elements fit into few caches, so that a linear layer of one row reads them from memory.
_LARGE_WEIGHTS = 4_000_000
_SIDES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 224)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer to time.

    Attributes:
        build: makes the module.
        shapes: the shapes of the tensors that it is called with.
        flops: about how many floating-point operations it takes.
        whole_below: where it is called with integers, these are below this; 0 where it is called with floats.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    flops: float
    whole_below: int = 0


class Draws:
    """Draws values from one point of a space-filling sequence; each draw uses up one of its coordinates.

    Args:
        point: the coordinates, in [0, 1).
    """

    def __init__(self, point: Sequence[float]) -> None:
        self._left = list(point)

    def number(self) -> float:
        """Return a number in [0, 1)."""
        return self._left.pop(0)

    def pick(self, choices: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        """Return one of the choices.

        Args:
            choices: what is chosen from.
            weights: how likely each is, in proportion; by default all alike.
        """
        shares = [1.0] * len(choices) if weights is None else list(weights)
        at = self.number() * sum(shares)
        for choice, share in zip(choices, shares, strict=True):
            at -= share
            if at < 0:
                return choice
        return choices[-1]

    def log(self, low: float, high: float, step: int = 1) -> int:
        """Return a whole number, evenly spread on a logarithmic scale.

        Args:
            low: the least.
            high: the most.
            step: in seven cases of eight the number is a multiple of this.
        """
        at = self.number()
        value: float = low * (high / low) ** at
        odd = (at * 1e4) % 1 < 0.125
        return max(round(value), 1) if odd or value < step else round(value / step) * step


Draw = Callable[[Draws], "Candidate | None"]


def candidates(kind: str, seed: int = 0) -> Iterator[Candidate]:
    """Yield layers of one kind, without end.

    Args:
        kind: one of ``sweep_kinds()``.
        seed: the same seed yields the same layers.

    Yields:
        Layers to time.
    """
    from scipy.stats import qmc

    sequence = qmc.Sobol(_DIMENSIONS, seed=seed)
    while True:
        for point in sequence.random(64):
            candidate = _DRAWS[kind](Draws(point.tolist()))
            if candidate is not None:
                yield candidate


def sweep_kinds() -> tuple[str, ...]:
    """Return every kind of layer that ``candidates()`` draws."""
    return tuple(_DRAWS)


_DIMENSIONS = 18


def _image(draws: Draws, channels: int) -> tuple[int, int, int]:
    """Return batch, height and width of a feature map with this many channels, of a size that models have."""
    batch = draws.pick((1, 2, 4, 8), (12, 1, 1, 1))
    room = [side for side in _SIDES if batch * channels * side * side <= _MOST_ELEMENTS]
    # Models halve the sides where they double the channels: from about 64 · 112² down to 2048 · 7².
    usual = [side for side in room if channels * side * side >= 2_000 or side == room[-1]]
    side = draws.pick(usual if draws.number() < 0.85 else room)
    side += draws.pick((0, -1, 1, 3), (8, 1, 1, 1)) if side > 4 else 0
    height = side if draws.number() < 0.85 else max(side // 2, 1)
    return batch, height, side


def _convolution(draws: Draws, grouped: str = "") -> Candidate | None:
    into = draws.pick((0, 3, 1), (14, 1, 0.2))
    channels = draws.log(8, 2048, 8)
    channels = into or channels
    out = draws.log(8, 2048, 8)
    kernel = draws.pick(
        (
            (1, 1), (3, 3), (5, 5), (7, 7), (11, 11), (1, 7), (7, 1), (1, 3), (3, 1), (2, 2), (4, 4), (16, 16),
            (15, 15), (31, 31),
        ),
        (30, 30, 6, 5, 2, 1.5, 1.5, 1.5, 1.5, 2, 2, 0.5, 1, 1),
    )  # fmt: skip
    groups = 1
    if grouped.startswith("depthwise"):
        channels = draws.log(8, 2048, 8)
        kernel = draws.pick(((3, 3), (5, 5), (7, 7), (9, 9)), (6, 4, 2, 1))
        if grouped == "depthwise, large":
            kernel = draws.pick(((11, 11), (13, 13), (21, 21), (31, 31), (51, 51)), (2, 2, 2, 2, 1))
        groups, out = channels, channels
    elif grouped:
        groups = draws.pick((2, 3, 4, 8, 16, 32, 64))
        channels, out = -(-channels // groups) * groups, -(-out // groups) * groups
    batch, height, width = _image(draws, channels)
    stride = draws.pick((1, 2, 4), (75, 22, 3))
    stride = kernel[0] if kernel[0] in (2, 4, 16) else stride
    dilation = draws.pick((1, 2), (15, 1)) if kernel[0] > 1 else 1
    padding = (dilation * (kernel[0] // 2) * (kernel[0] % 2), dilation * (kernel[1] // 2) * (kernel[1] % 2))
    reach = [dilation * (k - 1) + 1 for k in kernel]
    if height + 2 * padding[0] < reach[0] or width + 2 * padding[1] < reach[1]:
        return None
    outside = (-(-height // stride)) * (-(-width // stride))
    weights = out * channels // groups * kernel[0] * kernel[1]
    flops = 2.0 * batch * outside * weights
    # PyTorch computes depthwise convolutions of large kernels at a hundredth of the speed of others.
    most_flops = _MOST_FLOPS / 10 if kernel[0] > 9 else _MOST_FLOPS
    if flops > most_flops or weights > 20_000_000 or batch * out * outside > _MOST_ELEMENTS:
        return None
    bias = draws.number() < 0.3
    return Candidate(
        functools.partial(
            nn.Conv2d, channels, out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
        ),
        ((batch, channels, height, width),),
        flops,
    )


def _other_convolution(draws: Draws) -> Candidate | None:
    """Draw a convolution over one or three dimensions."""
    dims = draws.pick((1, 3), (1, 2))
    channels, out = draws.log(4, 512, 8), draws.log(8, 512, 8)
    batch, depthwise, stride = draws.pick((1, 2, 8), (8, 1, 1)), draws.number() < 0.2, draws.pick((1, 2), (3, 1))
    if dims == 1:
        size: tuple[int, ...] = (draws.log(16, 32768),)
        kernel: tuple[int, ...] = (draws.pick((1, 3, 5, 7, 10, 31, 128), (2, 4, 2, 2, 1, 1, 1)),)
    else:
        side = draws.pick((4, 7, 14, 28, 56, 112))
        size = (draws.pick((2, 4, 8, 16, 32)), side, side)
        kernel = draws.pick(((1, 1, 1), (3, 3, 3), (1, 3, 3), (3, 1, 1), (5, 5, 5)), (2, 5, 2, 2, 1))
    groups = 1
    if depthwise:
        groups, out = channels, channels
    elements, taps = math.prod(size), math.prod(kernel)
    flops = 2.0 * batch * elements * channels * out / groups * taps / stride**dims
    if flops > _MOST_FLOPS / 2 or batch * max(channels, out) * elements > _MOST_ELEMENTS:
        return None
    layer: Any = nn.Conv1d if dims == 1 else nn.Conv3d
    padding = tuple(side // 2 for side in kernel)
    return Candidate(
        functools.partial(layer, channels, out, kernel, stride, padding, groups=groups),
        ((batch, channels, *size),),
        flops,
    )


def _transposed(draws: Draws) -> Candidate | None:
    channels, out = draws.log(8, 1024, 8), draws.log(8, 512, 8)
    batch, height, width = _image(draws, channels)
    kernel, stride = draws.pick(((2, 2), (3, 2), (4, 2), (3, 1), (4, 4)))
    dims = draws.pick((2, 1, 3), (4, 1, 1))
    size = {1: (height * width,), 2: (height, width), 3: (4, height, width)}[dims]
    elements = batch * math.prod(size)
    flops = 2.0 * elements * channels * out * kernel**dims
    if flops > _MOST_FLOPS or elements * max(channels, out * stride**dims) > _MOST_ELEMENTS:
        return None
    layer = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    return Candidate(functools.partial(layer, channels, out, kernel, stride), ((batch, channels, *size),), flops)


def _large_linear(draws: Draws) -> Candidate:
    inner, out = draws.log(1024, 32768, 8), draws.log(512, 8192, 8)
    out = min(max(out, _LARGE_WEIGHTS // inner + 1), _MOST_WEIGHTS // inner)
    return Candidate(functools.partial(nn.Linear, inner, out), ((1, inner),), 2.0 * inner * out)


def _linear(draws: Draws) -> Candidate | None:
    single = draws.number() < 0.4
    rows = 1 if single else draws.log(2, 65536)
    inner, out = draws.log(16, 32768 if single else 4096, 8), draws.log(10, 32768 if single else 4096, 8)
    flops = 2.0 * rows * inner * out
    if flops > 2 * _MOST_FLOPS or inner * out > _MOST_WEIGHTS or rows * max(inner, out) > 4 * _MOST_ELEMENTS:
        return None
    batch = draws.pick((1, 2, 8, 32)) if rows % 32 == 0 else 1
    shape = (rows, inner) if draws.number() < 0.5 else (batch, rows // batch, inner)
    return Candidate(functools.partial(nn.Linear, inner, out), (shape,), flops)


class _FunctionModule(nn.Module):
    """Makes a module of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def _call(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    return functools.partial(_FunctionModule, function)


def _matmul(draws: Draws) -> Candidate | None:
    batch, rows, inner, columns = (draws.log(1, 256), draws.log(8, 1024), draws.log(8, 1024), draws.log(8, 1024))
    flops = 2.0 * batch * rows * inner * columns
    if flops > _MOST_FLOPS or batch * max(rows * inner, inner * columns, rows * columns) > _MOST_ELEMENTS:
        return None
    return Candidate(_call(torch.matmul), ((batch, rows, inner), (batch, inner, columns)), flops)


def _attention(draws: Draws) -> Candidate | None:
    heads, width = draws.log(1, 64), draws.pick((16, 24, 32, 48, 64, 80, 96, 128))
    queries = draws.log(8, 1024)
    keys = queries if draws.number() < 0.8 else draws.log(8, 1024)
    flops = 4.0 * heads * queries * keys * width
    if flops > _MOST_FLOPS or heads * queries * max(width, keys) > _MOST_ELEMENTS:
        return None
    q, k = (1, heads, queries, width), (1, heads, keys, width)
    shapes = (q, k, k, (1, 1, queries, keys)) if draws.number() < 0.4 else (q, k, k)
    return Candidate(_call(nn.functional.scaled_dot_product_attention), shapes, flops)


def _pooling(draws: Draws) -> Candidate | None:
    channels = draws.log(8, 2048, 8)
    batch, height, width = _image(draws, channels)
    form = draws.pick(("max", "avg", "adaptive avg", "adaptive max"), (4, 3, 4, 1))
    size = draws.pick((1, 1, 2, 6, 7))
    shape: tuple[tuple[int, ...], ...] = ((batch, channels, height, width),)
    kernel, stride = draws.pick(((2, 2), (3, 2), (3, 1), (5, 1)), (3, 3, 2, 1))
    flops = 1.0 * batch * channels * height * width
    if form.startswith("adaptive"):
        adaptive = nn.AdaptiveAvgPool2d if form.endswith("avg") else nn.AdaptiveMaxPool2d
        return Candidate(functools.partial(adaptive, size), shape, flops)
    if min(height, width) < kernel:
        return None
    dims = draws.pick((2, 1, 3), (6, 1, 1))
    shape = ((batch, channels, *{1: (height * width,), 2: (height, width), 3: (kernel, height, width)}[dims]),)
    if flops * kernel > _MOST_ELEMENTS and dims == 3:
        return None
    layer = getattr(nn, f"{'Max' if form == 'max' else 'Avg'}Pool{dims}d")
    return Candidate(functools.partial(layer, kernel, stride, kernel // 2 if kernel > 2 else 0), shape, flops)


_ACTIVATIONS: tuple[tuple[Callable[[], nn.Module], float], ...] = (
    (functools.partial(nn.ReLU, inplace=True), 4), (nn.ReLU, 3), (functools.partial(nn.ReLU6, inplace=True), 2),
    (functools.partial(nn.Hardswish, inplace=True), 2), (functools.partial(nn.SiLU, inplace=True), 2), (nn.SiLU, 2),
    (nn.Hardswish, 1), (nn.ReLU6, 1), (nn.GELU, 3), (functools.partial(nn.GELU, "tanh"), 1), (nn.Sigmoid, 2),
    (nn.Hardsigmoid, 1), (nn.Tanh, 1.5), (nn.LeakyReLU, 1), (functools.partial(nn.LeakyReLU, inplace=True), 1),
    (nn.ELU, 1), (nn.Mish, 1), (nn.Softplus, 1), (_call(torch.exp), 1), (_call(torch.rsqrt), 1),
    (_call(torch.square), 1),
)  # fmt: skip


def _elements(draws: Draws) -> tuple[int, ...]:
    """Return the shape of a feature map, of tokens, or of a row."""
    form = draws.number()
    if form < 0.6:
        channels = draws.log(8, 2048, 8)
        batch, height, width = _image(draws, channels)
        return batch, channels, height, width
    if form < 0.85:
        rows, width = draws.log(16, 4096), draws.log(32, 4096, 8)
        return (1, rows, width) if rows * width <= _MOST_ELEMENTS else (1, 64, width)
    return 1, draws.log(8, 16384, 8)


def _activation(draws: Draws) -> Candidate:
    build = draws.pick([build for build, _ in _ACTIVATIONS], [share for _, share in _ACTIVATIONS])
    shape = _elements(draws)
    return Candidate(build, (shape,), float(torch.Size(shape).numel()))


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 0.125


_BINARY: tuple[tuple[Callable[..., Any], float], ...] = (
    (torch.add, 4), (torch.mul, 4), (torch.sub, 1), (torch.div, 1), (torch.maximum, 0.5),
)  # fmt: skip


def _elementwise(draws: Draws) -> Candidate:
    function = draws.pick([call for call, _ in _BINARY], [share for _, share in _BINARY])
    form = draws.pick(("same", "channel", "last", "row", "scalar", "strided"), (4, 3, 2, 1, 2, 2))
    shape = _elements(draws)
    flops = float(torch.Size(shape).numel())
    if form == "scalar":
        return Candidate(_call(_scaled), (shape,), flops)
    if form == "strided":
        return Candidate(_call(functools.partial(_on_strided, function)), (shape, shape), flops)
    other = {
        "same": shape,
        "channel": (*shape[:2], *(1 for _ in shape[2:])),
        "last": shape[-1:],
        "row": (1, *shape[1:]),
    }[form]
    return Candidate(_call(function), (shape, other), flops)


def _swapped(x: torch.Tensor) -> torch.Tensor:
    """Return a view with the channels last, as transformers read the maps of a convolution."""
    return x.movedim(1, -1)


def _on_strided(function: Callable[..., Any], x: torch.Tensor, *others: torch.Tensor) -> Any:
    return function(_swapped(x), *map(_swapped, others))


class _Strided(nn.Module):
    """A layer that reads its input with the channels last."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(_swapped(x))


def _normalization(draws: Draws) -> Candidate | None:
    form = draws.pick(("batch", "layer", "strided layer", "group", "rms", "instance"), (6, 5, 2, 1, 1, 1))
    if form in ("layer", "rms"):
        rows, width = draws.log(1, 4096), draws.log(16, 4096, 8)
        if rows * width > _MOST_ELEMENTS:
            return None
        layer = nn.LayerNorm if form == "layer" else nn.RMSNorm
        return Candidate(functools.partial(layer, width), ((1, rows, width),), float(rows * width))
    channels = draws.log(8, 2048, 8)
    batch, height, width = _image(draws, channels)
    shape, flops = (batch, channels, height, width), float(batch * channels * height * width)
    if form == "batch":
        return Candidate(functools.partial(nn.BatchNorm2d, channels), (shape,), flops)
    if form == "instance":
        return (
            Candidate(functools.partial(nn.InstanceNorm2d, channels), (shape,), flops) if height * width > 1 else None
        )
    if form == "group":
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
        return Candidate(functools.partial(nn.GroupNorm, groups, channels), (shape,), flops)
    return Candidate(functools.partial(_Strided, functools.partial(nn.LayerNorm, channels)), (shape,), flops)


def _softmax(draws: Draws) -> Candidate | None:
    rows, length = draws.log(1, 16384), draws.log(8, 4096)
    if rows * length > _MOST_ELEMENTS:
        return None
    form = draws.pick(("softmax", "log", "outer"), (4, 1, 1))
    layer: Callable[..., nn.Module] = nn.LogSoftmax if form == "log" else nn.Softmax
    shape = (1, rows, length)
    return Candidate(functools.partial(layer, 1 if form == "outer" else -1), (shape,), float(rows * length))


def _argmax(x: torch.Tensor) -> torch.Tensor:
    return torch.argmax(x, -1)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return torch.mean(x, -1)


def _mean_maps(x: torch.Tensor) -> torch.Tensor:
    return x.mean((-2, -1))


def _sum(x: torch.Tensor) -> torch.Tensor:
    return torch.sum(x, -1)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return torch.amax(x, -1)


def _reduction(draws: Draws) -> Candidate | None:
    function = draws.pick((_argmax, _mean, _mean_maps, _sum, _largest))
    shape = _elements(draws)
    return Candidate(_call(function), (shape,), float(torch.Size(shape).numel())) if len(shape) > 2 else None


def _embedding(draws: Draws) -> Candidate:
    table, width, rows = draws.log(16, 50_000), draws.log(16, 2048, 8), draws.log(1, 2048)
    if draws.number() < 0.75:
        return Candidate(functools.partial(nn.Embedding, table, width), ((1, rows),), float(rows * width), table)
    return Candidate(_call(functools.partial(_taken, table)), ((table, width),), float(rows * width))


def _taken(table: int, x: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, torch.arange(0, table, 2, device=x.device))


def _recurrent(draws: Draws) -> Candidate | None:
    inputs, hidden = draws.log(16, 1024, 8), draws.log(16, 1024, 8)
    steps, batch = draws.log(1, 4096), draws.pick((1, 2, 4, 16, 64), (6, 1, 1, 1, 1))
    layer = draws.pick((nn.LSTM, nn.GRU, nn.RNN), (3, 2, 1))
    both = draws.number() < 0.3
    flops = 8.0 * steps * batch * hidden * (inputs + hidden) * (2 if both else 1)
    if flops > _MOST_FLOPS / 4:
        return None
    return Candidate(
        functools.partial(layer, inputs, hidden, batch_first=True, bidirectional=both),
        ((batch, steps, inputs),),
        flops,
    )


def _cat(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, 1)


def _cat_last(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, -1)


def _ordered(x: torch.Tensor) -> torch.Tensor:
    return _swapped(x).contiguous()


def _heads_out(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def _rolled(x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, (1, 1), (1, 2))


def _padded(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(x, (0, 1, 0, 1))


def _patches(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.unfold(x, 3, padding=1)


def _clone(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def _copy(draws: Draws) -> Candidate | None:
    form = draws.pick(("cat", "last", "order", "heads", "clone", "roll", "pad", "patches"), (6, 1, 3, 3, 2, 2, 2, 1))
    pieces = draws.pick((2, 3, 4, 6, 12), (8, 3, 4, 2, 1))
    shape = _elements(draws)
    count = torch.Size(shape).numel()
    if form in ("cat", "last"):
        shape = (shape[0], max(shape[1] // pieces, 1), *shape[2:])
        return Candidate(_call(_cat if form == "cat" else _cat_last), (shape,) * pieces, float(count))
    if form == "heads":
        tokens, heads, width = draws.log(16, 1024), draws.pick((3, 6, 8, 12, 16)), draws.pick((32, 64))
        return Candidate(_call(_heads_out), ((1, heads, tokens, width),), float(tokens * heads * width))
    if len(shape) < 4 and form in ("roll", "pad", "patches"):
        return None
    if form == "patches" and count > _MOST_ELEMENTS // 9:
        return None
    function = {"order": _ordered, "clone": _clone, "roll": _rolled, "pad": _padded, "patches": _patches}[form]
    return Candidate(_call(function), (shape,), float(count))


def _interpolation(draws: Draws) -> Candidate | None:
    channels = draws.log(1, 1024)
    batch, height, width = _image(draws, channels)
    mode, factor = draws.pick(("nearest", "bilinear", "bicubic"), (2, 3, 1)), draws.pick((2, 4, 8), (4, 2, 1))
    if batch * channels * height * width * factor**2 > _MOST_ELEMENTS or min(height, width) < 2:
        return None
    size = (height * factor, width * factor)
    function = functools.partial(nn.functional.interpolate, size=size, mode=mode)
    return Candidate(_call(function), ((batch, channels, height, width),), float(channels * size[0] * size[1]))


_DRAWS: dict[str, Draw] = {
    "convolution": _convolution,
    "convolution of other dimensions": _other_convolution,
    "depthwise convolution": functools.partial(_convolution, grouped="depthwise"),
    "depthwise convolution of large kernels": functools.partial(_convolution, grouped="depthwise, large"),
    "grouped convolution": functools.partial(_convolution, grouped="grouped"),
    "transposed convolution": _transposed,
    "linear": _linear,
    "linear of large weights": _large_linear,
    "matmul": _matmul,
    "attention": _attention,
    "pooling": _pooling,
    "activation": _activation,
    "elementwise": _elementwise,
    "normalization": _normalization,
    "softmax": _softmax,
    "reduction": _reduction,
    "embedding": _embedding,
    "recurrent": _recurrent,
    "copy": _copy,
    "interpolation": _interpolation,
}
RARE_KINDS: dict[str, tuple[str, Callable[[SampleTable], NDArray[np.bool_]]]] = {
    "convolution of other dimensions": ("convolution", lambda table: np.char.find(table.variants, "2d") < 0),
    "depthwise convolution of large kernels": (
        "depthwise convolution",
        lambda table: table.kind.named(table.sizes).kernel > 81,
    ),
    "linear of large weights": (
        "linear",
        lambda table: (table.sizes[:, 0] == 1) & (table.sizes[:, 1] * table.sizes[:, 2] > _LARGE_WEIGHTS),
    ),
}
"""Layers that are few among those of their kind, and whose speed the others tell little of: their kind, and which they
are among its samples."""
