"""How much a model's answers may change, and what a sample of a user's own inputs shows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

__all__ = [
    "Budget",
    "Finding",
    "Verdict",
    "boxes_matched",
    "halves",
    "image_call",
    "image_sample",
    "least_count",
    "pixels_kept",
]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "bounds": ("least_count",),
            "budget": (
                "Budget",
                "Verdict",
            ),
            "finding": ("Finding",),
            "sample": (
                "halves",
                "image_call",
                "image_sample",
            ),
            "scores": (
                "boxes_matched",
                "pixels_kept",
            ),
        },
    )
else:
    from torchsurgeon.accuracy.bounds import least_count as least_count
    from torchsurgeon.accuracy.budget import Budget as Budget
    from torchsurgeon.accuracy.budget import Verdict as Verdict
    from torchsurgeon.accuracy.finding import Finding as Finding
    from torchsurgeon.accuracy.sample import halves as halves
    from torchsurgeon.accuracy.sample import image_call as image_call
    from torchsurgeon.accuracy.sample import image_sample as image_sample
    from torchsurgeon.accuracy.scores import boxes_matched as boxes_matched
    from torchsurgeon.accuracy.scores import pixels_kept as pixels_kept
