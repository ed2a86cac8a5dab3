"""Names of fitted codecs, ``fitted:LABEL-DIGITS@RATE``; both kinds of devices read them."""

from __future__ import annotations

import math
import re

from torchsurgeon.errors import is_finite

FITTED = "fitted:"
"""What the names of fitted codecs begin with."""

# A rate in a name, without a sign or spaces; "1e-05" is how Python writes a low one.
_DIGITS = re.compile(r"[0-9]+(\.[0-9]+)?(e-[0-9]+)?")


def fitted_name(label: str, digest: str) -> str:
    """Return the name of a fitted codec, without a rate.

    Args:
        label: what it begins with.
        digest: the digest of its file, in hex, of which it holds the first 8 digits.
    """
    return f"{FITTED}{label}-{digest[:8]}"


def rated_name(name: str, rate: float) -> str:
    """Return the name of a fitted codec at a rate."""
    return f"{name}@{rate:g}"


def rounded_rate(rate: float | str) -> float:
    """Return a rate rounded to the digits that names have; NaN for what is no rate."""
    if isinstance(rate, str):
        valid = _DIGITS.fullmatch(rate) is not None
    else:
        valid = is_finite(rate) and not isinstance(rate, bool)
    try:
        return float(f"{float(rate):.4g}") if valid else math.nan
    except OverflowError:
        return math.nan
