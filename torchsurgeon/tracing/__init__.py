"""A model becomes a ``LayerGraph``: its layers, the tensors between them, and the points where it can be cut."""

from __future__ import annotations

from torchsurgeon.tracing.adapters import Adapter, opaque, register_adapter
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import Layer, PartitionPoint, TensorSpec
from torchsurgeon.tracing.tracer import trace

__all__ = [
    "Adapter",
    "Layer",
    "LayerGraph",
    "PartitionPoint",
    "TensorSpec",
    "opaque",
    "register_adapter",
    "trace",
]
