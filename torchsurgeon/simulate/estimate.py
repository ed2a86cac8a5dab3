"""A figure from several independent replications of a simulation, and how surely it is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of a figure over independent replications, with its 95 % confidence interval.

    Attributes:
        value: the mean.
        low: the interval's lower end.
        high: the interval's upper end.
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(samples: NDArray[np.float64]) -> Estimate:
        """Return the mean of ``samples``, one of each replication, with Student's t interval.

        Args:
            samples: shape (replications,). Where all are infinite, so is the estimate.
        """
        if not np.isfinite(samples).all():
            return Estimate(math.inf, math.inf, math.inf)
        # stdtrit is the quantile of Student's t; scipy.stats has it, too, but takes a second to import.
        from scipy.special import stdtrit

        mean = float(samples.mean())
        if len(samples) < 2:
            return Estimate(mean, -math.inf, math.inf)
        error = float(samples.std(ddof=1)) / len(samples) ** 0.5
        half = float(stdtrit(len(samples) - 1, (1 + _CONFIDENCE) / 2)) * error
        return Estimate(mean, mean - half, mean + half)

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit: every figure multiplied with ``factor``."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"
