"""What every layer of a model costs on the machine at hand: seconds, memory, and joules where a meter exists."""

from __future__ import annotations

from torchsurgeon.profile.measure import NoisyProfileWarning, example_inputs, layer_trace, profile
from torchsurgeon.profile.origin import find_device, provenance
from torchsurgeon.profile.record import LayerEnergy, LayerProfile

__all__ = [
    "LayerEnergy",
    "LayerProfile",
    "NoisyProfileWarning",
    "example_inputs",
    "find_device",
    "layer_trace",
    "profile",
    "provenance",
]
