"""The transform of a fitted codec: from a boundary tensor to coefficients that cost and matter independently, and back.

A tensor is seen as channels on a grid: (N, C, H, W) as it is, tokens (N, T, C) as one row of T places. On images, the
grid is cut into blocks, and a discrete cosine transform turns each channel of a block into frequencies. Then a matrix
for each frequency mixes the channels: it weighs them by how much the model's answer depends on them, and turns them so
that the results, the components, do not depend on each other. An error of 1 in any coefficient changes the answer as
much as an error of 1 in any other, so one step quantizes them all. A group is one component of one frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy
import torch
from torch import Tensor

from torchsurgeon.codec.fitted.grid import Grid, Matrices
from torchsurgeon.errors import CodecError

# A block of this side or the next smaller that leaves the least at the border.
_SIDES = (8, 7, 6, 5)
# Condition numbers of fitted matrices stay below 1000; those of singular ones, rounded to float32, are far above this.
_MOST_CONDITION = 1e5
# So many coefficients, 4 MiB, are decoded at a time.
SLICE = 1 << 20


class TensorGrid(Grid):
    """A grid that takes tensors apart into frequencies, and puts them together."""

    @cached_property
    def _placed(self) -> dict[torch.device, Tensor]:
        return {}

    def _cosines_on(self, device: torch.device) -> Tensor:
        found = self._placed.get(device)
        if found is None:
            found = self._placed[device] = torch.from_numpy(self.cosines).to(device, torch.float32)
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


class Transform(Matrices):
    """The matrices of a tensor's transform, applied to tensors; they have inverses, too.

    Raises:
        CodecError: an array has another shape or type, or holds what cannot be.
    """

    grid: TensorGrid

    def __post_init__(self) -> None:
        super().__post_init__()
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
