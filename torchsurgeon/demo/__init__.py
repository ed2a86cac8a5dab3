"""The demonstration: a trained classifier of photographs, split between a slow device and a server on this machine."""

from __future__ import annotations

from torchsurgeon.demo.models import Photograph, lite0
from torchsurgeon.demo.photographs import photo
from torchsurgeon.demo.running import run

__all__ = ["Photograph", "lite0", "photo", "run"]
