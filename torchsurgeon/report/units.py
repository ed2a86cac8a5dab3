"""Quantities as text for people. Units are converted here and where axes are drawn, nowhere else."""

from __future__ import annotations

import math


def bytes_text(size_bytes: float) -> str:
    """Return a size in bytes as text with a decimal unit, such as ``"3.21 MB"``."""
    return _scaled(size_bytes, "B", 1000)


def flops_text(flops: float) -> str:
    """Return a number of floating-point operations as text with a decimal unit, such as ``"8.58 GFLOP"``."""
    return _scaled(flops, "FLOP", 1000)


def rate_text(bit_s: float) -> str:
    """Return a link's rate in bit/s as text in Gbit/s or Mbit/s, such as ``"5.85 Mbit/s"``."""
    return f"{bit_s / 1e9:.3g} Gbit/s" if bit_s >= 999.5e6 else f"{bit_s / 1e6:.3g} Mbit/s"


def seconds_text(seconds: float) -> str:
    """Return a duration in seconds as text in s, ms or µs, such as ``"12.3 ms"``."""
    # From where the digits that are shown would round up to a thousand, the larger unit is taken.
    return (
        f"{seconds:.2f} s"
        if seconds >= 0.99995
        else f"{seconds * 1e3:.1f} ms"
        if seconds >= 999.5e-6
        else f"{seconds * 1e6:.0f} µs"
    )


def joules_text(mean_j: float, low_j: float = math.nan, high_j: float = math.nan) -> str:
    """Return an energy as text, such as ``"1.2 (1.1 … 1.4) mJ"``.

    Args:
        mean_j: the energy in joules. NaN, for an unknown one, gives ``"?"``.
        low_j: the low end of its interval in joules. The interval is left out where either end is NaN.
        high_j: the high end of its interval in joules.
    """
    if math.isnan(mean_j):
        return "?"
    size = max(abs(mean_j), abs(high_j) if math.isfinite(high_j) else 0.0)
    factor, unit = (1.0, "J") if size >= 0.9995 else (1e3, "mJ") if size >= 999.5e-6 else (1e6, "µJ")
    if not math.isfinite(high_j - low_j):
        return f"{mean_j * factor:.3g} {unit}"
    return f"{mean_j * factor:.3g} ({low_j * factor:.3g} … {high_j * factor:.3g}) {unit}"


def number_text(value: float) -> str:
    """Return a number with three significant digits, without an exponent up to a million."""
    return f"{float(f'{value:.3g}'):.{7 if abs(value) < 1e6 else 6}g}"


def _scaled(value: float, unit: str, base: int) -> str:
    if value < base:
        return f"{value:g} {unit}"
    power = min(int(math.log(value, base)), 4)
    if power < 4 and float(f"{value / base**power:.3g}") >= base:
        power += 1
    return f"{value / base**power:.3g} {' kMGT'[power]}{unit}"
