"""Draw small networks at random, to time layers among the neighbors that they have in real models.

A layer that runs alone finds its input, its code and its weights in the caches, which one in the middle of a network
does not. So most of a calibration times whole networks. They are made of the building blocks of published
architectures, in random widths, depths, kernels and resolutions; none of them is a published network.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchsurgeon.prediction.blocks import (
    Activation,
    Attention,
    Branches,
    ChannelsFirst,
    ChannelsLast,
    ChannelsLastBlock,
    Dense,
    EncoderLayer,
    Hourglass,
    Merge,
    ModuleAttention,
    Positions,
    Recurrent,
    Residual,
    SqueezeExcitation,
    Tokens,
    Upsample,
    WindowAttention,
)


@dataclasses.dataclass(frozen=True)
class Net:
    """A network.

    Attributes:
        model: the network.
        example: an example of its input.
    """

    model: nn.Module
    example: torch.Tensor


def random_net(rng: random.Random) -> Net:
    """Return a network that is drawn at random. Its weights are not set; see ``settle()``."""
    return rng.choice(_FAMILIES)(rng)


def _inplace(layer: type[nn.Module]) -> Activation:
    return functools.partial(layer, inplace=True)


_ACTIVATIONS: tuple[Activation, ...] = (
    _inplace(nn.ReLU), _inplace(nn.ReLU), nn.ReLU, _inplace(nn.ReLU6), _inplace(nn.Hardswish), _inplace(nn.SiLU),
    nn.SiLU, nn.GELU, nn.Hardswish, nn.ReLU6, _inplace(nn.LeakyReLU), nn.Sigmoid, nn.Tanh, nn.ELU, nn.Mish,
)  # fmt: skip


def _width(rng: random.Random, low: float, high: float, step: int = 8) -> int:
    return max(int(low * (high / low) ** rng.random() / step + 0.5), 1) * step


def _conv(
    rng: random.Random,
    into: int,
    out: int,
    kernel: int | tuple[int, int],
    stride: int,
    norm: bool,
    activation: Activation | None,
    groups: int = 1,
) -> nn.Sequential:
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (sides[0] // 2, sides[1] // 2)
    parts: list[nn.Module] = [nn.Conv2d(into, out, sides, stride, padding, groups=groups, bias=not norm)]
    if norm:
        parts.append(nn.BatchNorm2d(out))
    if activation is not None:
        parts.append(activation())
    return nn.Sequential(*parts)


def _stem(rng: random.Random, norm: bool, activation: Activation) -> tuple[list[nn.Module], int, int, torch.Tensor]:
    """Return a network's first layers, the channels and the side of the maps they give, and an example of its input."""
    side = rng.choice((96, 128, 160, 192, 224, 224, 224, 224, 256, 288))
    batch = rng.choice((1, 1, 1, 1, 1, 1, 1, 2))
    channels = _width(rng, 16, 80)
    kernel, stride = rng.choice(((3, 1), (3, 2), (3, 2), (7, 2), (7, 2), (11, 4), (5, 2)))
    parts: list[nn.Module] = [_conv(rng, 3, channels, kernel, stride, norm, activation)]
    inner = (side + 2 * (kernel // 2) - kernel) // stride + 1
    if rng.random() < 0.5:
        parts.append(nn.MaxPool2d(3, 2, 1))
        inner = (inner - 1) // 2 + 1
    return parts, channels, inner, torch.rand(batch, 3, side, side)


def _classifier(rng: random.Random, channels: int) -> list[nn.Module]:
    classes = rng.choice((10, 100, 365, 1000, 1000))
    if rng.random() < 0.25:
        size, hidden = rng.choice((1, 3, 6, 7)), _width(rng, 512, 4096, 64)
        return [
            nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Dropout(), nn.Linear(channels * size * size, hidden),
            nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, _width(rng, 256, 4096, 64)), nn.ReLU(inplace=True),
        ]  # fmt: skip
    hidden = _width(rng, 256, 1536)
    if rng.random() < 0.3:
        return [
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, hidden), nn.Hardswish(), nn.Dropout(0.2),
            nn.Linear(hidden, classes),
        ]  # fmt: skip
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes)]


def _plain_block(rng: random.Random, c: int, out: int, stride: int, norm: bool, act: Activation) -> list[nn.Module]:
    kernel = rng.choice((3, 3, 3, 3, 5, 1, (1, 7), (7, 1)))
    pool: list[nn.Module] = (
        [rng.choice((nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2), nn.AvgPool2d(2, 2)))] if stride > 1 else []
    )
    return [_conv(rng, c, out, kernel, 1, norm, act), *pool]


def _basic_block(rng: random.Random, c: int, out: int, stride: int, norm: bool, act: Activation) -> list[nn.Module]:
    if rng.random() < 0.5:
        body = nn.Sequential(_conv(rng, c, out, 3, stride, norm, act), _conv(rng, out, out, 3, 1, norm, None))
    else:
        inner = max(out // 4, 8)
        groups = rng.choice((1, 1, 1, 2, 4, 8)) if inner % 8 == 0 else 1
        body = nn.Sequential(
            _conv(rng, c, inner, 1, 1, norm, act),
            _conv(rng, inner, inner, 3, stride, norm, act, groups),
            _conv(rng, inner, out, 1, 1, norm, None),
        )
    shortcut = _conv(rng, c, out, 1, stride, norm, None) if stride > 1 or c != out else None
    return [Residual(body, shortcut, act())]


def _inverted_block(rng: random.Random, c: int, out: int, stride: int, norm: bool, act: Activation) -> list[nn.Module]:
    inner, kernel = c * rng.choice((1, 2, 3, 4, 6, 6)), rng.choice((3, 3, 3, 5, 5, 7))
    parts: list[nn.Module] = [_conv(rng, c, inner, 1, 1, norm, act)] if inner != c else []
    parts.append(_conv(rng, inner, inner, kernel, stride, norm, act, inner))
    if rng.random() < 0.4:
        gate = rng.choice((nn.Sigmoid, nn.Hardsigmoid))
        parts.append(SqueezeExcitation(inner, max(c // 4, 8), rng.choice((nn.ReLU, nn.SiLU)), gate))
    body = nn.Sequential(*parts, _conv(rng, inner, out, 1, 1, norm, None))
    return [Residual(body, None, None)] if stride == 1 and c == out else [body]


def _branch_block(rng: random.Random, c: int, out: int, stride: int, norm: bool, act: Activation) -> list[nn.Module]:
    quarter = out // 4
    last = out - 3 * quarter
    if rng.random() < 0.4:
        half = out // 2
        parts: list[nn.Module] = [
            _conv(rng, c, max(out // 8, 8), 1, 1, False, act),
            Branches(
                _conv(rng, max(out // 8, 8), half, 1, 1, False, act),
                _conv(rng, max(out // 8, 8), out - half, 3, 1, False, act),
            ),
        ]
    else:
        parts = [
            Branches(
                _conv(rng, c, quarter, 1, 1, norm, act),
                nn.Sequential(
                    _conv(rng, c, max(quarter // 2, 8), 1, 1, norm, act),
                    _conv(rng, max(quarter // 2, 8), quarter, rng.choice((3, 5)), 1, norm, act),
                ),
                nn.Sequential(_conv(rng, c, quarter, 1, 1, norm, act), _conv(rng, quarter, quarter, 3, 1, norm, act)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(rng, c, last, 1, 1, norm, act)),
            )
        ]
    return [*parts, nn.MaxPool2d(3, 2, ceil_mode=rng.random() < 0.5)] if stride > 1 else parts


# Networks for phones are the most often split, and their layers are small, so that they need the most samples.
_BLOCKS = (_plain_block, *(_basic_block,) * 2, *(_inverted_block,) * 4, _branch_block)


def _convolutional(rng: random.Random) -> Net:
    """Return a network of stages of one kind of block; from stage to stage sides halve and channels grow."""
    norm, activation, block = rng.random() < 0.75, rng.choice(_ACTIVATIONS), rng.choice(_BLOCKS)
    parts, channels, side, example = _stem(rng, norm, activation)
    for _ in range(rng.randint(2, 4)):
        stride = 2 if side > 9 else 1
        growth = rng.choice((1.0, 1.5, 2.0, 2.0, 4.0))
        out = min(max(round(channels * growth / 8), 1) * 8, 1024)
        for index in range(rng.randint(1, 4)):
            parts += block(rng, channels if index == 0 else out, out, stride if index == 0 else 1, norm, activation)
        channels, side = out, side // stride
    return Net(nn.Sequential(*parts, *_classifier(rng, channels)), example)


def _densely(rng: random.Random) -> Net:
    parts, channels, side, example = _stem(rng, True, _inplace(nn.ReLU))
    growth, wide = _width(rng, 12, 48, 4), rng.choice((2, 4))
    for _ in range(rng.randint(2, 3)):
        layers: list[nn.Module] = []
        for _ in range(rng.randint(2, 7)):
            layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
                    nn.Conv2d(channels, wide * growth, 1, bias=False), nn.BatchNorm2d(wide * growth),
                    nn.ReLU(inplace=True), nn.Conv2d(wide * growth, growth, 3, padding=1, bias=False),
                )
            )  # fmt: skip
            channels += growth
        parts += [Dense(layers), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if side >= 8:
            parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2, 2)]
            channels, side = channels // 2, side // 2
    return Net(nn.Sequential(*parts, *_classifier(rng, channels)), example)


def _heads(rng: random.Random) -> tuple[int, int]:
    heads = rng.choice((3, 4, 6, 8, 12))
    return heads, heads * rng.choice((32, 32, 64, 64))


def _encoder(rng: random.Random, width: int, heads: int, form: str, activation: Activation, before: bool) -> nn.Module:
    attention = ModuleAttention(width, heads) if form == "whole" else Attention(width, heads, form)
    return EncoderLayer(attention, width, width * rng.choice((2, 3, 4, 4)), activation, before)


def _vision_transformer(rng: random.Random) -> Net:
    heads, width = _heads(rng)
    patch, side = rng.choice((14, 16, 16, 32)), rng.choice((112, 192, 224, 224))
    tokens = (side // patch) ** 2
    form, activation = rng.choice(("whole", "products", "joined", "apart")), rng.choice((nn.GELU, nn.GELU, nn.ReLU))
    layers = [_encoder(rng, width, heads, form, activation, True) for _ in range(rng.randint(2, 3))]
    model = nn.Sequential(
        nn.Conv2d(3, width, patch, patch), Tokens(), Positions(tokens, width), nn.Dropout(0.1), *layers,
        nn.LayerNorm(width), nn.Linear(width, 1000),
    )  # fmt: skip
    return Net(model, torch.rand(1, 3, side, side))


def _text_transformer(rng: random.Random) -> Net:
    heads, width = _heads(rng)
    tokens = rng.choice((16, 32, 64, 128, 128, 256, 384))
    form, activation = rng.choice(("whole", "products", "joined", "apart", "apart")), rng.choice((nn.GELU, nn.SiLU))
    before = rng.random() < 0.5
    layers = [_encoder(rng, width, heads, form, activation, before) for _ in range(rng.randint(2, 3))]
    model = nn.Sequential(
        nn.Embedding(_width(rng, 1000, 32000), width),
        nn.LayerNorm(width),
        nn.Dropout(0.1),
        *layers,
        nn.Linear(width, width),
        nn.Tanh(),
    )
    return Net(model, torch.zeros(1, tokens, dtype=torch.long))


def _window_transformer(rng: random.Random) -> Net:
    heads, window = rng.choice((2, 3, 4)), rng.choice((7, 7, 8))
    width = 32 * heads
    side = window * rng.choice((4, 8, 8))
    parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelsLast(), nn.LayerNorm(width)]
    example = torch.rand(1, 3, 4 * side, 4 * side)
    for _ in range(rng.randint(1, 3)):
        for rolled in (False, True):
            attention = WindowAttention(width, heads, side, window, rolled)
            parts.append(EncoderLayer(attention, width, 4 * width, nn.GELU, True))
        if side >= 2 * window:
            parts += [Merge(), nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)]
            width, side, heads = 2 * width, side // 2, 2 * heads
    parts += [nn.LayerNorm(width), ChannelsFirst(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(width, 1000)]
    return Net(nn.Sequential(*parts), example)


def _channels_last(rng: random.Random) -> Net:
    width, side = _width(rng, 32, 128, 32), rng.choice((128, 192, 224))
    parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 4)]
    for _ in range(rng.randint(2, 3)):
        parts += [ChannelsLastBlock(width, rng.choice((3, 5, 7, 7, 13, 31))) for _ in range(rng.randint(1, 2))]
        parts.append(nn.Conv2d(width, 2 * width, 2, 2))
        width *= 2
    return Net(
        nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)),
        torch.rand(1, 3, side, side),
    )


def _recurrent(rng: random.Random) -> Net:
    width, hidden = _width(rng, 32, 512), _width(rng, 32, 768)
    layer = rng.choice((nn.LSTM, nn.LSTM, nn.GRU, nn.RNN))
    both = rng.random() < 0.3
    model = nn.Sequential(
        nn.Embedding(_width(rng, 1000, 20000), width),
        Recurrent(layer(width, hidden, num_layers=rng.choice((1, 2)), batch_first=True, bidirectional=both)),
        nn.Linear(hidden * (2 if both else 1), _width(rng, 16, 4096)),
        nn.LogSoftmax(-1),
    )
    steps = round(4 * 128 ** rng.random())
    return Net(model, torch.zeros(rng.choice((1, 1, 2, 8)), steps, dtype=torch.long))


def _perceptron(rng: random.Random) -> Net:
    """Return a network of linear layers that all stay in the caches, as in controllers and recommenders."""
    width, activation = _width(rng, 8, 512), rng.choice(_ACTIVATIONS)
    parts: list[nn.Module] = []
    into = inputs = _width(rng, 4, 512, 4)
    for _ in range(round(4 * 12 ** rng.random())):
        out = rng.choice((width, width, _width(rng, 8, 512)))
        parts += [nn.Linear(into, out), activation()] if rng.random() < 0.8 else [nn.Linear(into, out)]
        into = out
    rows = rng.choice((1, 1, 1, 8, 32, 128))
    return Net(nn.Sequential(*parts, nn.Linear(into, _width(rng, 8, 64))), torch.rand(rows, inputs))


def _volumes(rng: random.Random) -> Net:
    """Return a network for videos, volumes or sounds: convolutions over three dimensions, or over one."""
    dims = rng.choice((3, 3, 1))
    conv: Any = nn.Conv3d if dims == 3 else nn.Conv1d
    norm = nn.BatchNorm3d if dims == 3 else nn.BatchNorm1d
    activation = rng.choice(_ACTIVATIONS)
    side = rng.choice((32, 48, 64))
    size = (rng.choice((4, 8)), side, side) if dims == 3 else (rng.choice((1000, 4000, 8000)),)
    channels = rng.choice((1, 3)) if dims == 3 else rng.choice((1, 40, 80))
    parts: list[nn.Module] = []
    out, example = _width(rng, 16, 48), torch.rand(1, channels, *size)
    for _ in range(rng.randint(2, 4)):
        for stride in (2, 1):
            kernel = rng.choice((3, 3, (1, 3, 3), (3, 1, 1))) if dims == 3 else rng.choice((3, 5, 7, 10))
            padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
            strides = (1, stride, stride) if dims == 3 else stride
            parts += [conv(channels, out, kernel, strides, padding, bias=False), norm(out), activation()]
            channels = out
        out = min(2 * out, 256)
    parts += [nn.AdaptiveAvgPool3d(1) if dims == 3 else nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 400)]
    return Net(nn.Sequential(*parts), example)


def _hourglass(rng: random.Random) -> Net:
    width, activation = _width(rng, 16, 48), rng.choice(_ACTIVATIONS)
    side = rng.choice((64, 96, 128, 160))
    inner: nn.Module = _conv(rng, width * 4, width * 4, 3, 1, True, activation)
    for level in (2, 1):
        narrow, wide = width * level, width * level * 2
        if rng.random() < 0.5:
            up: nn.Module = nn.ConvTranspose2d(wide, narrow, 2, 2)
        else:
            mode = rng.choice(("nearest", "bilinear"))
            up = nn.Sequential(Upsample(mode), _conv(rng, wide, narrow, 1, 1, True, activation))
        down = nn.Sequential(nn.MaxPool2d(2), _conv(rng, narrow, wide, 3, 1, True, activation))
        inner = Hourglass(down, inner, up, _conv(rng, 2 * narrow, narrow, 3, 1, True, activation))
    first = _conv(rng, 3, width, 3, 1, True, activation)
    return Net(nn.Sequential(first, inner, nn.Conv2d(width, 21, 1)), torch.rand(1, 3, side, side))


_FAMILIES: tuple[Callable[[random.Random], Net], ...] = (
    *(_convolutional,) * 10, *(_densely,) * 2, *(_vision_transformer,) * 2, *(_text_transformer,) * 2,
    *(_window_transformer,) * 2, *(_channels_last,) * 2, *(_recurrent,) * 2, _volumes, _hourglass,
    _perceptron,
)  # fmt: skip


def settle(model: nn.Module) -> None:
    """Give a model on the meta device memory and weights: small random numbers.

    Zeros, or one number everywhere, would make maxima and rounding cheaper than they are in real models.
    """
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                tensor.zero_()
                continue
            flat = tensor.view(-1)
            for start in range(0, len(flat), len(_POOL)):
                part = flat[start : start + len(_POOL)]
                part.copy_(_POOL[: len(part)])
            flat.mul_(max(tensor.shape[1:].numel(), 1) ** -0.5 if tensor.dim() > 1 else 1.0)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                module.reset_running_stats()
            if isinstance(module, Attention) and module.bias is not None and len(module.bias) > 1:
                # In a rolled map, windows join distant pixels, which a mask keeps from attending to each other.
                module.bias.copy_(torch.where(module.bias > 0, 0.0, -100.0))


_POOL = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
