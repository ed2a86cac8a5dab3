"""The packings: how many bits they leave, and where their parts lie; no tensor library is needed here."""

from __future__ import annotations

import math
from collections.abc import Sequence

PACKINGS = ("float16", "bfloat16", "int8", "int8-channel", "int4")
FROM_FINE_TO_COARSE = ("float16", "bfloat16", "int8-channel", "int8", "int4")
HALVES = ("float16", "bfloat16")
BITS = {"int8": 8, "int4": 4}
LEVELS = {"int8": 255, "int8-channel": 255, "int4": 15}
# The inverse of a narrower range, or the width of a wider one, is not representable in float32.
NARROWEST, WIDEST = 1e-30, 1e38
DAMAGED = f"its low must be finite, and its scale from 0 to below {WIDEST:g}; it is damaged, so send it again"
# With fewer values per channel, the channel's low and scale would take more than an eighth of the values' bytes.
_LEAST_PER_CHANNEL = 64


def usual(packing: str, shape: Sequence[int]) -> str:
    """Return ``packing``, or ``int8`` in place of ``int8-channel`` where the shape has too few values per channel."""
    if packing != "int8-channel":
        return packing
    channels = shape[channel_dim(shape)] if len(shape) > 1 else 0
    worth = channels and math.prod(shape) // channels >= _LEAST_PER_CHANNEL
    return packing if worth else "int8"


def channel_dim(shape: Sequence[int]) -> int:
    """Return the dimension that counts as channels: the second of images and volumes, else the last."""
    return 1 if len(shape) >= 4 else len(shape) - 1


def packed_bytes(packing: str, shape: Sequence[int]) -> int:
    """Return how many bytes a packed tensor of this shape takes. ``int8-channel`` needs a rank of at least 1."""
    count = math.prod(shape)
    if packing in HALVES:
        return 2 * count
    if packing == "int4":
        return 8 + (count + 1) // 2
    return 8 * (shape[channel_dim(shape)] if packing == "int8-channel" else 1) + count


def describable(low: float, high: float) -> bool:
    """Return whether float32 represents a range of values."""
    return math.isfinite(low) and (low == high or NARROWEST < high - low < WIDEST)


def blurs(low: float, high: float, scale: float) -> bool:
    """Return whether float32, in which values are packed, rounds float64 by more than a hundredth of a step."""
    return max(abs(low), abs(high)) * 2.0**-24 > scale / 100
