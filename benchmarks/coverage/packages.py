"""Models of packages that people use beside torchvision. Sizes are small, weights are random, nothing is downloaded.

requirements.txt installs these packages into an environment of their own; no other part of the project needs them.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.case import Arguments, Case, Factory, images, tokens

CASES: dict[str, Factory] = {}
FAMILIES = (
    *("segmentation_models_pytorch", "ultralytics", "monai", "diffusers", "open_clip", "torch_geometric", "snntorch"),
)
"""The packages; a model's name begins with its package's."""


def _case(name: str, make: Callable[[], Case]) -> None:
    def seeded() -> Case:
        torch.manual_seed(0)
        case = make()
        case.model.eval()
        return case

    CASES[name] = seeded


def _class(name: str, module: str) -> Any:
    return getattr(importlib.import_module(module), name)


# --- segmentation_models_pytorch ---


def _segmentation(name: str, encoder: str) -> Case:
    model = _class(name, "segmentation_models_pytorch")(encoder, encoder_weights=None)
    return Case(model, (images(1, 3, 128, 128),))


for _name in ("Unet", "UnetPlusPlus", "Linknet", "MAnet", "FPN", "PSPNet", "PAN", "DeepLabV3Plus", "UPerNet"):
    _case(f"segmentation_models_pytorch:{_name}", lambda name=_name: _segmentation(name, "resnet18"))
_case("segmentation_models_pytorch:Segformer", lambda: _segmentation("Segformer", "mit_b0"))


# --- ultralytics ---


def _yolo(config: str, kind: str) -> Case:
    # It asks its maker's servers and writes settings to the home directory unless told otherwise, when it is imported.
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": tempfile.gettempdir()}
    model = _class(f"{kind}Model", "ultralytics.nn.tasks")(f"{config}.yaml", verbose=False)
    return Case(model, (images(1, 3, 128, 128),))


for _name, _kind in {
    "yolov8n": "Detection",
    "yolov8n-seg": "Segmentation",
    "yolov8n-pose": "Pose",
    "yolov8n-cls": "Classification",
    "yolov10n": "Detection",
    "yolo11n": "Detection",
}.items():
    _case(f"ultralytics:{_name}", lambda name=_name, kind=_kind: _yolo(name, kind))


# --- MONAI ---


def _monai(name: str, shape: tuple[int, ...], **options: Any) -> Case:
    return Case(_class(name, "monai.networks.nets")(in_channels=1, out_channels=2, **options), (images(1, 1, *shape),))


_FLAT, _SOLID = (64, 64), (32, 32, 32)
for _name, _shape, _options in (
    ("UNet", _FLAT, {"spatial_dims": 2, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}),
    ("AttentionUnet", _FLAT, {"spatial_dims": 2, "channels": (8, 16, 32), "strides": (2, 2)}),
    ("BasicUNet", _FLAT, {"spatial_dims": 2, "features": (8, 8, 16, 32, 64, 8)}),
    (
        "DynUNet",
        _FLAT,
        {"spatial_dims": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
    ),
    ("SegResNet", _SOLID, {"spatial_dims": 3, "init_filters": 8}),
    ("VNet", _SOLID, {"spatial_dims": 3}),
    ("UNETR", _SOLID, {"img_size": _SOLID, "feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}),
    ("SwinUNETR", _FLAT, {"spatial_dims": 2, "feature_size": 12}),
):
    _case(f"monai:{_name}", lambda name=_name, shape=_shape, options=_options: _monai(name, shape, **options))


# --- diffusers ---

_STAGES = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}


def _unet_2d() -> Case:
    model = _class("UNet2DModel", "diffusers")(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **_STAGES,
    )
    return Case(model, (images(1, 3, 32, 32), torch.tensor([10])))


def _unet_2d_condition() -> Case:
    model = _class("UNet2DConditionModel", "diffusers")(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **_STAGES,
    )
    return Case(model, (images(1, 4, 32, 32), torch.tensor([10]), images(1, 7, 32)))


def _autoencoder() -> Case:
    model = _class("AutoencoderKL", "diffusers")(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        sample_size=32,
        **_STAGES,
    )
    return Case(model, (images(1, 3, 32, 32),))


def _dit() -> Case:
    model = _class("DiTTransformer2DModel", "diffusers")(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    conditions = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    return Case(model, (images(1, 4, 8, 8),), conditions)


_case("diffusers:UNet2DModel", _unet_2d)
_case("diffusers:UNet2DConditionModel", _unet_2d_condition)
_case("diffusers:AutoencoderKL", _autoencoder)
_case("diffusers:DiTTransformer2DModel", _dit)


# --- open_clip ---


def _clip(part: str) -> Case:
    model = _class("create_model", "open_clip")("ViT-B-32", pretrained=None, force_custom_text=bool(part))
    image, text = images(1, 3, 224, 224), tokens(1, 77)
    if not part:
        return Case(model, (image, text))
    return Case(getattr(model, part), (image if part == "visual" else text,))


for _name in ("", "visual", "text"):
    _case(f"open_clip:ViT-B-32{_name and '.' + _name}", lambda part=_name: _clip(part))


# --- torch_geometric ---


def _graph(nodes: int, edges: int) -> Arguments:
    ends = torch.randint(nodes, (2, edges), generator=torch.Generator().manual_seed(edges))
    return (images(nodes, 8), ends), {}


class _Convolutions(nn.Module):
    def __init__(self, name: str, heads: int) -> None:
        super().__init__()
        options = {"heads": heads} if heads > 1 else {}
        make = _class(name, "torch_geometric.nn")
        self.one, self.two = make(8, 16, **options), make(16 * heads, 4, **options)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(torch.relu(self.one(x, edge_index)), edge_index)
        return result


for _name, _heads in {"GCNConv": 1, "SAGEConv": 1, "GATConv": 2, "TransformerConv": 2}.items():
    _case(
        f"torch_geometric:{_name}",
        lambda name=_name, heads=_heads: Case(_Convolutions(name, heads), *_graph(12, 30), _graph(20, 44)),
    )
_case(
    "torch_geometric:GIN",
    lambda: Case(_class("GIN", "torch_geometric.nn")(8, 16, 2, 4), *_graph(12, 30), _graph(20, 44)),
)


# --- snntorch ---


class _Spiking(nn.Module):
    """A layer of leaky neurons, whose membranes start anew with each call, or come in and go out."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.neurons, self.outside = nn.Linear(10, 20), _leaky(), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor, membrane: torch.Tensor | None = None) -> Any:
        if membrane is not None:
            spikes, membrane = self.neurons(self.inside(x), membrane)
            return self.outside(spikes), membrane
        membrane = self.neurons.init_leaky()
        steps = []
        for _ in range(3):
            spikes, membrane = self.neurons(self.inside(x), membrane)
            steps.append(self.outside(spikes))
        return torch.stack(steps)


def _leaky(**options: Any) -> nn.Module:
    made: nn.Module = _class("Leaky", "snntorch")(beta=0.9, **options)
    return made


def _remembering() -> Case:
    model = nn.Sequential(nn.Linear(10, 20), _leaky(init_hidden=True), nn.Linear(20, 2))
    # Inputs above the neurons' threshold, so that their membranes differ from call to call.
    return Case(model, (images(1, 10),), refusal=r"\b1\b.*\b(mem|state)|\b(mem|state).*\b1\b")


_case("snntorch:Leaky, membranes in and out", lambda: Case(_Spiking(), (images(1, 10), images(1, 20))))
_case("snntorch:Leaky, membranes anew in each call", lambda: Case(_Spiking(), (images(1, 10),)))
_case("snntorch:Leaky, membranes kept between calls", _remembering)
