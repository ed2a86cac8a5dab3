"""No layer's flops are silently zero, and its parameters' bytes count, however the example had to be run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.tracing.held import layer_holdings

X = torch.randn(2, 12, 16)


class Layer(nn.Module):
    """One layer, kept whole; what it gives may be picked from by its values, for which the example is run for real."""

    def __init__(self, layer: nn.Module, first: bool, real: bool) -> None:
        super().__init__()
        self.layer, self.first, self.real = layer, first, real

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y[0] if self.first else y
        return y[y[..., 0] > -9.0] if self.real else y


class Called(nn.Module):
    def __init__(self, function: Any, *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def flops(layer: nn.Module, *, first: bool = False, real: bool = True) -> tuple[int, tuple[str, ...]]:
    graph = ts.trace(Layer(layer, first, real).eval(), X, leaf_modules=["layer"])
    assert graph.value_dependent == real
    (found,) = (one for one in graph.layers if one.name == "layer")
    return found.flops, found.uncounted


def recurrent(gates: int, hidden: int = 32, directions: int = 1, layers: int = 1) -> int:
    widths = [16] + [directions * hidden] * (layers - 1)
    return 2 * X.shape[0] * X.shape[1] * directions * sum(gates * hidden * (width + hidden) for width in widths)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("real", [False, True], ids=["meta", "real"])
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(16, 32, batch_first=True), recurrent(4)),
        (nn.LSTM(16, 32), recurrent(4)),
        (nn.LSTM(16, 32, 2, bidirectional=True), recurrent(4, directions=2, layers=2)),
        (nn.LSTM(16, 32, proj_size=8), 2 * 24 * (4 * 32 * (16 + 8) + 32 * 8)),
        (nn.GRU(16, 32), recurrent(3)),
        (nn.GRU(16, 32, 2, batch_first=True), recurrent(3, layers=2)),
        (nn.RNN(16, 32, nonlinearity="relu"), recurrent(1)),
    ],
    ids=["lstm", "time first", "deep", "projection", "gru", "deep gru", "rnn"],
)
def test_recurrent_networks_count_alike_in_every_kind_of_trace(layer: nn.Module, expected: int, real: bool) -> None:
    assert flops(layer, first=True, real=real) == (expected, ())


@pytest.mark.parametrize(
    ("cell", "gates"), [(nn.LSTMCell(16, 32), 4), (nn.GRUCell(16, 32), 3), (nn.RNNCell(16, 32), 1)], ids=str
)
def test_recurrent_cells_count(cell: nn.Module, gates: int) -> None:
    called = Called(lambda x, cell: cell(x[:, 0])[0] if gates == 4 else cell(x[:, 0]), cell)
    assert flops(called) == (2 * 2 * gates * 32 * (16 + 32), ())


@pytest.mark.parametrize("real", [False, True], ids=["meta", "real"])
@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.fft.rfft(x).abs(), "aten::_fft_r2c"),
        (lambda x: torch.cdist(x, x), "aten::_cdist_forward"),
        (torch.linalg.svdvals, "aten::_linalg_svd"),
        (lambda x: torch.linalg.inv_ex(x @ x.mT)[0], "aten::linalg_inv_ex"),
        (lambda x: torch.nn.functional.bilinear(x, x, torch.ones(3, 16, 16)), "aten::_trilinear"),
    ],
    ids=["fft", "cdist", "svd", "inverse", "bilinear"],
)
def test_operators_without_a_formula_are_listed(function: Any, operator: str, real: bool) -> None:
    assert operator in flops(Called(function), real=real)[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu().lgamma().cummax(-1)[0],
        lambda x: nn.functional.interpolate(x, 7, mode="linear"),
        lambda x: (x.norm(dim=-1, keepdim=True).sqrt() * x).softmax(-1),
        lambda x: torch.cross(x[..., :3], x[..., 3:6], -1).conj(),
    ],
    ids=["elementwise", "interpolate", "norm", "cross"],
)
def test_work_element_by_element_is_neither_counted_nor_listed(function: Any) -> None:
    assert flops(Called(function)) == (0, ())


def test_products_with_vectors_count() -> None:
    assert flops(Called(lambda x: torch.mv(x[0], x[1, 0]))) == (2 * 12 * 16, ())


# --- bytes ---

QUANTIZED = pytest.mark.filterwarnings("ignore")


def dynamic(*layers: nn.Module) -> nn.Module:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no quantized kernels")
    kinds = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell}
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(*layers).eval(), kinds, torch.qint8)


@QUANTIZED
@pytest.mark.parametrize(
    ("layer", "expected", "operator"),
    [
        (nn.Linear(16, 8), 16 * 8 + 8 * 4, "quantized::linear_dynamic"),
        (nn.LSTM(16, 32), 4 * 32 * (16 + 32) + 2 * 4 * 32 * 4, "aten::quantized_lstm"),
        (nn.GRU(16, 32), 3 * 32 * (16 + 32) + 2 * 3 * 32 * 4, "aten::quantized_gru"),
    ],
    ids=["linear", "lstm", "gru"],
)
def test_packed_weights_count_and_their_products_are_listed(layer: nn.Module, expected: int, operator: str) -> None:
    graph = ts.trace(Layer(dynamic(layer), not isinstance(layer, nn.Linear), False).eval(), X)
    assert graph.layers[0].parameter_bytes == expected
    assert graph.layers[0].uncounted == (operator,)


@QUANTIZED
def test_packed_convolutions_count() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no quantized kernels")
    models = pytest.importorskip("torchvision.models.quantization")
    graph = ts.trace(models.resnet18(weights=None, quantize=True).eval(), torch.rand(1, 3, 32, 32))
    plain = sum(p.numel() for p in models.resnet18(weights=None).parameters())
    assert 0.95 * plain < sum(layer.parameter_bytes for layer in graph.layers) < 1.1 * plain


class Holding(nn.Module):
    """Holds tensors in every way there is; some of them in several."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Scaled(torch.ones(100)), Scaled(torch.ones(200))
        self.last.linear.weight = self.first.linear.weight
        self.register_buffer("shift", torch.zeros(8))
        self.scale = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) + self.shift) * self.scale)


class Scaled(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(8, 8), nn.BatchNorm1d(8), {"own": [table, table[:50]]}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + self.table["own"][0].mean()


def test_memory_is_what_the_head_holds_and_each_tensor_counts_once() -> None:
    graph = ts.trace(Holding().eval(), torch.randn(2, 8), leaf_modules=[Scaled])
    assert [layer.name for layer in graph.layers] == ["first", "add", "mul", "last"]
    sums = [sum(one.values()) for one in layer_holdings(graph.flow, graph.model)]
    norm = 4 * 8 * 4 + 8
    assert sums == [256 + 32 + norm + 600, 32, 32, 256 + 32 + norm + 1000]
    profile = ts.profile(graph, repeats=1, warmup=1, meter=None)
    rows = {row.index: row for row in ts.Frontier.build(graph, profile, profile).rows if row.codec == "raw"}
    assert profile.head_memory_bytes is not None
    held = int(rows[4].memory_bytes or 0) - int(profile.head_memory_bytes[4])
    assert held == sum(sums) - 256
