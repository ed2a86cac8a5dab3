"""Models that the suites and studies run, with an input for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Network = Callable[[str], tuple[nn.Module, Tensor]]


def network(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return torchvision's model of that name with random weights, or a ``"chain of 200"`` layers, and an input."""
    if name.startswith("chain of "):
        return chain(int(name.split()[-1]), device)
    from torchvision.models import get_model

    torch.manual_seed(0)
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = get_model(name, weights=None, **extra)
    return model.eval().to(device), torch.rand(1, 3, 224, 224).to(device)


def chain(layers: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Layers of one element: next to nothing is computed, so that what running a layer costs is seen."""
    return nn.Sequential(*(nn.ReLU() for _ in range(layers))).eval().to(device), torch.rand(1, 1).to(device)
