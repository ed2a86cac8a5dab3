"""Codecs for boundary tensors (lossless, lossy and image codecs), and what they cost at a model's partition points."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    _accuracy = (
        "Budget",
        "Finding",
        "boxes_matched",
        "halves",
        "image_call",
        "image_sample",
        "least_count",
        "pixels_kept",
    )
    _own = names_of(
        __name__,
        {
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
            "measuring": ("measure",),
            "points": ("promising",),
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

    def __getattr__(name: str) -> Any:
        """Load a name when it is first used; some are those of the room of accuracy budgets."""
        return getattr(import_module("torchsurgeon.accuracy"), name) if name in _accuracy else _own(name)

else:
    from torchsurgeon.accuracy.bounds import least_count as least_count
    from torchsurgeon.accuracy.budget import Budget as Budget
    from torchsurgeon.accuracy.finding import Finding as Finding
    from torchsurgeon.accuracy.sample import halves as halves
    from torchsurgeon.accuracy.sample import image_call as image_call
    from torchsurgeon.accuracy.sample import image_sample as image_sample
    from torchsurgeon.accuracy.scores import boxes_matched as boxes_matched
    from torchsurgeon.accuracy.scores import pixels_kept as pixels_kept
    from torchsurgeon.codec.codec import Codec as Codec
    from torchsurgeon.codec.codec import EncodedTensor as EncodedTensor
    from torchsurgeon.codec.codec import codec_names as codec_names
    from torchsurgeon.codec.codec import find_codec as find_codec
    from torchsurgeon.codec.codec import measured_names as measured_names
    from torchsurgeon.codec.fitted import FittedCodec as FittedCodec
    from torchsurgeon.codec.fitted import RatedCodec as RatedCodec
    from torchsurgeon.codec.fitted import fit_codec as fit_codec
    from torchsurgeon.codec.fitted import load_codec as load_codec
    from torchsurgeon.codec.measuring import measure as measure
    from torchsurgeon.codec.points import promising as promising
    from torchsurgeon.codec.student import Look as Look
    from torchsurgeon.codec.student import distill as distill
    from torchsurgeon.codec.table import CodecCost as CodecCost
    from torchsurgeon.codec.table import CodecRow as CodecRow
    from torchsurgeon.codec.table import CodecTable as CodecTable
    from torchsurgeon.codec.table import Difference as Difference
    from torchsurgeon.codec.together import measure_together as measure_together
