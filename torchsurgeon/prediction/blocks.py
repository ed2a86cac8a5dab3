"""Building blocks of published architectures for which PyTorch has no layer; ``nets`` makes networks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Activation = Callable[[], nn.Module]


class Residual(nn.Module):
    """Adds its input to the output of its body, as ResNet does; where sizes change, through a projection."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, activation: nn.Module | None) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: torch.Tensor) -> Any:
        """Return the block\'s output for a tensor."""
        out = self.body(x)
        out = out + (x if self.shortcut is None else self.shortcut(x))
        return out if self.activation is None else self.activation(out)


class Branches(nn.Module):
    """Concatenates the outputs of several branches on the same input, as Inception does."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor computed from the channels' means."""

    def __init__(self, channels: int, inner: int, activation: Activation, gate: Activation) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: torch.Tensor) -> Any:
        """Return the block\'s output for a tensor."""
        return self.gate(self.up(self.activation(self.down(self.pool(x))))) * x


class Dense(nn.Module):
    """Gives each layer the outputs of all layers before it, as DenseNet does."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class Attention(nn.Module):
    """Self-attention of tokens, in one of the forms in which models write it.

    Args:
        width: features of a token.
        heads: how many heads share them.
        form: "apart" for three projections instead of one; "products" for matrix products and a softmax instead of
            ``scaled_dot_product_attention``; "joined" for neither.
        bias: what is added to the scores.
    """

    def __init__(self, width: int, heads: int, form: str, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.form, self.width = heads, form, width
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)
        self.inner = nn.Linear(width, 3 * width) if form != "apart" else None
        if form == "apart":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Any:
        """Return the block\'s output for a tensor."""
        size = (self.heads, self.width // self.heads)
        if self.inner is None:
            q, k, v = (layer(x).unflatten(-1, size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        else:
            q, k, v = self.inner(x).unflatten(-1, (3, *size)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "products":
            scores = (q * size[1] ** -0.5) @ k.transpose(-2, -1)
            mixed = torch.softmax(scores if self.bias is None else scores + self.bias, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """One layer of a transformer's encoder, with normalization before or after each of its two parts."""

    def __init__(self, attention: nn.Module, width: int, hidden: int, activation: Activation, before: bool) -> None:
        super().__init__()
        self.attention, self.before = attention, before
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), activation(), nn.Dropout(0.1), nn.Linear(hidden, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> Any:
        """Return the block\'s output for a tensor."""
        if self.before:
            x = x + self.attention(self.first(x))
            return x + self.mlp(self.second(x))
        x = self.first(self.attention(x) + x)
        return self.second(self.mlp(x) + x)


class ModuleAttention(nn.Module):
    """Self-attention by ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        out: torch.Tensor = self.inner(x, x, x, need_weights=False)[0]
        return out


class WindowAttention(nn.Module):
    """Self-attention inside the windows of a map whose channels are last, as in Swin; the map may be rolled before."""

    def __init__(self, width: int, heads: int, side: int, window: int, rolled: bool) -> None:
        super().__init__()
        count, tokens = (side // window) ** 2, window * window
        shape = (count, 1, tokens, tokens) if rolled else (1, heads, tokens, tokens)
        self.inner = Attention(width, heads, "products", torch.empty(shape))
        self.side, self.window, self.width, self.rolled = side, window, width, rolled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        count, window = self.side // self.window, self.window
        if self.rolled:
            x = torch.roll(x, (-(window // 2), -(window // 2)), (1, 2))
        x = x.reshape(1, count, window, count, window, self.width).permute(0, 1, 3, 2, 4, 5)
        x = self.inner(x.reshape(count * count, window * window, self.width))
        x = x.reshape(1, count, count, window, window, self.width).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(1, self.side, self.side, self.width)
        return torch.roll(x, (window // 2, window // 2), (1, 2)) if self.rolled else x


class Tokens(nn.Module):
    """Makes a sequence of tokens of a map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return x.flatten(2).transpose(1, 2)


class Positions(nn.Module):
    """Puts a class token before the others, and adds a position to each."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, tokens + 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position


class ChannelsLast(nn.Module):
    """Makes the channels of a map its last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """Makes the channels of a map its first dimension after the batch; undoes ``ChannelsLast``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return x.permute(0, 3, 1, 2)


class Merge(nn.Module):
    """Joins every two by two neighbors of a map to one with four times the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return torch.cat([x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)


class ChannelsLastBlock(nn.Module):
    """A depthwise convolution, then a perceptron over the channels as the last dimension, as in ConvNeXt."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation, self.scale = nn.GELU(), nn.Parameter(torch.empty(width, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        """Return the block\'s output for a tensor."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        # The branch comes first, as in ConvNeXt: the sum then has the branch's order in memory, with channels last.
        return self.down(self.activation(self.up(y))).permute(0, 3, 1, 2) * self.scale + x


class Recurrent(nn.Module):
    """Returns the outputs of a recurrent layer, without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        out: torch.Tensor = self.layer(x)[0]
        return out


class Hourglass(nn.Module):
    """Makes a map smaller, processes it, makes it larger again, and joins it with the input, as U-Net does."""

    def __init__(self, down: nn.Module, inner: nn.Module, up: nn.Module, join: nn.Module) -> None:
        super().__init__()
        self.down, self.inner, self.up, self.join = down, inner, up, join

    def forward(self, x: torch.Tensor) -> Any:
        """Return the block\'s output for a tensor."""
        return self.join(torch.cat([x, self.up(self.inner(self.down(x)))], 1))


class Upsample(nn.Module):
    """Doubles the sides of a map."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block\'s output for a tensor."""
        return F.interpolate(x, scale_factor=2.0, mode=self.mode)
