"""The tables of the entropy coder (``range_coder``), and what every stream is checked by; NumPy only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import NDArray

from torchsurgeon.errors import CodecError, short

TOTAL = 1 << 15
LEVELS = 48
NEIGHBOURS = 4
# How many groups a window holds, and what its weight is divided by.
WINDOWS = ((16, 16), (128, 64))
MOST_IN_WINDOW = 255
OWN_WEIGHTS = NEIGHBOURS + len(WINDOWS)
MOST_BY_WINDOWS = sum(255 * MOST_IN_WINDOW // divisor for _, divisor in WINDOWS)
MOST_PARENTS = 8
MOST_SYMBOLS = 64
MOST_MAGNITUDE = 31
_MOST_ESCAPE_BITS = 16
CHECKSUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class CoderTables:
    """What encoder and decoder have to know alike: probabilities, and what they depend on. Arrays are copied.

    Attributes:
        cumulative: ``uint16 [R, S + 1]``. A row rises from 0 to 32,768; the probability of symbol ``s`` is
            ``cumulative[r, s + 1] - cumulative[r, s]`` 32,768ths. S is from 2 to 64.
        escape_bits: ``uint8 [R]``, the order of the Exp-Golomb code behind an escape, at most 16.
        row_of: ``uint8 [T, 48]``, the row for each level of a table.
        table_of: ``uint16 [K]``, the table of each group.
        parents: ``int32 [K, P]``, earlier groups whose magnitudes count; -1 for none. P is at most 8.
        weights: ``uint8 [K, 6 + P]``, by which magnitudes count: left, above, above to the left, above to the right,
            the last 16 groups, the last 128 groups, and then the parents.
        bias: ``uint16 [K]``, what a group's sums begin with.

    Raises:
        CodecError: an array has another dtype or shape, or holds what cannot be.
    """

    cumulative: NDArray[numpy.uint16]
    escape_bits: NDArray[numpy.uint8]
    row_of: NDArray[numpy.uint8]
    table_of: NDArray[numpy.uint16]
    parents: NDArray[numpy.int32]
    weights: NDArray[numpy.uint8]
    bias: NDArray[numpy.uint16]

    def __post_init__(self) -> None:
        groups = len(self.table_of) if numpy.ndim(self.table_of) == 1 else 0
        parents = numpy.shape(self.parents)[-1] if numpy.ndim(self.parents) == 2 else 0
        rows, columns = numpy.shape(self.cumulative) if numpy.ndim(self.cumulative) == 2 else (0, 0)
        tables = len(self.row_of) if numpy.ndim(self.row_of) == 2 else 0
        expected = {
            "cumulative": (numpy.uint16, (rows, columns)),
            "escape_bits": (numpy.uint8, (rows,)),
            "row_of": (numpy.uint8, (tables, LEVELS)),
            "table_of": (numpy.uint16, (groups,)),
            "parents": (numpy.int32, (groups, parents)),
            "weights": (numpy.uint8, (groups, OWN_WEIGHTS + parents)),
            "bias": (numpy.uint16, (groups,)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if not isinstance(array, numpy.ndarray) or array.dtype != dtype or array.shape != shape:
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, numpy.ndarray) else short(array, 60)
                raise CodecError(f"{name} of coder tables must be {numpy.dtype(dtype)} {list(shape)}; got {found}")
            # A copy of its own, in this machine's byte order, that nobody can change behind the checks below.
            own = numpy.array(array, dtype=dtype, order="C")
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        self._check(rows, columns - 1, tables, groups, parents)

    def _check(self, rows: int, symbols: int, tables: int, groups: int, parents: int) -> None:
        if not (2 <= symbols <= MOST_SYMBOLS and 1 <= rows <= 256 and tables >= 1 and parents <= MOST_PARENTS):
            raise CodecError(
                f"coder tables have 2 to {MOST_SYMBOLS} symbols, 1 to 256 rows, at least one table and at most "
                f"{MOST_PARENTS} parents; got {symbols}, {rows}, {tables} and {parents}"
            )
        cumulative = self.cumulative.astype(numpy.int64)
        ends = (cumulative[:, 0] == 0).all() and (cumulative[:, -1] == TOTAL).all()
        if not ends or (numpy.diff(cumulative, axis=1) < 1).any():
            raise CodecError(f"each row of cumulative must rise from 0 to {TOTAL}, by at least 1 for each symbol")
        earlier = numpy.arange(groups)[:, None]
        single = numpy.delete(self.weights.astype(numpy.int64), range(NEIGHBOURS, OWN_WEIGHTS), axis=1)
        sums = self.bias + MOST_MAGNITUDE * single.sum(axis=1) + MOST_BY_WINDOWS
        for name, rule, kept in (
            ("escape_bits", f"at most {_MOST_ESCAPE_BITS}", (self.escape_bits <= _MOST_ESCAPE_BITS).all()),
            ("row_of", f"rows from 0 to {rows - 1}", (self.row_of < rows).all()),
            ("table_of", f"tables from 0 to {tables - 1}", (self.table_of < tables).all()),
            ("parents", "earlier groups, or -1", ((self.parents >= -1) & (self.parents < earlier)).all()),
            (
                "weights",
                f"so small that bias + 31 × their sum is at most {65535 - MOST_BY_WINDOWS}",
                (sums <= 65535).all(),
            ),
        ):
            if not kept:
                raise CodecError(f"{name} of coder tables must be {rule}; the tables are damaged, so fit them again")

    @property
    def groups(self) -> int:
        """K, how many groups of integers the tables are for."""
        return len(self.table_of)

    @property
    def symbols(self) -> int:
        """S, how many symbols there are with the escape."""
        return int(self.cumulative.shape[1]) - 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, to save them; ``CoderTables(**arrays)`` is the same tables."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of all arrays, which every stream's own checksum includes."""
        checksum = 0
        for name, array in self.arrays().items():
            checksum = zlib.crc32(f"{name} {array.shape}".encode(), checksum)
            checksum = zlib.crc32(array.astype(array.dtype.newbyteorder("<")).tobytes(), checksum)
        return checksum

    def checked_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the shape (K, H, W) of values that these tables code.

        Raises:
            CodecError: it is none of theirs.
        """
        shape = tuple(shape)
        if len(shape) != 3 or shape[0] != self.groups or min(shape) < 0 or math.prod(shape) >= 1 << 31:
            raise CodecError(
                f"values must be [{self.groups}, H, W], the groups of the tables; got the shape "
                f"{short(list(shape), 60)}"
            )
        return shape

    def checksum_of(self, stream: bytes | memoryview, shape: Sequence[int]) -> int:
        """Return the checksum that ends a stream of values of a shape (K, H, W)."""
        described = b"".join(int(size).to_bytes(4, "little") for size in shape)
        return zlib.crc32(stream, zlib.crc32(described, self.checksum))
