"""Codecs for what crosses: lossless, lossy and image ones, and what they cost at a model's partition points."""

from __future__ import annotations

from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable, Difference

__all__ = ["CodecCost", "CodecRow", "CodecTable", "Difference"]
