"""Head and tail give the whole model's bits at every partition point."""

from __future__ import annotations

import copy
import warnings
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
from torchsurgeon.errors import PartitionError, TraceError
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


# --- random programs of views, in-place operators and shared memory ---

Pool = list[Any]
OPERATIONS: dict[str, Callable[[nn.Module, Pool, int, int, int], Any]] = {
    # new memory
    "linear": lambda m, p, i, j, k: m.linear(p[i]),
    "tanh": lambda m, p, i, j, k: p[i].tanh(),
    "add": lambda m, p, i, j, k: p[i] + p[j],
    "scaled by a size": lambda m, p, i, j, k: p[i] * (p[j].shape[k % p[j].dim()] + k),
    "cat": lambda m, p, i, j, k: torch.cat([p[i], p[j]], k % p[i].dim()),
    "max": lambda m, p, i, j, k: p[i].max(k % p[i].dim()).values,
    "sum": lambda m, p, i, j, k: p[i].sum(k % p[i].dim()),
    "parameter": lambda m, p, i, j, k: p[i] * m.scale,
    "zeros": lambda m, p, i, j, k: torch.zeros(4, 6),
    "zeros like": lambda m, p, i, j, k: torch.zeros_like(p[i]),
    "clone": lambda m, p, i, j, k: p[i].clone(),
    # the same memory
    "slice": lambda m, p, i, j, k: p[i][..., k % 3 :],
    "row": lambda m, p, i, j, k: p[i][k % 2],
    "transpose": lambda m, p, i, j, k: p[i].transpose(-1, -2),
    "chunk": lambda m, p, i, j, k: torch.chunk(p[i], 2, k % p[i].dim())[k % 2],
    "unbind": lambda m, p, i, j, k: p[i].unbind(-1)[k % 2],
    "flatten": lambda m, p, i, j, k: p[i].flatten(),
    "view": lambda m, p, i, j, k: p[i].view(p[j].shape),
    "expand": lambda m, p, i, j, k: p[i].expand(3, 4, 6),
    "expand as": lambda m, p, i, j, k: p[i].expand_as(p[j]),
    "contiguous": lambda m, p, i, j, k: p[i].contiguous(),
    "identity": lambda m, p, i, j, k: m.identity(p[i]),
    "detach": lambda m, p, i, j, k: p[i].detach(),
    # overwriting
    "add_": lambda m, p, i, j, k: p[i].add_(p[j]),
    "mul_": lambda m, p, i, j, k: p[i].mul_(0.5 + k),
    "relu_": lambda m, p, i, j, k: m.relu(p[i]),
    "copy_": lambda m, p, i, j, k: p[i].copy_(p[j]),
    "iadd": lambda m, p, i, j, k: _added(p[i], p[j]),
    "set item": lambda m, p, i, j, k: p[i].__setitem__(k % 2, p[j]),
    "set slice": lambda m, p, i, j, k: p[i].__setitem__((..., slice(k % 3)), float(k)),
    "out": lambda m, p, i, j, k: torch.mul(p[i], 2, out=p[j]),
}


def _added(x: Any, y: Any) -> Any:
    x += y
    return x


class Program(nn.Module):
    """Runs a list of operations on a growing pool of tensors, and returns some of them."""

    def __init__(self, operations: list[tuple[str, int, int, int]], outputs: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operations, self.outputs = operations, outputs
        self.linear, self.relu, self.identity = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Any, y: Any) -> Any:
        pool = [x, y]
        for name, i, j, k in self.operations:
            value = OPERATIONS[name](self, pool, i % len(pool), j % len(pool), k)
            pool.append(pool[i % len(pool)] if value is None else value)
        return [pool[i % len(pool)] for i in self.outputs]


def possible(operations: list[tuple[str, int, int, int]], outputs: list[int]) -> Program:
    """The program without the operations that eager PyTorch refuses."""
    kept: list[tuple[str, int, int, int]] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for operation in operations:
            try:
                Program([*kept, operation], outputs)(*example())
            except (RuntimeError, IndexError, TypeError, ZeroDivisionError, UserWarning):
                continue
            kept.append(operation)
    return Program(kept, outputs).eval()


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


operation = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5))


@settings(max_examples=120)
@given(st.lists(operation, min_size=3, max_size=14), st.lists(st.integers(0, 15), min_size=1, max_size=3), st.randoms())
def test_random_programs_give_their_bits_at_every_point_in_any_order_of_names(operations, outputs, random) -> None:
    program = possible(operations, outputs)
    with torch.no_grad():
        try:
            graph = trace(program, *example())
        except TraceError as error:
            assert "computes nothing" in str(error)
            return
        check(program, *example(), at_least=1)
        expected = program(*example())
        for point in graph.points[:-1]:
            boundary = dict(zip([spec.name for spec in point.tensors], cut(graph, point).head(*example()), strict=True))
            names = list(boundary)
            random.shuffle(names)
            assert_same(tail_for(graph, names)(*(fresh(boundary[name]) for name in names)), expected, f"{names}")
