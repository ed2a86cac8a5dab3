"""Head and tail give the whole model's bits at every partition point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import assert_same, check, copied, fresh, in_threads
from small_models import CASES, conv, image, model
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from torchsurgeon.cut import cut, tail_for
from torchsurgeon.errors import PartitionError
from torchsurgeon.graph import trace


def vit(**kwargs: Any) -> nn.Module:
    made = VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10, **kwargs
    )
    nn.init.normal_(made.heads.head.weight)
    return made


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (zoo.alexnet, 64),
    "resnet18": (zoo.resnet18, 32),
    "densenet121": (zoo.densenet121, 32),
    "googlenet": (lambda: zoo.googlenet(init_weights=False), 32),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, 32),
    "mobilenet_v3_large": (zoo.mobilenet_v3_large, 32),
    "efficientnet_b0": (zoo.efficientnet_b0, 32),
    "shufflenet_v2_x1_0": (zoo.shufflenet_v2_x1_0, 32),
    "vit_of_two_layers": (vit, 32),
    "swin_t": (zoo.swin_t, 32),
    "convnext_tiny": (zoo.convnext_tiny, 32),
    "lraspp_mobilenet_v3_large": (
        lambda: zoo.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        32,
    ),
}


def randomized(made: nn.Module) -> nn.Module:
    """Batch statistics and layer scales that leave a trace in the answer."""
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return made.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_point_of_a_torchvision_model_gives_its_bits(name: str) -> None:
    torch.manual_seed(0)
    factory, size = MODELS[name]
    made = randomized(factory())
    graph = check(made, torch.randn(1, 3, size, size), batches=[(torch.randn(3, 3, size, size),)])
    assert graph.batch_free
    assert [point.index for point in graph.points] == list(range(len(graph.layers) + 1))


def test_vit_b_16_gives_its_bits_at_a_spread_of_points() -> None:
    torch.manual_seed(0)
    made = zoo.vit_b_16().eval()
    nn.init.normal_(made.heads.head.weight)
    graph = check(made, torch.randn(1, 3, 224, 224), points=slice(None, None, 17))
    assert len(graph.points) == len(graph.layers) + 1


@pytest.mark.parametrize("name", CASES)
def test_every_point_of_a_hard_small_model_gives_its_bits(name: str) -> None:
    torch.manual_seed(0)
    made, *args = CASES[name]()
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    others = [(other,) for other in args.pop()] if len(args) == 2 and isinstance(args[-1], list) else []
    state = copy.deepcopy(made.state_dict())
    before = copied(args)
    check(made, *args, batches=others, **kwargs)
    assert_same(args, before, "the example")
    assert_same(dict(made.state_dict()), dict(state), "the model's state")
