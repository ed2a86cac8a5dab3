"""Bundles for devices without PyTorch, as tests export them.

``flat_profile``   a profile of any model in which every layer takes the same time
``DEVICE_S, SERVER_S``   how long a layer takes on a slow device and on a quick server
"""

from __future__ import annotations

import numpy as np

import torchsurgeon as ts

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
