"""Models on a GPU are traced, verified and cut there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import model
from torch import nn

import torchsurgeon as ts
from torchsurgeon.tracing.verify import EXAMPLE, ONE_MORE_SAMPLE, OTHER_VALUES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"PyTorch {torch.__version__} sees no CUDA device"),
]


def every_cut(made: nn.Module, example: torch.Tensor, *others: torch.Tensor) -> ts.LayerGraph:
    graph = ts.trace(made, example)
    for point in graph.points:
        partition = ts.cut(graph, point)
        for x in (example, *others):
            with torch.no_grad():
                answer = partition.tail(*partition.head(x))
                assert answer.device == x.device
                assert torch.equal(answer, made(x))
    return graph


def test_a_convolutional_model_is_verified_where_it_is() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = every_cut(layers.eval().cuda(), torch.rand(2, 3, 16, 16).cuda(), torch.rand(3, 3, 16, 16).cuda())
    assert graph.verified == (EXAMPLE, OTHER_VALUES, ONE_MORE_SAMPLE)


def test_code_that_asks_for_the_device_takes_the_path_of_a_gpu() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x * 2 if x.is_cuda and x.device.type == "cuda" and x.get_device() == 0 else x)
        return y + torch.arange(y.shape[-1], device=x.device) + torch.ones(4, device=y.device).to(y)

    every_cut(model(forward, linear=nn.Linear(4, 4)).cuda(), torch.rand(2, 4).cuda(), torch.rand(5, 4).cuda())


def test_autocast_on_a_gpu_is_restored_around_each_step() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            y = self.linear(x)
        return self.last(y.float()).relu()

    made = model(forward, linear=nn.Linear(8, 8), last=nn.Linear(8, 8)).cuda()
    graph = every_cut(made, torch.rand(2, 8).cuda())
    assert [spec.dtype for spec in graph.point("linear").tensors] == [torch.float16]


def test_attention_takes_the_kernel_that_the_model_asks_for() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x).relu()

    every_cut(model(forward).cuda(), torch.rand(1, 2, 16, 32).cuda().half())
