"""Following a model and finding the shapes of all its values, beside PyTorch's own ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp

import torchsurgeon as ts
from benchmarks.support.networks import Network
from benchmarks.support.side_by_side import SideBySide
from torchsurgeon.tracing.shapes import MetaModel, propagate


class Branching(nn.Module):
    """A small classifier that torch.fx cannot follow, and torch.export can: it branches on the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1000:
            x = x.mean(dim=0, keepdim=True)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.mark.benchmark(group="tracing what torch.fx follows")
@pytest.mark.parametrize("name", ["resnet50"])
def test_tracing(name: str, side_by_side: SideBySide, network: Network) -> None:
    model, x = network(name)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    side_by_side(
        {
            "symbolic_trace": lambda: fx.symbolic_trace(model),
            "symbolic_trace and FakeTensorProp": lambda: FakeTensorProp(fx.symbolic_trace(model), fake).propagate(x),
            "torchsurgeon, not verified": lambda: ts.trace(model, x, verify=False),
            "torchsurgeon": lambda: ts.trace(model, x),
        }
    )


@pytest.mark.benchmark(group="tracing what torch.fx does not follow")
def test_tracing_a_model_that_branches_on_sizes(side_by_side: SideBySide, device: torch.device) -> None:
    model, x = Branching().eval().to(device), torch.rand(1, 64, device=device)
    side_by_side(
        {
            "torch.export": lambda: torch.export.export(model, (x,), strict=False),
            "torchsurgeon, not verified": lambda: ts.trace(model, x, verify=False),
            "torchsurgeon": lambda: ts.trace(model, x),
        }
    )


@pytest.mark.benchmark(group="shapes of all values")
@pytest.mark.parametrize("name", ["resnet50"])
def test_shapes(name: str, side_by_side: SideBySide, network: Network) -> None:
    model, x = network(name)
    steps, followed = ts.trace(model, x).steps, fx.symbolic_trace(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    side_by_side(
        {
            "FakeTensorProp": lambda: FakeTensorProp(followed, fake).propagate(x),
            "ShapeProp, which runs the model": lambda: ShapeProp(followed).propagate(x),
            "torchsurgeon": lambda: propagate(steps, [x], MetaModel(model)),
        }
    )
