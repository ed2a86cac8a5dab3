"""How a fitted codec sees a tensor: as channels on a grid of blocks, whose frequencies its matrices mix; NumPy only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import numpy
from numpy.typing import NDArray

from torchsurgeon.errors import CodecError

_MOST_SIDE = 64
_MOST_CHANNELS = 1 << 14
# Of these earlier groups at the same place the entropy coder reads the magnitudes: components before, in steps.
_COMPONENTS_BEFORE = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a tensor is seen as channels on a grid that is cut into blocks.

    Attributes:
        rank: how many dimensions the tensor has, at least 2; the first is the batch.
        channels_at: the dimension of channels, at least 1.
        channels: how many there are.
        block: height and width of a block.

    Raises:
        CodecError: a number is out of its range.
    """

    rank: int
    channels_at: int
    channels: int
    block: tuple[int, int]

    def __post_init__(self) -> None:
        sides = all(1 <= side <= _MOST_SIDE for side in self.block)
        if not (2 <= self.rank <= 16 and 1 <= self.channels_at < self.rank and sides and len(self.block) == 2):
            raise CodecError(
                f"a grid has 2 to 16 dimensions, channels at one behind the first, and blocks of 1 to {_MOST_SIDE} a "
                f"side; got {self.rank} dimensions, channels at {self.channels_at} and blocks of {self.block}"
            )
        if not 1 <= self.channels <= _MOST_CHANNELS:
            raise CodecError(f"a tensor to be fitted has 1 to {_MOST_CHANNELS} channels; got {self.channels}")

    @property
    def frequencies(self) -> int:
        """How many frequencies a block has."""
        return self.block[0] * self.block[1]

    @property
    def groups(self) -> int:
        """How many groups of coefficients there are."""
        return self.frequencies * self.channels

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return batch, height and width of a tensor of this shape as a grid."""
        rest = [size for dim, size in enumerate(shape) if dim not in (0, self.channels_at)]
        return shape[0], math.prod(rest[:-1]), rest[-1] if rest else 1

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape has these channels and at least one block each way."""
        if len(shape) != self.rank or shape[self.channels_at] != self.channels:
            return False
        batch, height, width = self.sizes(shape)
        # With smaller grids, filling blocks up would take many times the tensor's memory.
        return batch > 0 and height >= self.block[0] and width >= self.block[1]

    def blocks(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return how many blocks lie below each other (over all samples) and beside each other."""
        batch, height, width = self.sizes(shape)
        return batch * -(-height // self.block[0]), -(-width // self.block[1])

    @cached_property
    def order(self) -> tuple[tuple[int, int], ...]:
        """The frequencies (down, across), the lowest first."""
        across = [(u, v) for u in range(self.block[0]) for v in range(self.block[1])]
        return tuple(sorted(across, key=lambda uv: (uv[0] + uv[1], uv[0])))

    @cached_property
    def cosines(self) -> NDArray[numpy.float64]:
        """The matrix from the values of a block to its frequencies; its transpose leads back."""
        whole = numpy.kron(_cosines(self.block[0]), _cosines(self.block[1])).astype(numpy.float64, copy=False)
        return whole[[u * self.block[1] + v for u, v in self.order]]

    def parents(self) -> NDArray[numpy.int32]:
        """Return for each group the earlier groups whose magnitudes tell most about it; -1 for none."""
        place = {frequency: q for q, frequency in enumerate(self.order)}
        component = numpy.arange(self.channels)
        found = []
        for q, (u, v) in enumerate(self.order):
            before = [(component >= back, q * self.channels + component - back) for back in _COMPONENTS_BEFORE]
            columns = [numpy.where(exists, group, -1) for exists, group in before]
            for lower in ((u - 1, v), (u, v - 1)):
                known = place.get(lower, -1)
                columns.append(known * self.channels + component if known >= 0 else numpy.full(self.channels, -1))
            found.append(numpy.stack(columns, 1))
        return numpy.concatenate(found).astype(numpy.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices:
    """The matrices of a tensor's transform.

    Attributes:
        grid: how the tensor is seen.
        matrices: ``float32 [M, C, C]``, from channels to components. M is 1, or one for each band of frequencies.
        band_of: the matrix of each frequency.
        scales: ``float32 [Q, C]``, by which each group is multiplied after its matrix.
        means: ``float32 [Q, C]``, subtracted before.

    Raises:
        CodecError: an array has another shape or type, or holds what cannot be.
    """

    grid: Grid
    matrices: NDArray[numpy.float32]
    band_of: NDArray[numpy.uint16]
    scales: NDArray[numpy.float32]
    means: NDArray[numpy.float32]

    def __post_init__(self) -> None:
        channels, frequencies = self.grid.channels, self.grid.frequencies
        bands = len(self.matrices) if numpy.ndim(self.matrices) == 3 else 0
        expected = {
            "matrices": (numpy.float32, (bands, channels, channels)),
            "band_of": (numpy.uint16, (frequencies,)),
            "scales": (numpy.float32, (frequencies, channels)),
            "means": (numpy.float32, (frequencies, channels)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape or not numpy.isfinite(array).all():
                raise CodecError(
                    f"{name} of a fitted codec must be {numpy.dtype(dtype)} {list(shape)}, and finite; got "
                    f"{array.dtype} {list(array.shape)}; fit the codec again"
                )
        if not 1 <= bands <= frequencies or (self.band_of >= bands).any() or (self.scales <= 0).any():
            raise CodecError(
                "a fitted codec must have a matrix for each band of frequencies and positive scales; it is damaged, "
                "so fit it again"
            )


def _cosines(side: int) -> NDArray[numpy.float64]:
    """Return the matrix of an orthonormal discrete cosine transform (DCT-II)."""
    frequency, place = numpy.arange(side)[:, None], numpy.arange(side)
    matrix: NDArray[numpy.float64] = numpy.cos(math.pi * (place + 0.5) * frequency / side) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
