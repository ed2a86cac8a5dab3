"""Bundles for devices without PyTorch, as tests export them.

``flat_profile``   a profile of any model in which every layer takes the same time
``DEVICE_S, SERVER_S``   how long a layer takes on a slow device and on a quick server
``pictures``       smooth pictures, as photographs are, to which codecs are fitted
``table_of``       a table in which some codecs were measured at one point
``WITHOUT_TORCH``  how a program begins that stands for one on such a device: neither PyTorch can be imported in it, nor
                   what only planning and export need
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import torchsurgeon as ts
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable

DEVICE_S, SERVER_S = 2e-3, 1e-5


def flat_profile(graph: ts.LayerGraph, layer_s: float) -> ts.LayerProfile:
    layers = tuple(layer.name for layer in graph.layers)
    return ts.LayerProfile(
        model=type(graph.model).__name__,
        fingerprint=graph.fingerprint,
        batch=graph.batch,
        layers=layers,
        samples_s=np.full((2, len(layers)), layer_s),
        whole_s=np.full(2, layer_s * len(layers)),
        provenance={"device": "as a test says"},
    )


def pictures(count: int, seed: int, side: int = 32) -> list[torch.Tensor]:
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").split(1))


def table_of(
    graph: ts.LayerGraph, point: str, names: Sequence[str], *, encode_s: float = 1e-5, head_share: float | None = None
) -> CodecTable:
    place = graph.point(point)
    rows = tuple(
        CodecRow(
            place.index,
            place.name,
            place.size_bytes,
            CodecCost(name, 100.0, encode_s, 1e-5, not name.startswith("fitted:"), True, head_share),
        )
        for name in names
    )
    return CodecTable(type(graph.model).__name__, graph.fingerprint, graph.batch, 10, "", rows)


WITHOUT_TORCH = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "scipy", "sklearn", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not on this device")

sys.meta_path.insert(0, Refuses())
"""
