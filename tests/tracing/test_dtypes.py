"""Tensors of every dtype cross the boundary exactly, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import check_split, split
from torch import nn

from torchsurgeon.cutting.segment import clone

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Steps(nn.Module):
    """Layers that all keep the dtype they are given; the values cover its whole range."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x.flip(0)
        z = torch.cat([y, x], 1)
        return {"z": z.transpose(0, 1), "part": z[:, 1:]}


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_floats_cross_with_every_bit_infinities_and_nans_included(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    odd = [
        0.0,
        -0.0,
        info.tiny,
        info.tiny / 2,
        -info.max,
        info.max,
        info.eps,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
    x = torch.tensor([odd, odd[::-1]], dtype=torch.float64).to(dtype)
    with split(Steps().eval(), x) as module:
        assert {spec.dtype for point in module.graph.points for spec in point.tensors} == {dtype}
        check_split(module, module.graph.points, ((x,), {}))


@pytest.mark.parametrize("dtype", INTEGERS, ids=named)
def test_integers_cross_up_to_their_extremes(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([[info.min, info.max, 0, 1], [info.max, 7, info.min, 3]], dtype=dtype)
    with split(Steps().eval(), x) as module:
        check_split(module, module.graph.points, ((x,), {}))


def test_booleans_cross() -> None:
    x = torch.tensor([[True, False, True], [False, False, True]])
    with split(Steps().eval(), x) as module:
        check_split(module, module.graph.points, ((x,), {}))


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_a_model_in_another_precision_gives_its_own_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.Flatten())
    model = nn.Sequential(*layers).eval().to(dtype)
    x = torch.rand(1, 3, 8, 8).to(dtype)
    with split(model, x) as module:
        check_split(module, module.graph.points, ((x,), {}), ((torch.rand(3, 3, 8, 8).to(dtype),), {}))


class Mixed(nn.Module):
    """Several dtypes cross at once, one of them a mask and one an index."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).bfloat16()
        self.table = nn.Embedding(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.conv(x.to(torch.bfloat16))
        best = y.argmax(1)
        sure = y.amax(1) > 0
        half = self.table(best).half()
        return {"half": half, "kept": half.masked_fill(~sure.unsqueeze(-1), 0), "sure": sure, "wide": y.double().sum(1)}


def test_several_dtypes_cross_together() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8)
    with split(Mixed().eval(), x) as module:
        crossing = {spec.dtype for point in module.graph.points[1:-1] for spec in point.tensors}
        assert {torch.bfloat16, torch.int64, torch.bool, torch.float16} <= crossing
        check_split(module, module.graph.points, ((x,), {}), ((torch.rand(2, 3, 8, 8),), {}))


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_quantized_layers_crosses_exactly() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no quantized kernels")
    models = pytest.importorskip("torchvision.models.quantization")
    torch.manual_seed(0)
    model = models.resnet18(weights=None, quantize=True).eval()
    x = torch.rand(1, 3, 64, 64)
    with split(model, x) as module:
        crossing = {spec.dtype for point in module.graph.points for spec in point.tensors}
        assert torch.quint8 in crossing
        check_split(module, module.graph.points[::6], ((x,), {}))


@pytest.mark.filterwarnings("ignore")
def test_quantized_inputs_are_traced_and_of_other_scales_and_sizes_answered() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x.dequantize()) + x.int_repr()

    def quantized(rows: int, scale: float) -> torch.Tensor:
        return torch.quantize_per_tensor(torch.rand(rows, 4), scale, 3, torch.quint8)

    with split(Whole().eval(), quantized(2, 0.1)) as module, torch.no_grad():
        for x in quantized(2, 0.1), quantized(2, 0.2), quantized(5, 0.1):
            for point in module.graph.points:
                module.partition = point.index
                assert torch.equal(module(x), module.model(x))


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_a_quantized_tensor_keeps_the_order_of_its_memory() -> None:
    x = torch.rand(1, 4, 3, 3).to(memory_format=torch.channels_last)
    quantized = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)
    copy = clone(quantized)
    assert copy.stride() == quantized.stride()
    assert torch.equal(copy.int_repr(), quantized.int_repr())
    assert copy.data_ptr() != quantized.data_ptr()
