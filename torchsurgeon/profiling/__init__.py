"""Measure what every layer of a model costs on this machine: seconds, memory, and joules where it has a meter."""

from __future__ import annotations

from torchsurgeon.profiling.energy import LayerEnergy
from torchsurgeon.profiling.measure import example_inputs, layer_trace, profile
from torchsurgeon.profiling.origin import find_device, provenance
from torchsurgeon.profiling.record import LayerProfile

__all__ = [
    "LayerEnergy",
    "LayerProfile",
    "example_inputs",
    "find_device",
    "layer_trace",
    "profile",
    "provenance",
]
