"""Codecs for boundary tensors (lossless, lossy and image codecs), and what they cost at a model's partition points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

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

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "bounds": ("least_count",),
            "budget": ("Budget",),
            "finding": ("Finding",),
            "codec": (
                "Codec",
                "EncodedTensor",
                "codec_names",
                "find_codec",
                "measured_names",
            ),
            "fitted": (
                "FittedCodec",
                "RatedCodec",
                "fit_codec",
                "load_codec",
            ),
            "measuring": (
                "halves",
                "measure",
            ),
            "points": ("promising",),
            "sample": (
                "image_call",
                "image_sample",
            ),
            "scores": (
                "boxes_matched",
                "pixels_kept",
            ),
            "student": (
                "Look",
                "distill",
            ),
            "table": (
                "CodecCost",
                "CodecRow",
                "CodecTable",
                "Difference",
            ),
            "together": ("measure_together",),
        },
    )
else:
    from torchsurgeon.codec.bounds import least_count as least_count
    from torchsurgeon.codec.budget import Budget as Budget
    from torchsurgeon.codec.codec import Codec as Codec
    from torchsurgeon.codec.codec import EncodedTensor as EncodedTensor
    from torchsurgeon.codec.codec import codec_names as codec_names
    from torchsurgeon.codec.codec import find_codec as find_codec
    from torchsurgeon.codec.codec import measured_names as measured_names
    from torchsurgeon.codec.finding import Finding as Finding
    from torchsurgeon.codec.fitted import FittedCodec as FittedCodec
    from torchsurgeon.codec.fitted import RatedCodec as RatedCodec
    from torchsurgeon.codec.fitted import fit_codec as fit_codec
    from torchsurgeon.codec.fitted import load_codec as load_codec
    from torchsurgeon.codec.measuring import halves as halves
    from torchsurgeon.codec.measuring import measure as measure
    from torchsurgeon.codec.points import promising as promising
    from torchsurgeon.codec.sample import image_call as image_call
    from torchsurgeon.codec.sample import image_sample as image_sample
    from torchsurgeon.codec.scores import boxes_matched as boxes_matched
    from torchsurgeon.codec.scores import pixels_kept as pixels_kept
    from torchsurgeon.codec.student import Look as Look
    from torchsurgeon.codec.student import distill as distill
    from torchsurgeon.codec.table import CodecCost as CodecCost
    from torchsurgeon.codec.table import CodecRow as CodecRow
    from torchsurgeon.codec.table import CodecTable as CodecTable
    from torchsurgeon.codec.table import Difference as Difference
    from torchsurgeon.codec.together import measure_together as measure_together
