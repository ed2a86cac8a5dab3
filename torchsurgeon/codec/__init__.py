"""Codecs for boundary tensors (lossless, lossy and image codecs), and what they cost at a model's partition points."""

from __future__ import annotations

from torchsurgeon.codec.bounds import least_count
from torchsurgeon.codec.budget import Budget, Finding
from torchsurgeon.codec.codec import Codec, EncodedTensor, codec_names, find_codec, measured_names
from torchsurgeon.codec.fitted import FittedCodec, RatedCodec, fit_codec, load_codec
from torchsurgeon.codec.measuring import halves, measure
from torchsurgeon.codec.points import promising
from torchsurgeon.codec.sample import image_call, image_sample
from torchsurgeon.codec.scores import boxes_matched, pixels_kept
from torchsurgeon.codec.student import Look, distill
from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable, Difference
from torchsurgeon.codec.together import measure_together

__all__ = [
    "Budget",
    "Codec",
    "CodecCost",
    "CodecRow",
    "CodecTable",
    "Difference",
    "EncodedTensor",
    "Finding",
    "FittedCodec",
    "Look",
    "RatedCodec",
    "boxes_matched",
    "codec_names",
    "distill",
    "find_codec",
    "fit_codec",
    "halves",
    "image_call",
    "image_sample",
    "least_count",
    "load_codec",
    "measure",
    "measure_together",
    "measured_names",
    "pixels_kept",
    "promising",
]
