"""Seconds of the heads and tails of a model by a runtime that fuses layers, so that no layer has seconds of its own.

They are measured at a few partition points and interpolated between these. What is interpolated is not time over
layers, since one layer may take a hundred times as long as the next. It is what is missing to a first guess of the
curve: eager PyTorch's seconds of each layer, times a factor for the layer's kind of work. A runtime that fuses makes
activations nearly free, and convolutions less so. The factors are the non-negative least-squares fit to all that has
been measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import ProfileError
from torchsurgeon.profiling.energy import Array, floats
from torchsurgeon.tracing.graph import LayerGraph

WORKS = ("memory", "depthwise", "convolution", "matrix product")
"""The kinds of work: moving memory (activations, additions, normalizations), few multiplications for each result
(depthwise convolutions), and many, in convolutions and in matrix products."""
# From this many flops for each element of its results on, a layer is one of matrix products; below, mostly of memory.
_MUCH_WORK = 64
# How strongly the factors are held to that of the whole model, in equations of this weight against those of parts.
_HELD = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class PartTimes:
    """What the heads and tails of a model take, at every partition index.

    Attributes:
        points: the indices at which head and tail were measured, in order, without the two ends.
        head_s: seconds of the head of each index, shape (layers + 1,), from 0 to the whole model's.
        tail_s: seconds of the tail of each index, shape (layers + 1,), from the whole model's to 0.
        errors: for each of ``points``, by how much head and tail differed from what had been interpolated there before
            they were measured, 0.1 for 10 %, shape (points, 2). They say how sure the interpolated seconds are.

    Raises:
        ProfileError: shapes do not fit each other, or a value is no time.
    """

    points: tuple[int, ...]
    head_s: Array
    tail_s: Array
    errors: Array

    def __post_init__(self) -> None:
        for what, values in (("head_s", self.head_s), ("tail_s", self.tail_s), ("errors", self.errors)):
            if not np.isfinite(values).all() or (values < 0).any():
                raise ProfileError(f"{what} of a profile's parts must be finite and not negative; measure again")
        last = len(self.head_s) - 1
        if self.head_s.shape != self.tail_s.shape or self.errors.shape != (len(self.points), 2):
            raise ProfileError(
                f"the parts of a profile must have as many heads as tails, and two errors for each of the "
                f"{len(self.points)} measured points; got {self.head_s.shape}, {self.tail_s.shape} and "
                f"{self.errors.shape}; measure again"
            )
        if any(not 0 < point < last for point in self.points):
            raise ProfileError(f"the measured points must lie between 0 and {last}; got {self.points}; measure again")

    @property
    def error(self) -> float:
        """The median of ``errors``; 0 where no point was measured besides the ends."""
        return float(np.median(self.errors)) if self.errors.size else 0.0

    def scaled(self, factor: float) -> PartTimes:
        """Return them for a device that takes longer by a factor."""
        return dataclasses.replace(self, head_s=self.head_s * factor, tail_s=self.tail_s * factor)

    def to_json(self) -> dict[str, Any]:
        """Return them as plain data."""
        return {
            "points": list(self.points),
            "head_s": self.head_s.tolist(),
            "tail_s": self.tail_s.tolist(),
            "errors": self.errors.tolist(),
        }

    @staticmethod
    def from_json(data: Any) -> PartTimes:
        """Return those in plain data.

        Raises:
            TypeError, KeyError, ValueError: it is something else.
            ProfileError: a value is wrong.
        """
        points = data["points"]
        if not isinstance(points, list) or any(type(point) is not int for point in points):
            raise TypeError
        return PartTimes(
            tuple(points),
            floats(data["head_s"]),
            floats(data["tail_s"]),
            floats(data["errors"]).reshape(-1, 2),
        )


class Curve:
    """Seconds of heads and tails at every index, from those measured so far.

    Args:
        graph: the traced model.
        eager_s: seconds of each layer in eager PyTorch, shape (layers,).
        whole_s: seconds of the whole model by the runtime.

    Attributes:
        layer_s: seconds that each layer counts for, shape (layers,); together the whole model's.
    """

    def __init__(self, graph: LayerGraph, eager_s: Array, whole_s: float) -> None:
        self._work = works(graph)
        self._eager_s = np.maximum(eager_s, 1e-12)
        self.whole_s = whole_s
        self._heads: dict[int, float] = {}
        self._tails: dict[int, float] = {}
        self.layer_s: Array = np.empty(0)
        self._fit()

    @property
    def points(self) -> list[int]:
        """The measured indices, in order."""
        return sorted(self._heads)

    def add(self, index: int, head_s: float, tail_s: float) -> None:
        """Take the seconds measured at an index."""
        self._heads[index], self._tails[index] = head_s, tail_s
        self._fit()

    def _fit(self) -> None:
        parts = [(self._work, self._eager_s, self.whole_s)]
        parts += [(self._work[:k], self._eager_s[:k], seconds) for k, seconds in self._heads.items()]
        parts += [(self._work[k:], self._eager_s[k:], seconds) for k, seconds in self._tails.items()]
        factors = fitted_factors(parts, [self.whole_s] * len(parts))
        layer_s = self._eager_s * factors[self._work]
        self.layer_s = layer_s * (self.whole_s / layer_s.sum())

    def heads_s(self) -> Array:
        """Return the seconds of the head of each index, shape (layers + 1,)."""
        return self._through(np.concatenate([np.zeros(1), np.cumsum(self.layer_s)]), self._heads)

    def tails_s(self) -> Array:
        """Return the seconds of the tail of each index, shape (layers + 1,)."""
        guess = np.concatenate([np.cumsum(self.layer_s[::-1])[::-1], np.zeros(1)])
        return self._through(guess, self._tails)

    def _through(self, guess: Array, measured: dict[int, float]) -> Array:
        """Return the guessed curve, moved so that it goes through what was measured."""
        ends = {0: float(guess[0]), len(guess) - 1: float(guess[-1])}
        known = sorted((measured | ends).items())
        indices = np.array([index for index, _ in known])
        off = np.array([seconds for _, seconds in known]) - guess[indices]
        # What is missing grows with the seconds between two measured points, not with their number of layers.
        order = np.argsort(guess[indices], kind="stable")
        moved = guess + np.interp(guess, guess[indices][order], off[order])
        moved[indices] = [seconds for _, seconds in known]
        return np.asarray(np.maximum(moved, 0.0))


def works(graph: LayerGraph) -> NDArray[np.intp]:
    """Return what kind of work each layer mostly does, shape (layers,), as places in ``WORKS``."""
    kinds = []
    for layer in graph.layers:
        elements = sum(spec.size_bytes // spec.dtype.itemsize for spec in layer.outputs)
        if not layer.flops:
            kinds.append(0)
        elif layer.flops < _MUCH_WORK * max(elements, 1):
            kinds.append(1)
        else:
            kinds.append(2 if "conv" in layer.type.lower() else 3)
    return np.array(kinds, dtype=np.intp)


def fitted_factors(parts: Sequence[tuple[NDArray[np.intp], Array, float]], units_s: Sequence[float]) -> Array:
    """Return by what factor the layers of each kind of work take longer by a runtime than in eager PyTorch.

    Args:
        parts: for each measured part the kinds of its layers, their seconds in eager PyTorch, and the seconds of the
            part by the runtime.
        units_s: for each part the seconds by which its error is divided before errors are squared and added.

    Returns:
        The factors, shape (len(WORKS),), all positive.
    """
    from scipy.optimize import nnls

    usual = sum(measured_s for _, _, measured_s in parts) / sum(float(seconds.sum()) for _, seconds, _ in parts)
    rows, wanted = [], []
    for (kinds, seconds, measured_s), unit_s in zip(parts, units_s, strict=True):
        rows.append(np.bincount(kinds, seconds, minlength=len(WORKS)) / unit_s)
        wanted.append(measured_s / unit_s)
    for kind in range(len(WORKS)):
        # A kind of which little was measured has about the factor of all kinds together.
        rows.append(np.eye(len(WORKS))[kind] * _HELD / usual)
        wanted.append(_HELD)
    factors = np.asarray(nnls(np.array(rows), np.array(wanted))[0])
    return np.asarray(np.maximum(factors, 1e-3 * usual))
