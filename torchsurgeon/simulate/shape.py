"""Shapes of random times: how gaps between queries, or seconds of service, spread around their mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import SimulationError, short

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Shape:
    """A distribution of positive times whose mean is 1; what is drawn from it is multiplied with a mean in seconds.

    Attributes:
        name: the shape's name.
        variation: the standard deviation, which is the coefficient of variation since the mean is 1.
        quantile: from probabilities, 0 up to but not including 1, to values.
        source: where the shape comes from.
    """

    name: str
    variation: float
    quantile: Callable[[Array], Array]
    source: str = field(default="")

    def draw(self, generator: np.random.Generator, count: int) -> Array:
        """Return ``count`` independent values, shape (count,)."""
        return self.quantile(generator.random(count))

    @staticmethod
    def of_quantiles(name: str, probabilities: Sequence[float], values: Sequence[float], source: str = "") -> Shape:
        """Return the shape whose quantile function runs in straight lines through given knots, scaled to a mean of 1.

        Args:
            name: the shape's name.
            probabilities: rising from 0 to 1.
            values: the quantile at each of them, not negative and not falling; in any unit.
            source: where they come from.

        Raises:
            SimulationError: they are not so.
        """
        try:
            at, value = np.asarray(probabilities, dtype=np.float64), np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise SimulationError(
                f"the quantiles of the shape {short(name, 50)} must be numbers; got {short(values, 100)}"
            ) from None
        if at.ndim != 1 or at.shape != value.shape or len(at) < 2:
            raise SimulationError(
                f"the shape {short(name, 50)} needs one value for each of at least two probabilities; "
                f"got {at.size} probabilities and {value.size} values"
            )
        if at[0] != 0 or at[-1] != 1 or not (np.diff(at) > 0).all():
            raise SimulationError(
                f"the probabilities of the shape {short(name, 50)} must rise from 0 to 1; got {short(list(at), 100)}"
            )
        if not np.isfinite(value).all() or value[0] < 0 or (np.diff(value) < 0).any() or value[-1] == 0:
            raise SimulationError(
                f"the quantiles of the shape {short(name, 50)} must be zero or more, not falling, and not all zero; "
                f"got {short(list(value), 100)}"
            )
        share, low, high = np.diff(at), value[:-1], value[1:]
        mean = float(share @ (low + high)) / 2
        square = float(share @ (low * low + low * high + high * high)) / 3
        scaled = value / mean
        variation = max(square / mean**2 - 1, 0.0) ** 0.5
        return Shape(name, variation, lambda probability: np.interp(probability, at, scaled), source)

    @staticmethod
    def named(name: str) -> Shape:
        """Return the shape of a name.

        Args:
            name: a key of ``SHAPES``.

        Raises:
            SimulationError: there is no such shape.
        """
        if name not in SHAPES:
            raise SimulationError(f"there is no shape {short(name)}; use one of {', '.join(SHAPES)}")
        return SHAPES[name]


EXPONENTIAL = Shape("exponential", 1.0, lambda probability: -np.log1p(-probability), "without memory")
"""Gaps of a Poisson process, or service times without memory."""
CONSTANT = Shape("constant", 0.0, np.ones_like, "every time is the mean")
"""Every time is the mean."""


def _packaged() -> dict[str, Shape]:
    text = (Path(__file__).parent / "shapes.json").read_text(encoding="utf-8")
    return {
        name: Shape.of_quantiles(name, shape["probabilities"], shape["values"], shape["source"])
        for name, shape in json.loads(text)["shapes"].items()
    }


SHAPES: dict[str, Shape] = {shape.name: shape for shape in (EXPONENTIAL, CONSTANT)} | _packaged()
"""The shapes by name: exponential, constant, and those of a web search service."""
