"""What runs heads and tails in place of eager PyTorch: one file for each backend, behind one interface."""

from __future__ import annotations

from torchsurgeon.backends.backend import Backend
from torchsurgeon.backends.built import BuiltPart, deviation
from torchsurgeon.backends.find import NAMES, find_backend, find_backends, installed_backends
from torchsurgeon.backends.part import Part

__all__ = ["NAMES", "Backend", "BuiltPart", "Part", "deviation", "find_backend", "find_backends", "installed_backends"]
