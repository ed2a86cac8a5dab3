"""The networks whose tails servers answer for under load: how each is made, its input, and where it is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.tracing.tracer import trace


class Cut(NamedTuple):
    """A network cut in two: the network, an input, what crosses (always on the CPU), and the tail that takes this."""

    model: nn.Module
    x: Tensor
    tensors: dict[str, Tensor]
    tail: Any


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def mlp_and_input() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What ``torchsurgeon serve`` loads by the SPEC ``benchmarks.support.load_networks:mlp_and_input``."""
    return mlp(), (torch.rand(1, 64),)


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "an MLP of three layers": (mlp, (1, 64), "input"),
    "SqueezeNet 1.1 after features.8": (lambda: torchvision.models.squeezenet1_1(), (1, 3, 224, 224), "features.8"),
    "ResNet-18 after layer3": (lambda: torchvision.models.resnet18(), (1, 3, 224, 224), "layer3.1.relu_1"),
    "ViT-B/16 after six of its layers": (
        lambda: torchvision.models.vit_b_16(),
        (1, 3, 224, 224),
        "encoder.layers.encoder_layer_5.add_1",
    ),
}
"""How each network is made, the shape of its input, and the layer after which it is cut."""
ON_CPU, ON_GPU = tuple(NETWORKS)[:3], tuple(NETWORKS)[2:]
"""Those whose tails take at most some ten milliseconds on a core, and those that are worth a GPU."""


def network(name: str, device: str = "cpu") -> Cut:
    """Return a network with the same random weights in every process, on a device."""
    make, shape, point = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().to(device)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    graph = trace(model, x)
    found = graph.points[0] if point == "input" else graph.point(point)
    with torch.no_grad():
        sent = (x,) if found.index == 0 else cut(graph, found).head(x)
    tensors = dict(zip([spec.name for spec in found.tensors], [one.cpu() for one in sent], strict=True))
    return Cut(model, x, tensors, tail_for(graph, tuple(tensors), flat=True))
