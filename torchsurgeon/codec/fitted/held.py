"""What the file of a fitted codec holds of one boundary tensor, and its arrays there; NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy
from numpy.typing import NDArray

from torchsurgeon.codec.fitted.grid import Grid, Matrices
from torchsurgeon.codec.range_tables import CoderTables
from torchsurgeon.errors import CodecError, short

if TYPE_CHECKING:
    from typing_extensions import Self

_TRANSFORM_ARRAYS = ("matrices", "band_of", "scales", "means")
# The parents follow from the grid.
_TABLE_ARRAYS = tuple(field.name for field in dataclasses.fields(CoderTables) if field.name != "parents")


@dataclasses.dataclass(frozen=True, eq=False)
class HeldTensor:
    """What a fitted codec holds of one boundary tensor.

    Attributes:
        name: the tensor's name in the graph.
        transform: its transform.
        largest: ``float32 [K]``, the largest magnitude of each group's coefficients in the sample.
        tables: the entropy coder's tables, for each step that the file has.
    """

    name: str
    transform: Matrices
    largest: NDArray[numpy.float32]
    tables: tuple[CoderTables, ...]

    _grid_class: ClassVar[type[Grid]] = Grid
    _transform_class: ClassVar[type[Matrices]] = Matrices

    def __post_init__(self) -> None:
        groups = self.transform.grid.groups
        if self.largest.shape != (groups,) or not (self.largest >= 0).all() or not numpy.isfinite(self.largest).all():
            raise CodecError(f"largest must be {groups} finite numbers, none negative; fit the codec again")
        if any(tables.groups != groups for tables in self.tables):
            raise CodecError(f"the tables of {short(self.name)} must be for {groups} groups; fit the codec again")

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

    @classmethod
    def all_of(cls, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> list[Self]:
        """Return the tensors that the header and the arrays of a file hold.

        Raises:
            CodecError: an array is not valid.
            KeyError: something is missing.
            TypeError: something is of another type.
            ValueError: a number is none.
        """
        found = []
        for index, one in enumerate(header["tensors"]):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            found.append(cls._parsed(one, own, len(header["steps"])))
        return found

    @classmethod
    def _parsed(cls, description: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], steps: int) -> Self:
        down, across = map(int, description["block"])
        rank, channels_at, channels = (int(description[name]) for name in ("rank", "channels_at", "channels"))
        grid = cls._grid_class(rank, channels_at, channels, (down, across))
        transform = cls._transform_class(grid, *(arrays[name] for name in _TRANSFORM_ARRAYS))
        parents: NDArray[Any] = grid.parents()
        tables = [
            CoderTables(**{"parents": parents, **{name: arrays[f"{row}.{name}"] for name in _TABLE_ARRAYS}})
            for row in range(steps)
        ]
        return cls(str(description["name"]), transform, arrays["largest"], tuple(tables))
