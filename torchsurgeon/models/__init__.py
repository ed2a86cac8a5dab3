"""Models by the names that users give them, digests of their weights, and what a trace assumes about them."""

from __future__ import annotations

from torchsurgeon.models.specs import Model, load

__all__ = ["Model", "load"]
