"""A bound on the time of any operation from the device's peak arithmetic and memory rates.

The roofline of Williams, Waterman and Patterson (CACM 2009): an operation takes at least its flops over the peak rate
or its bytes over the bandwidth, whichever is longer, plus the time of a call that computes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchsurgeon.prediction.kinds import Array
from torchsurgeon.prediction.samples import SampleTable


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A device's highest rates.

    Attributes:
        peak_flop_s: floating-point operations per second that the device reaches; multiply and add count as two.
        bandwidth_byte_s: bytes per second that it reads and writes.
        overhead_s: seconds that a call takes which computes nothing.
        scatter: 90 % of real operations take at most this many times the bound, and at least the bound over it.
    """

    peak_flop_s: float
    bandwidth_byte_s: float
    overhead_s: float
    scatter: float = 3.0

    def seconds(self, flops: Any, moved_bytes: Any) -> Array:
        """Return the bound on the seconds of operations.

        Args:
            flops: their floating-point operations, a number or an array.
            moved_bytes: the bytes that they read and write, of the same shape.
        """
        return np.asarray(
            self.overhead_s
            + np.maximum(np.divide(flops, self.peak_flop_s), np.divide(moved_bytes, self.bandwidth_byte_s))
        )

    def to_json(self) -> dict[str, float]:
        """Return the figures by name, as plain data."""
        return dataclasses.asdict(self)


def fit_roofline(tables: Sequence[SampleTable]) -> Roofline:
    """Return the roofline of the device on which samples were timed: rates that one operation in ten exceeds."""
    parts = [(*table.kind.work(table.sizes), table) for table in tables]
    flops = np.concatenate([part[0] for part in parts])
    moved = np.concatenate([part[1] * part[2].item_bytes for part in parts])
    seconds = np.concatenate([table.seconds for table in tables])
    overhead_s = float(np.quantile(seconds, 0.02))
    net = np.maximum(seconds - overhead_s, overhead_s * 1e-2)
    heavy, wide = flops >= np.quantile(flops, 0.7), moved >= np.quantile(moved, 0.7)
    plain = Roofline(
        max(float(np.quantile(flops[heavy] / net[heavy], 0.9)), 1.0),
        max(float(np.quantile(moved[wide] / net[wide], 0.9)), 1.0),
        overhead_s,
    )
    errors = np.abs(np.log(seconds / plain.seconds(flops, moved)))
    return dataclasses.replace(plain, scatter=float(np.exp(np.quantile(errors, 0.9))))
