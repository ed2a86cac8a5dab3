"""Models as users name them, their weights' digests, and what a trace took for granted about them."""

from __future__ import annotations

from torchsurgeon.models.specs import Model, load

__all__ = ["Model", "load"]
