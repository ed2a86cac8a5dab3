"""A server whose model is on an NVIDIA GPU, and devices with and without one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app

pytestmark = pytest.mark.cuda


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return layers.eval().requires_grad_(False)


@pytest.mark.parametrize(("here", "there"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("partition", ["server", 2])
def test_head_and_tail_run_where_their_weights_are(here: str, there: str, partition: str | int) -> None:
    mine, x, registry = model().to(here), torch.rand(2, 3, 8, 8, device=here), ModelRegistry(profiler=None)
    registry.add("m", copy.deepcopy(mine).to(there), x.to(there))
    with (
        Server(create_app(registry)) as server,
        ts.SplitModule(mine, x, server=server.url, name="m", partition=partition, fallback="error") as split,
    ):
        answer = split(x)
        assert answer.device == x.device
        assert torch.equal(answer, mine(x)) if here == there else torch.allclose(answer, mine(x), atol=1e-2)
        assert split.last is not None
        assert split.last.bits == ("same bits" if here == there else "same to rounding")


def test_convolutions_in_tf32_do_not_keep_requests_from_running_together() -> None:
    from torchvision.models import resnet18

    registry = ModelRegistry(profiler=None, batching="rounded")
    served = registry.add("m", resnet18().eval().cuda(), torch.rand(1, 3, 224, 224, device="cuda"))
    assert served.together > 1
    registry.close()


@pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")
@pytest.mark.parametrize("width", [16, 2048])
def test_weights_on_a_gpu_that_change_without_being_counted_are_noticed(width: int) -> None:
    mine = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).eval().requires_grad_(False).cuda()
    served, x, registry = copy.deepcopy(mine), torch.rand(1, width, device="cuda"), ModelRegistry(profiler=None)
    registry.add("m", served, x)
    with (
        Server(create_app(registry)) as server,
        ts.SplitModule(mine, x, server=server.url, name="m", partition=1) as split,
    ):
        assert torch.equal(split(x), mine(x))
        mine[0].weight.data[0, 0] += 1
        assert torch.equal(split.prepare()(x), mine(x))
        assert split.last is not None
        assert split.last.degraded is not None
        served[0].weight.data[0, 0] += 1
        assert torch.equal(split.prepare()(x), mine(x))
        assert split.last.degraded is None
