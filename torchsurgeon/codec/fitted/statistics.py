"""How a boundary tensor's values are spread, and how much the model's answer depends on them, from a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsurgeon.codec.fitted.transform import TensorGrid

# As many elements of its second moments are kept for each frequency; larger ones are summed up over bands.
_MOST_ELEMENTS = 1 << 20
# A variance below this share of the mean square is float32's rounding.
_ROUNDING = 1e-11


class Statistics:
    """Sums up means, covariances and the Fisher matrix of one tensor's frequencies.

    Attributes:
        grid: how the tensor is seen.
        band_of: the band of each frequency, whose matrices are summed up together.
        bands: how many bands there are.
        places: how many blocks have been added.
        gradients: for how many blocks gradients have been added.
    """

    def __init__(self, grid: TensorGrid) -> None:
        self.grid = grid
        channels, frequencies = grid.channels, grid.frequencies
        self.band_of = _bands(grid)
        self.bands = int(self.band_of.max()) + 1
        self.places = self.gradients = 0
        self._sum = torch.zeros(frequencies, channels, dtype=torch.float64)
        self._squares = torch.zeros(self.bands, channels, channels, dtype=torch.float64)
        self._fisher = torch.zeros_like(self._squares)
        self._energy = torch.zeros(frequencies, dtype=torch.float64)

    def add_values(self, tensor: Tensor) -> None:
        """Add the values of a tensor."""
        # In float64: a token may be 100,000 times larger than the others, whose squares float32 would lose beside it.
        frequencies = self.grid.split(tensor).cpu().double()
        self.places += frequencies.shape[2]
        self._sum += frequencies.sum(2)
        self._squares.index_add_(0, self.band_of, frequencies @ frequencies.mT)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of one log-likelihood with respect to the tensor."""
        frequencies = self.grid.split(gradient).cpu().double()
        self.gradients += frequencies.shape[2]
        self._energy += frequencies.square().sum((1, 2))
        self._fisher.index_add_(0, self.band_of, frequencies @ frequencies.mT)

    def varies(self) -> bool:
        """Return whether the values differ by more than rounding."""
        spread = self.covariances().diagonal(dim1=1, dim2=2).mean()
        return bool(spread > _ROUNDING * self._squares.diagonal(dim1=1, dim2=2).sum() / self.places)

    def means(self) -> Tensor:
        """Return the mean of each frequency of each channel [Q, C]."""
        return self._sum / self.places

    def covariances(self) -> Tensor:
        """Return the covariance matrix of the channels in each band [M, C, C]."""
        means = self.means()
        outer = torch.zeros_like(self._squares).index_add_(0, self.band_of, means[:, :, None] * means[:, None])
        return (self._squares / self.places - outer) / self._sizes()[:, None, None]

    def fisher(self) -> Tensor:
        """Return the Fisher matrix of the channels in each band [M, C, C]; zeros where no gradient was added."""
        return self._fisher / max(1, self.gradients) / self._sizes()[:, None, None]

    def shares(self) -> Tensor:
        """Return how strongly each frequency [Q] counts in the metric, beside the mean of its band."""
        if not self.gradients:
            return torch.ones_like(self._energy)
        mean = torch.zeros(self.bands, dtype=torch.float64).index_add_(0, self.band_of, self._energy) / self._sizes()
        return (self._energy / mean[self.band_of].clamp(min=1e-300)).clamp(1e-3, 1e3)

    def _sizes(self) -> Tensor:
        return torch.bincount(self.band_of, minlength=self.bands).double()


def _bands(grid: TensorGrid) -> Tensor:
    """Return the band of each frequency: one each, or the frequencies alike in height share one, or all do."""
    each = torch.arange(grid.frequencies)
    diagonals = torch.tensor([u + v for u, v in grid.order])
    for bands in (each, diagonals):
        if (int(bands.max()) + 1) * grid.channels**2 <= _MOST_ELEMENTS:
            return bands
    return torch.zeros_like(each)
