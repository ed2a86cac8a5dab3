"""An entropy coder for groups of integers: about as many bits as tables of their probabilities say, in C++.

It codes integers ``values[K, H, W]``: K groups, each on a grid of H×W positions. A group may be one frequency of one
component of a transform, and a position a block of a picture or a token. Groups are coded one after another, row by
row. What is likely for an integer follows from magnitudes that are coded before it: those of its neighbours in the
group (left, above, above to the left, above to the right) and those at its position, in the last 16 groups, in the last
128, and in up to eight earlier groups, its parents. All of it is arithmetic with integers, so two machines agree.

- Magnitudes above 31 count as 31. ``sum = bias + Σ weight × magnitude``, of neighbours and parents, with a bias and
  weights for each group. It adds, rounded down, a sixteenth of weight × the sum over the last 16 groups, and a 64th of
  weight × the sum over the last 128, where sums above 255 count as 255.
- The sum, or 4,095 if it is more, has a level: the sums from 0 to 3 have one each, and as sum + 4 doubles from there,
  four levels follow each time.
- The group's table and the level name a row, which holds the probabilities of the symbols in 32,768ths.
- A symbol is the integer with its sign folded in (0, -1, 1, -2, … are symbols 0, 1, 2, 3, …). The last symbol is the
  escape. How far the integer lies beyond it follows as an Exp-Golomb code, whose order the row says.

A stream is the state (4 to 7 bytes) and the words (4 bytes each) of an asymmetric numeral system (Duda,
arXiv 1311.2540), and then a CRC-32 of them, of the shape and of the tables. ``csrc/range_coder.cpp`` does the work.
``range_fit`` makes tables from samples.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsurgeon import _native
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
_CHECKSUM_BYTES = 4
# The native encoder refuses less room, and an integer takes at most 15 bits as a symbol and 65 behind the escape.
_LEAST_ROOM, _MOST_BYTES_EACH = 16, 10
_PURPOSE = "coding integers"


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

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        # A copy, since torch warns of arrays that cannot be written to.
        return tuple(torch.from_numpy(array.copy()) for array in self.arrays().values())

    @cached_property
    def _symbol_bits(self) -> Tensor:
        return -torch.log2(torch.from_numpy(numpy.diff(self.cumulative.astype(numpy.float32), axis=1)) / TOTAL)


def encode(values: Tensor, tables: CoderTables) -> bytes:
    """Return ``values`` as a stream.

    Args:
        values: integers [K, H, W] on the CPU; H and W are free.
        tables: fitted to such values (``range_fit.fit_tables``). Values that the samples never had take more bits.

    Raises:
        CodecError: the shape is not that of the tables.
        NativeUnavailableError: the compiled extension is missing.
    """
    operators = _native.operators(_PURPOSE)
    values = _checked(values, tables)
    # Most often two bytes each are more than enough; memory that is not written is not taken.
    for most in (2, _MOST_BYTES_EACH):
        room = torch.empty(_LEAST_ROOM + most * values.numel(), dtype=torch.uint8)
        size = operators.range_encode(values, *tables._tensors, room)
        if size >= 0:
            break
    stream = room[len(room) - size :].numpy().tobytes()
    return stream + _checksum(stream, values.shape, tables).to_bytes(_CHECKSUM_BYTES, "little")


def decode(data: bytes | bytearray | memoryview, shape: Sequence[int], tables: CoderTables) -> Tensor:
    """Return the ``int32`` tensor that was encoded.

    Nothing is decoded before the checksum is compared. Its size and that of what is allocated beside it follow from
    the shape alone, so the caller decides which shapes are acceptable.

    Args:
        data: the stream.
        shape: (K, H, W) of the values.
        tables: those that encoded the values.

    Raises:
        CodecError: the stream is damaged, or is of other values: another shape or other tables.
        NativeUnavailableError: the compiled extension is missing.
    """
    operators = _native.operators(_PURPOSE)
    shape = _checked_shape(shape, tables)
    view = memoryview(data).cast("B")
    stream, checksum = view[:-_CHECKSUM_BYTES], int.from_bytes(view[-_CHECKSUM_BYTES:], "little")
    if len(view) <= _CHECKSUM_BYTES or _checksum(stream, shape, tables) != checksum:
        raise CodecError(
            f"its checksum must be that of its {len(view)} bytes, shape and tables; it is damaged, or was encoded with "
            "another codec file"
        )
    values = torch.empty(shape, dtype=torch.int32)
    memory = torch.from_numpy(numpy.frombuffer(stream, numpy.uint8).copy())
    if not operators.range_decode(memory, *tables._tensors, values):
        raise CodecError(f"its {len(view)} bytes do not decode to shape {list(shape)}; encode the values again")
    return values


def bits(values: Tensor, tables: CoderTables, *, beside: Tensor | None = None) -> Tensor:
    """Return how many bits each value takes by its probability: ``float32`` of the shape of ``values``.

    A stream is longer than their sum by 6 to 8 bytes.

    Args:
        values: integers [K, H, W], or [N, K, H, W] for several of them.
        tables: what the values would be coded with.
        beside: the integers whose magnitudes say what is likely; the values themselves unless given. To compare
            candidates for each value while the others stay, give the others here.

    Raises:
        CodecError: the shape is not that of the tables.
        NativeUnavailableError: the compiled extension is missing.
    """
    rows = torch.from_numpy(tables.row_of.copy())
    table_of = torch.from_numpy(tables.table_of.astype(numpy.int64))
    row = rows[table_of.view(-1, 1, 1), levels(values if beside is None else beside, tables).long()].long()
    if row.shape != values.shape:
        raise CodecError(f"the values beside must have the shape {list(values.shape)}; got {list(row.shape)}")
    folded = fold(values)
    symbol = folded.clamp(max=tables.symbols - 1)
    found = tables._symbol_bits[row, symbol]
    escaped = symbol == tables.symbols - 1
    orders = torch.from_numpy(tables.escape_bits.astype(numpy.int64))[row[escaped]]
    found[escaped] += escape_length(folded[escaped] - symbol[escaped], orders)
    return found


def levels(values: Tensor, tables: CoderTables) -> Tensor:
    """Return the level of each value: ``uint8`` of the shape of ``values``, [K, H, W] or [N, K, H, W]."""
    operators = _native.operators(_PURPOSE)
    found = torch.empty(values.shape, dtype=torch.uint8)
    several = values.dim() == 4
    for one, into in zip(values if several else [values], found if several else [found], strict=True):
        operators.range_levels(_checked(one, tables), *tables._tensors[4:], into)
    return found


def fold(values: Tensor) -> Tensor:
    """Return 0, 1, 2, 3, 4, … for 0, -1, 1, -2, 2, …, as ``int64``."""
    values = values.long()
    return torch.where(values < 0, -2 * values - 1, 2 * values)


def escape_length(beyond: Tensor, order: Tensor | int) -> Tensor:
    """Return the bits of the Exp-Golomb code of an order, for values of at least 0."""
    leading = torch.frexp((beyond + 2**order).double()).exponent - 1
    return (2 * leading - order + 1).float()


def _checked(values: Tensor, tables: CoderTables) -> Tensor:
    _checked_shape(values.shape, tables)
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise CodecError(f"values to be coded must be integers; got {values.dtype}")
    return values.to("cpu", torch.int32).contiguous()


def _checked_shape(shape: Sequence[int], tables: CoderTables) -> tuple[int, ...]:
    shape = tuple(shape)
    if len(shape) != 3 or shape[0] != tables.groups or min(shape) < 0 or math.prod(shape) >= 1 << 31:
        raise CodecError(
            f"values must be [{tables.groups}, H, W], the groups of the tables; got the shape {short(list(shape), 60)}"
        )
    return shape


def _checksum(stream: bytes | memoryview, shape: Sequence[int], tables: CoderTables) -> int:
    described = b"".join(int(size).to_bytes(4, "little") for size in shape)
    return zlib.crc32(stream, zlib.crc32(described, tables.checksum))
