"""What a fitted codec holds of one boundary tensor, and its arrays in the codec's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsurgeon.codec.fitted.transform import Grid, Transform
from torchsurgeon.codec.range_coder import CoderTables
from torchsurgeon.errors import CodecError, short

# A value counts as out of range where it is this many times larger than any in the sample.
_RANGE = 1.5
_TRANSFORM_ARRAYS = ("matrices", "band_of", "scales", "means")
# The parents follow from the grid.
_TABLE_ARRAYS = tuple(field.name for field in dataclasses.fields(CoderTables) if field.name != "parents")


@dataclasses.dataclass(frozen=True, eq=False)
class FittedTensor:
    """What a fitted codec holds of one boundary tensor.

    Attributes:
        name: the tensor's name in the graph.
        transform: its transform.
        largest: ``float32 [K]``, the largest magnitude of each group's coefficients in the sample.
        tables: the entropy coder's tables, for each step that the file has.
    """

    name: str
    transform: Transform
    largest: NDArray[numpy.float32]
    tables: tuple[CoderTables, ...]

    def __post_init__(self) -> None:
        groups = self.transform.grid.groups
        if self.largest.shape != (groups,) or not (self.largest >= 0).all() or not numpy.isfinite(self.largest).all():
            raise CodecError(f"largest must be {groups} finite numbers, none negative; fit the codec again")
        if any(tables.groups != groups for tables in self.tables):
            raise CodecError(f"the tables of {short(self.name)} must be for {groups} groups; fit the codec again")

    @cached_property
    def _limits(self) -> dict[torch.device, Tensor]:
        return {}

    def limits(self, device: torch.device) -> Tensor:
        """Return the magnitudes [K, 1, 1] beyond which coefficients count as out of range."""
        if device not in self._limits:
            self._limits[device] = (torch.from_numpy(self.largest.copy()) * _RANGE).view(-1, 1, 1).to(device)
        return self._limits[device]

    def description(self) -> dict[str, Any]:
        """Return what the file's header says of it."""
        grid = self.transform.grid
        return {
            "name": self.name,
            "rank": grid.rank,
            "channels_at": grid.channels_at,
            "channels": grid.channels,
            "block": list(grid.block),
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return its arrays by name; those of tables begin with the number of their step."""
        found: dict[str, NDArray[Any]] = {name: getattr(self.transform, name) for name in _TRANSFORM_ARRAYS}
        found["largest"] = self.largest
        for row, tables in enumerate(self.tables):
            found |= {f"{row}.{name}": getattr(tables, name) for name in _TABLE_ARRAYS}
        return found

    @staticmethod
    def parsed(description: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], steps: int) -> FittedTensor:
        """Return the tensor of a description and arrays, with tables for so many steps.

        Raises:
            CodecError: an array is not valid.
            KeyError: something is missing.
            TypeError: something is of another type.
            ValueError: a number is none.
        """
        down, across = map(int, description["block"])
        grid = Grid(
            int(description["rank"]), int(description["channels_at"]), int(description["channels"]), (down, across)
        )
        transform = Transform(grid, *(arrays[name] for name in _TRANSFORM_ARRAYS))
        parents: NDArray[Any] = grid.parents()
        tables = [
            CoderTables(**{"parents": parents, **{name: arrays[f"{row}.{name}"] for name in _TABLE_ARRAYS}})
            for row in range(steps)
        ]
        return FittedTensor(str(description["name"]), transform, arrays["largest"], tuple(tables))
