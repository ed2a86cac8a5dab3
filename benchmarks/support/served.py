"""Models that servers and devices of the suites and studies share, the same in every process: from a seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.support.tail_process import seeded

SLOWER = 1000.0
"""How much slower a device with the tiny model is said to be, so that a module that decides never stays on it."""


def tiny(seed: int) -> tuple[nn.Module, Tensor]:
    """A model so small that the time of an inference is that of what surrounds it."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))

    return seeded(make, seed), torch.rand(1, 64, generator=torch.Generator().manual_seed(1))


def alexnet(seed: int) -> tuple[nn.Module, Tensor]:
    """AlexNet for a photograph's pixels."""
    return _photographed("alexnet", seed)


def resnet50(seed: int) -> tuple[nn.Module, Tensor]:
    """ResNet-50 for a photograph's pixels."""
    return _photographed("resnet50", seed)


def _photographed(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    from torchvision.models import get_model

    from torchsurgeon.demo import Photograph, photo

    return seeded(lambda: Photograph(get_model(name)), seed), photo()
