"""Which operations layers come to: all of a model's arithmetic, described the same way however it was traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torchvision.models import get_model

import torchsurgeon as ts
from torchsurgeon.prediction.kinds import KINDS, Operation
from torchsurgeon.prediction.operations import layer_kinds, operations
from torchsurgeon.tracing import capture
from torchsurgeon.tracing.unfollowed import UnfollowedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TracerWarning.*"),
]

# Parts of detectors whose work depends on what is in the picture.
VALUE_DEPENDENT = {"RegionProposalNetwork", "RoIHeads", "postprocess"}
# Kinds whose arithmetic PyTorch's counter counts too.
COUNTED = {
    "convolution", "depthwise convolution", "grouped convolution", "transposed convolution", "linear", "matmul",
    "attention", "recurrent",
}  # fmt: skip


def flops(found: list[Operation]) -> float:
    return sum(
        float(KINDS[op.kind].work(np.array([op.sizes], dtype=float))[0][0]) for op in found if op.kind in COUNTED
    )


def check(graph: ts.LayerGraph, unknown: set[str] = frozenset()) -> list[list[Operation]]:  # type: ignore[assignment]
    found = operations(graph)
    assert len(found) == len(graph.layers)
    for layer, own in zip(graph.layers, found, strict=True):
        for operation in own:
            if operation.kind == "unknown":
                assert operation.variant in unknown, (layer.name, operation)
                continue
            assert len(operation.sizes) == len(KINDS[operation.kind].columns)
            assert all(type(size) is int and size > 0 for size in operation.sizes), (layer.name, operation)
            assert 1 <= operation.item_bytes <= 16
        assert flops(own) == pytest.approx(layer.flops, rel=0.01), (layer.name, layer.type, own)
    return found


def image(side: int = 96) -> torch.Tensor:
    return torch.zeros(1, 3, side, side)


VIDEO = torch.zeros(1, 3, 16, 64, 64)
MODELS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2",
            "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5", "densenet121",
            "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t",
            "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
        ),
        image(),
    ),
    "inception_v3": image(128),
    "googlenet": image(),
    "vit_b_32": image(224),
    "maxvit_t": image(224),
    "r3d_18": VIDEO,
    "r2plus1d_18": VIDEO,
    "swin3d_t": VIDEO,
    "fasterrcnn_mobilenet_v3_large_320_fpn": [torch.zeros(3, 160, 160)],
    "ssdlite320_mobilenet_v3_large": [torch.zeros(3, 160, 160)],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_torchvisions_models_is_described_with_all_its_arithmetic(name: str) -> None:
    extra: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "googlenet":
        extra["aux_logits"] = False
    elif "rcnn" in name or "ssd" in name or name.startswith(("fcn", "deeplab", "lraspp")):
        extra["weights_backbone"] = None
    graph = ts.trace(get_model(name, weights=None, **extra).eval(), MODELS[name])
    check(graph, VALUE_DEPENDENT)


@pytest.mark.parametrize(
    ("name", "side"),
    [("mixer_s32_224", 224), ("xcit_nano_12_p16_224", 224), ("edgenext_xx_small", 256), ("nfnet_f0", 96)],
)
def test_every_layer_of_models_from_timm_is_described(name: str, side: int) -> None:
    timm = pytest.importorskip("timm")
    check(ts.trace(timm.create_model(name).eval(), image(side)))


def test_every_layer_of_language_models_is_described() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.zeros(1, 16, dtype=torch.long)
    bert = transformers.BertConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    gpt = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=4, use_cache=False)
    for model in (transformers.BertModel(bert), transformers.GPT2LMHeadModel(gpt)):
        found = check(ts.trace(model.eval(), ids))
        assert {"embedding", "linear", "normalization", "attention"} <= {op.kind for own in found for op in own}


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def only(module: nn.Module, *example: torch.Tensor) -> list[Operation]:
    found = operations(ts.trace(module.eval(), *example))
    return [op for own in found for op in own if op.kind != "view"]


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape)


CASES: list[tuple[str, nn.Module, tuple[torch.Tensor, ...], list[tuple[str, str, tuple[int, ...]]]]] = [
    (
        "convolution",
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)),
        (rand(4, 3, 8, 10),),
        [("convolution", "2d", (4, 3, 8, 1, 80, 20, 9, 4, 1))],
    ),
    (
        "depthwise and dilated",
        nn.Sequential(nn.Conv1d(6, 6, 3, groups=6, dilation=2)),
        (rand(2, 6, 9),),
        [("depthwise convolution", "1d", (2, 6, 6, 6, 9, 5, 3, 1, 2))],
    ),
    (
        "transposed",
        nn.Sequential(nn.ConvTranspose2d(4, 6, (1, 2), stride=2)),
        (rand(1, 4, 3, 3),),
        [("transposed convolution", "2d", (1, 4, 6, 1, 9, 30, 2, 4, 1))],
    ),
    (
        "linear on tokens",
        nn.Sequential(nn.Linear(8, 5)),
        (rand(2, 7, 8),),
        [("linear", "linear", (14, 8, 5))],
    ),
    ("matmul", Call(torch.matmul), (rand(5, 3, 4), rand(4, 6)), [("matmul", "matmul", (5, 3, 4, 6))]),
    (
        "einsum",
        Call(lambda a, b: torch.einsum("bij,bjk->bik", a, b)),
        (rand(5, 3, 4), rand(5, 4, 6)),
        [("matmul", "matmul", (5, 3, 4, 6))],
    ),
    (
        "einsum with an ellipsis",
        Call(lambda a, b: torch.einsum("...ij,...jk->...ik", a, b)),
        (rand(5, 3, 4), rand(2, 1, 4, 6)),
        [("matmul", "matmul", (5, 3, 4, 12))],
    ),
    (
        "attention, causal, narrower values",
        Call(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
        (rand(1, 8, 5, 16), rand(1, 8, 5, 16), rand(1, 8, 5, 8)),
        [("attention", "masked", (8, 5, 5, 12))],
    ),
    (
        "pooling",
        nn.Sequential(nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(1)),
        (rand(2, 4, 9, 9),),
        [("pooling", "max", (8, 81, 16, 9)), ("pooling", "adaptive average", (8, 16, 1, 16))],
    ),
    (
        "activations",
        nn.Sequential(nn.ReLU(inplace=True), nn.GELU("tanh"), nn.GLU()),
        (rand(2, 8),),
        [
            ("activation", "relu in place", (16,)),
            ("activation", "gelu tanh", (16,)),
            ("activation", "glu", (16,)),
        ],
    ),
    (
        "broadcasting",
        Call(lambda a, b: a * b + 1),
        (rand(2, 8), rand(8)),
        [("elementwise", "mul broadcast", (16, 24)), ("elementwise", "add", (16, 16))],
    ),
    (
        "normalization and softmax",
        nn.Sequential(nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.Softmax(1)),
        (rand(3, 4, 8),),
        [
            ("normalization", "layer_norm", (12, 8)),
            ("normalization", "group_norm", (6, 16)),
            ("softmax", "softmax outer", (24, 4)),
        ],
    ),
    ("argmax", Call(lambda x: x.argmax(-1)), (rand(3, 8),), [("reduction", "argmax", (3, 8))]),
    (
        "embedding",
        nn.Sequential(nn.Embedding(10, 4)),
        (torch.zeros(2, 3, dtype=torch.long),),
        [("embedding", "embedding", (6, 4, 10))],
    ),
    (
        "copies",
        Call(lambda a, b: torch.cat([a, b], 1).transpose(0, 1).contiguous()),
        (rand(2, 3), rand(2, 5)),
        [("copy", "cat", (16, 2, 3)), ("copy", "copy strided", (16, 1, 1))],
    ),
    (
        "interpolation",
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear")),
        (rand(1, 3, 4, 4),),
        [("interpolation", "bilinear", (3, 16, 64))],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_layer_is_described_by_its_configuration(case: Any) -> None:
    _, module, example, expected = case
    assert [(op.kind, op.variant, op.sizes) for op in only(module, *example)] == expected


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)[0]


def test_a_recurrent_layer_comes_to_one_operation_for_each_of_its_layers() -> None:
    layer = nn.LSTM(16, 32, 2, batch_first=True, bidirectional=True)
    found = only(Wrapped(layer), rand(2, 7, 16))
    assert [(op.variant, op.sizes) for op in found] == [("lstm", (7, 2, 16, 32, 4, 2)), ("lstm", (7, 2, 64, 32, 4, 2))]
    assert only(Wrapped(nn.GRU(16, 32, bias=False)), rand(7, 16))[0].sizes == (7, 1, 16, 32, 3, 1)
    assert only(Wrapped(nn.RNN(16, 32)), rand(7, 3, 16))[0].sizes == (7, 3, 16, 32, 1, 1)


class Cross(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, **settings)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.attention(x, y, y)[0]


@pytest.mark.parametrize("settings", [{"batch_first": True}, {}, {"batch_first": True, "kdim": 16, "vdim": 16}])
def test_attention_across_two_sequences_does_each_ones_work(settings: dict[str, Any]) -> None:
    width = settings.get("kdim", 32)
    x, y = rand(2, 5, 32), rand(2, 9, width)
    if not settings:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    found = only(Cross(**settings).eval(), x, y)
    assert [op.sizes for op in found if op.kind == "linear"] == [
        (10, 32, 32), (18, width, 32), (18, width, 32), (10, 32, 32),
    ]  # fmt: skip
    assert [op.sizes for op in found if op.kind == "attention"] == [(8, 5, 9, 8)]


@pytest.mark.parametrize(
    ("layers", "example"),
    [
        (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8),
                nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Softmax(-1),
            ),
            rand(2, 3, 32, 32),
        ),
        (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), rand(2, 5, 16)),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.Sigmoid(), nn.Upsample(scale_factor=2)), rand(1, 3, 8, 8)),
        (Wrapped(nn.LSTM(8, 16, batch_first=True)), rand(2, 5, 8)),
    ],
    ids=["convolutional", "tokens", "transposed", "recurrent"],
)  # fmt: skip
def test_operations_are_the_same_recorded_and_by_torch_export(
    layers: nn.Module, example: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfollowed(*_: Any) -> Any:
        raise UnfollowedError("for this test", "", "")

    recorded = ts.trace(layers.eval(), example)
    monkeypatch.setattr(capture, "record", unfollowed)
    exported = ts.trace(layers, example)
    assert (recorded.traced_by, exported.traced_by) == ("recorded", "export")
    described = [[op for own in operations(graph) for op in own if op.kind != "view"] for graph in (recorded, exported)]
    assert described[0] == described[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_elements_of_other_sizes_are_noted(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).to(dtype)
    assert {op.item_bytes for op in only(model, rand(3, 3, 8, 8).to(dtype))} == {torch.finfo(dtype).bits // 8}


def test_integers_are_described_too() -> None:
    found = only(Call(lambda x: (x + 1) * x), torch.zeros(2, 3, dtype=torch.int64))
    assert [(op.kind, op.variant, op.item_bytes) for op in found] == [
        ("elementwise", "add int64", 8), ("elementwise", "mul int64", 8),
    ]  # fmt: skip


def test_a_module_kept_whole_comes_to_the_operations_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten())
    x = rand(2, 3, 8, 8)
    whole = ts.trace(model.eval(), x, leaf_modules=["0"])
    assert whole.layers[0].name == "0"
    inside = [op for op in operations(whole)[0] if op.kind != "view"]
    assert inside == only(model, x)
    assert flops(inside) == whole.layers[0].flops
    assert layer_kinds(whole) == ("convolution", "view")


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.relu(x)
        return x


def test_modules_of_one_class_with_other_settings_are_told_apart() -> None:
    model = nn.Sequential(Repeated(1), Repeated(3))
    graph = ts.trace(model.eval(), rand(2, 4), leaf_modules=["0", "1"])
    assert [len(found) for found in operations(graph)] == [1, 3]


def test_functions_of_one_name_are_told_apart() -> None:
    def make(times: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def block(x: torch.Tensor) -> torch.Tensor:
            for _ in range(times):
                x = torch.relu(x)
            return x

        return block

    model = nn.Sequential(Call(make(1)), Call(make(2)))
    graph = ts.trace(model.eval(), rand(2, 4), leaf_modules=["0", "1"])
    assert [len(found) for found in operations(graph)] == [1, 2]


def test_tensors_without_elements_cost_no_more_than_a_call() -> None:
    assert only(Call(lambda x: torch.relu(x[:0])), rand(2, 3)) == []
    assert only(nn.Sequential(nn.Linear(3, 2)), torch.zeros(0, 3)) == []


def test_what_nobody_describes_counts_the_elements_it_touches() -> None:
    (found,) = only(Call(lambda a, b: torch.cdist(a, b)), rand(2, 3, 4), rand(2, 5, 4))
    assert (found.kind, found.variant) == ("unknown", "cdist")
    assert found.sizes == (2 * 3 * 4 + 2 * 5 * 4 + 2 * 3 * 5,)


def test_a_call_given_in_an_unforeseen_way_is_not_skipped() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum(x, [0, 1], x, [1, 2], [0, 2])  # sublists in place of an equation

    (found,) = only(Strange(), rand(4, 4))
    assert found.kind in ("unknown", "matmul")
    assert math.prod(found.sizes) > 0
