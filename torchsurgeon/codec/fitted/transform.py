"""The transform of a fitted codec: from a boundary tensor to coefficients that cost and matter independently, and back.

A tensor is seen as channels on a grid: (N, C, H, W) as it is, tokens (N, T, C) as one row of T places. On images, the
grid is cut into blocks, and a discrete cosine transform turns each channel of a block into frequencies. Then a matrix
for each frequency mixes the channels: it weighs them by how much the model's answer depends on them, and turns them so
that the results, the components, do not depend on each other. An error of 1 in any coefficient changes the answer as
much as an error of 1 in any other, so one step quantizes them all. A group is one component of one frequency.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsurgeon.errors import CodecError

# A block of this side or the next smaller that leaves the least at the border.
_SIDES = (8, 7, 6, 5)
_MOST_SIDE = 64
_MOST_CHANNELS = 1 << 14
# Condition numbers of fitted matrices stay below 1000; those of singular ones, rounded to float32, are far above this.
_MOST_CONDITION = 1e5
# Of these earlier groups at the same place the entropy coder reads the magnitudes: components before, in steps.
_COMPONENTS_BEFORE = (1, 2, 3)
# So many coefficients, 4 MiB, are decoded at a time.
SLICE = 1 << 20


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
    def cosines(self) -> Tensor:
        """The matrix from the values of a block to its frequencies; its transpose leads back. ``float64``."""
        whole = torch.kron(_cosines(self.block[0]), _cosines(self.block[1]))
        return whole[[u * self.block[1] + v for u, v in self.order]]

    @cached_property
    def _placed(self) -> dict[torch.device, Tensor]:
        return {}

    def _cosines_on(self, device: torch.device) -> Tensor:
        found = self._placed.get(device)
        if found is None:
            found = self._placed[device] = self.cosines.to(device, torch.float32)
        return found

    def split(self, tensor: Tensor) -> Tensor:
        """Return the frequencies [Q, C, P] of a tensor's blocks, P of them, as ``float32``."""
        down, across = self.block
        grid = tensor.movedim(self.channels_at, 1)
        batch, height, width = self.sizes(tensor.shape)
        grid = grid.reshape(batch, self.channels, height, width).float()
        below, beside = -height % down, -width % across
        if below or beside:
            grid = torch.nn.functional.pad(grid, (0, beside, 0, below), mode="replicate")
        rows, columns = (height + below) // down, (width + beside) // across
        cut = grid.reshape(batch, self.channels, rows, down, columns, across).permute(3, 5, 1, 0, 2, 4)
        if self.frequencies == 1:
            return cut.reshape(1, self.channels, -1)
        cosines = self._cosines_on(tensor.device)
        return (cosines @ cut.reshape(self.frequencies, -1)).view(self.frequencies, self.channels, -1)

    def join(self, frequencies: Tensor) -> Tensor:
        """Return the values [Q, C, P] of blocks that have these frequencies [Q, C, P], as ``float32``."""
        if self.frequencies == 1:
            return frequencies
        flat = frequencies.reshape(self.frequencies, -1)
        return (self._cosines_on(flat.device).T @ flat).view(frequencies.shape)

    def laid_out(self, values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the tensor of ``shape`` whose blocks have these values [Q, C, P], without what filled blocks up."""
        down, across = self.block
        batch, height, width = self.sizes(shape)
        rows, columns = -(-height // down), -(-width // across)
        cut = values.view(down, across, self.channels, batch, rows, columns).permute(3, 2, 4, 0, 5, 1)
        grid = torch.empty(batch, self.channels, height, width, dtype=dtype, device=values.device)
        # Whole blocks and those at the border apart, so that nothing as large as the filled-up grid is allocated.
        for row, below, high in _spans(height, down):
            for column, beside, wide in _spans(width, across):
                into = grid.narrow(2, row * down, below * high).narrow(3, column * across, beside * wide)
                some = cut[:, :, row : row + below, :high, column : column + beside, :wide]
                into.view(some.shape).copy_(some)
        rest = [size for dim, size in enumerate(shape) if dim not in (0, self.channels_at)]
        return grid.view(batch, self.channels, *rest).movedim(1, self.channels_at)

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
class Transform:
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
        if not self._leads_back():
            raise CodecError(
                "the matrices of a fitted codec must have inverses, which with the scales fit float32; it is damaged, "
                "so fit it again"
            )

    def _leads_back(self) -> bool:
        """Return whether encoding and decoding multiply by finite numbers, with errors that stay small."""
        try:
            inverse = self._inverse
        except RuntimeError:
            return False
        matrices, scales = torch.from_numpy(self.matrices.copy()), torch.from_numpy(self.scales.copy())
        band_of = torch.from_numpy(self.band_of.astype(numpy.int64))
        # With Frobenius norms, and divided by what an orthogonal matrix has. At most the usual condition number.
        norm, inverse_norm = (torch.linalg.matrix_norm(one.double()) for one in (matrices, inverse))
        conditions = norm * inverse_norm / self.grid.channels
        there, back = matrices.abs().amax(2)[band_of] * scales, inverse.abs().amax(1)[band_of] / scales
        finite = torch.isfinite(there).all() and torch.isfinite(back).all()
        return bool(finite and (conditions < _MOST_CONDITION).all())

    @cached_property
    def _inverse(self) -> Tensor:
        """The inverses of the matrices [M, C, C]. Raise ``RuntimeError`` for a singular one."""
        inverse: Tensor = torch.linalg.inv(torch.from_numpy(self.matrices.astype(numpy.float64)))
        return inverse.float()

    @cached_property
    def _placed(self) -> dict[tuple[str, torch.device], tuple[Tensor, Tensor]]:
        return {}

    def _there(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the matrices [Q, C, C] and offsets [Q, C, 1] that encode."""
        found = self._placed.get(("there", device))
        if found is None:
            band_of = torch.from_numpy(self.band_of.astype(numpy.int64))
            scales, means = torch.from_numpy(self.scales.copy()), torch.from_numpy(self.means.copy())
            matrices = torch.from_numpy(self.matrices.copy())[band_of] * scales[..., None]
            found = matrices.to(device), -(matrices @ means[..., None]).to(device)
            self._placed["there", device] = found
        return found

    def _back(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the matrices [Q, C, C] and offsets [Q, C, 1] that decode."""
        found = self._placed.get(("back", device))
        if found is None:
            band_of = torch.from_numpy(self.band_of.astype(numpy.int64))
            matrices = self._inverse[band_of] / torch.from_numpy(self.scales.copy())[:, None]
            found = matrices.contiguous().to(device), torch.from_numpy(self.means.copy())[..., None].to(device)
            self._placed["back", device] = found
        return found

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the coefficients [K, rows of blocks, columns of blocks] of a tensor, as ``float32``."""
        matrices, offsets = self._there(tensor.device)
        mixed = torch.baddbmm(offsets, matrices, self.grid.split(tensor))
        return mixed.view(self.grid.groups, *self.grid.blocks(tensor.shape))

    def weigh(self, difference: Tensor) -> Tensor:
        """Return how much the coefficients [Q, C, P] of two tensors differ, from the difference of the tensors."""
        return self._there(difference.device)[0] @ self.grid.split(difference)

    def inverse(self, coefficients: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the tensor of ``shape`` that has these coefficients, which are overwritten."""
        matrices, offsets = self._back(coefficients.device)
        grid = self.grid
        values = coefficients.view(grid.frequencies, grid.channels, -1)
        # The results take the coefficients' place, some blocks after the other, so that they need little more memory.
        for some in values.split(max(1, SLICE // grid.groups), dim=2):
            some.copy_(grid.join(torch.baddbmm(offsets, matrices, some)))
        return grid.laid_out(values, shape, dtype)


def block_side(size: int) -> int:
    """Return the side of a block for a grid of this size: the largest of 5 to 8 that leaves least at the border."""
    return size if size <= max(_SIDES) else min(_SIDES, key=lambda side: (-size % side, -side))


def _spans(size: int, side: int) -> list[tuple[int, int, int]]:
    """Return the first block, how many there are, and their side, of whole blocks and of the rest of a size."""
    whole, rest = divmod(size, side)
    return [span for span in ((0, whole, side), (whole, 1, rest)) if span[1] and span[2]]


def _cosines(side: int) -> Tensor:
    """Return the matrix of an orthonormal discrete cosine transform (DCT-II)."""
    frequency, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi * (place + 0.5) * frequency / side) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
