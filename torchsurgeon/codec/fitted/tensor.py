"""What a fitted codec holds of one boundary tensor, with what PyTorch computes of it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torchsurgeon.codec.fitted.held import HeldTensor
from torchsurgeon.codec.fitted.transform import TensorGrid, Transform

# A value counts as out of range where it is this many times larger than any in the sample.
_RANGE = 1.5


class FittedTensor(HeldTensor):
    """What a fitted codec holds of one boundary tensor, whose transform is that of tensors."""

    transform: Transform

    _grid_class, _transform_class = TensorGrid, Transform

    @cached_property
    def _limits(self) -> dict[torch.device, Tensor]:
        return {}

    def limits(self, device: torch.device) -> Tensor:
        """Return the magnitudes [K, 1, 1] beyond which coefficients count as out of range."""
        if device not in self._limits:
            self._limits[device] = (torch.from_numpy(self.largest.copy()) * _RANGE).view(-1, 1, 1).to(device)
        return self._limits[device]
