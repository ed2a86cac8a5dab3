"""Codecs for what crosses: lossless, lossy and image ones, and what they cost at a model's partition points."""

from __future__ import annotations

from torchsurgeon.codec.codec import Codec, EncodedTensor, codec_names, find_codec
from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable, Difference

__all__ = [
    "Codec",
    "CodecCost",
    "CodecRow",
    "CodecTable",
    "Difference",
    "EncodedTensor",
    "codec_names",
    "find_codec",
]
