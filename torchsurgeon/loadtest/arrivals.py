"""When the requests of a load test are due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import LoadTestError, is_finite, short
from torchsurgeon.simulate.shape import SHAPES, Shape

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Arrivals:
    """How the gaps between requests spread around their mean.

    Attributes:
        name: the shape's name, or the recording's file.
        gaps: returns so many gaps, whose mean is about 1, from a source of random numbers.
        mean_gap_s: the mean gap of a recording in seconds; None for a shape, which has no rate of its own.
    """

    name: str
    gaps: Callable[[np.random.Generator, int], Array]
    mean_gap_s: float | None = None

    @staticmethod
    def named(name: str) -> Arrivals:
        """Return arrivals with independent gaps of a shape, such as ``"exponential"`` for a Poisson process.

        Args:
            name: a key of ``torchsurgeon.simulate.SHAPES``.

        Raises:
            LoadTestError: there is no such shape.
        """
        if name not in SHAPES:
            raise LoadTestError(
                f"arrivals must be one of {', '.join(SHAPES)}, or a file of recorded gaps; got {short(name)}"
            )
        shape: Shape = SHAPES[name]
        return Arrivals(name, shape.draw)

    @staticmethod
    def recorded(path: str | Path) -> Arrivals:
        """Return arrivals with recorded gaps, in their recorded order and then again from the first.

        The order is kept because bursts, which are what makes a queue grow, would be lost by drawing gaps at random.

        Args:
            path: a text file with the seconds from each request to the next, one a line. Blank lines, and lines that
                begin with ``#``, are left out.

        Raises:
            LoadTestError: the file cannot be read, or holds anything else.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadTestError(f"the gaps in {short(Path(path))} cannot be read: {short(error)}") from error
        found = []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                gap_s = float(text)
            except ValueError:
                gap_s = -1.0
            if not (is_finite(gap_s) and gap_s >= 0):
                raise LoadTestError(
                    f"line {number} of {short(Path(path))} must be a gap in seconds, 0 or more; got {short(text, 50)}"
                )
            found.append(gap_s)
        recorded = np.array(found)
        if not recorded.sum() > 0:
            raise LoadTestError(
                f"{short(Path(path))} must hold gaps between requests in seconds, one a line, and not only zeros; it "
                f"holds {len(found)}"
            )
        mean_s = float(recorded.mean())
        scaled = recorded / mean_s
        return Arrivals(str(path), lambda _, count: np.resize(scaled, count), mean_s)

    def times_s(self, seconds: float, rate_per_s: float | None = None, seed: int = 0) -> Array:
        """Return when requests are due, in seconds from the start and rising.

        Args:
            seconds: for how long requests are due.
            rate_per_s: requests per second in the mean; by default a recording's own rate.
            seed: which random gaps are drawn.

        Raises:
            LoadTestError: the rate or the duration is not positive, or there is no rate.
        """
        if rate_per_s is None:
            if self.mean_gap_s is None:
                raise LoadTestError(f"arrivals of the shape {self.name} need a rate; give rate_per_s (--rate)")
            rate_per_s = 1 / self.mean_gap_s
        for what, value in (("the rate", rate_per_s), ("the duration", seconds)):
            if not (is_finite(value) and value > 0):
                raise LoadTestError(f"{what} must be a positive number; got {short(value)}")
        generator = np.random.default_rng(seed)
        times: list[Array] = []
        begun_s = 0.0
        while begun_s < seconds:
            count = int((seconds - begun_s) * rate_per_s * 1.1) + 100
            times.append(begun_s + np.cumsum(self.gaps(generator, count)) / rate_per_s)
            begun_s = float(times[-1][-1])
        together = np.concatenate(times)
        return together[together < seconds]
