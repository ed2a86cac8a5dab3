"""Codecs for boundary tensors (lossless, lossy and image codecs), and what they cost at a model's partition points."""

from __future__ import annotations

from torchsurgeon.codec.budget import Budget
from torchsurgeon.codec.codec import Codec, EncodedTensor, codec_names, find_codec
from torchsurgeon.codec.measuring import measure, promising
from torchsurgeon.codec.sample import image_call, image_sample
from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable, Difference

__all__ = [
    "Budget",
    "Codec",
    "CodecCost",
    "CodecRow",
    "CodecTable",
    "Difference",
    "EncodedTensor",
    "codec_names",
    "find_codec",
    "image_call",
    "image_sample",
    "measure",
    "promising",
]
