"""A student head, which computes what crosses at a cut in place of the model's own first layers."""

from __future__ import annotations

from torchsurgeon.codec.student.distilling import distill
from torchsurgeon.codec.student.training import Look

__all__ = ["Look", "distill"]
