"""The model that the demo runs, by a name that a server understands: ``torchsurgeon.demo:lite0``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchsurgeon.demo.lite import DEVIATION, MEAN, SIZES, efficientnet_lite, weights_file
from torchsurgeon.errors import SpecError


class Photograph(nn.Module):
    """A classifier of photographs as a camera gives them: it takes ``uint8[N, 3, H, W]`` and returns class scores.

    Scaling and normalization are part of the model, so that the input that a server gets has one byte for each colour
    of a pixel, and not four.

    Args:
        net: the classifier of normalized photographs.
        mean: what is subtracted from each colour, which is scaled to 0 … 1 before; ImageNet's mean by default.
        deviation: what it is divided by then; ImageNet's deviation by default.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: float | Sequence[float] = (0.485, 0.456, 0.406),
        deviation: float | Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, -1, 1, 1))

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        return self.net((photo.float() / 255 - self.mean) / self.deviation)  # type: ignore[no-any-return, operator]


def lite0() -> tuple[nn.Module, torch.Tensor]:
    """Return EfficientNet-Lite0 as a ``Photograph``, and an example of its input.

    Its weights are trained where these are installed, and otherwise random.
    """
    net = efficientnet_lite("lite0", trained=is_trained())
    side = SIZES["lite0"].side
    return Photograph(net, MEAN, DEVIATION).eval(), torch.zeros(1, 3, side, side, dtype=torch.uint8)


def is_trained() -> bool:
    """Return whether the trained weights of EfficientNet-Lite0 are installed."""
    try:
        weights_file("lite0")
    except SpecError:
        return False
    return True
