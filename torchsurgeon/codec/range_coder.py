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
``range_fit`` makes tables (``range_tables``) from samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from torchsurgeon import _native
from torchsurgeon.codec.range_tables import CHECKSUM_BYTES, TOTAL, CoderTables
from torchsurgeon.errors import CodecError

# The native encoder refuses less room, and an integer takes at most 15 bits as a symbol and 65 behind the escape.
_LEAST_ROOM, _MOST_BYTES_EACH = 16, 10
_PURPOSE = "coding integers"
# The arrays of tables as tensors, in their order, and the bits of each row's symbols.
_tensors: WeakKeyDictionary[CoderTables, tuple[Tensor, ...]] = WeakKeyDictionary()
_symbol_bits: WeakKeyDictionary[CoderTables, Tensor] = WeakKeyDictionary()


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
        size = operators.range_encode(values, *_tensors_of(tables), room)
        if size >= 0:
            break
    stream = room[len(room) - size :].numpy().tobytes()
    return stream + tables.checksum_of(stream, values.shape).to_bytes(CHECKSUM_BYTES, "little")


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
    shape = tables.checked_shape(shape)
    view = memoryview(data).cast("B")
    stream, checksum = view[:-CHECKSUM_BYTES], int.from_bytes(view[-CHECKSUM_BYTES:], "little")
    if len(view) <= CHECKSUM_BYTES or tables.checksum_of(stream, shape) != checksum:
        raise CodecError(
            f"its checksum must be that of its {len(view)} bytes, shape and tables; it is damaged, or was encoded with "
            "another codec file"
        )
    values = torch.empty(shape, dtype=torch.int32)
    memory = torch.from_numpy(numpy.frombuffer(stream, numpy.uint8).copy())
    if not operators.range_decode(memory, *_tensors_of(tables), values):
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
    found = _symbol_bits_of(tables)[row, symbol]
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
        operators.range_levels(_checked(one, tables), *_tensors_of(tables)[4:], into)
    return found


def fold(values: Tensor) -> Tensor:
    """Return 0, 1, 2, 3, 4, … for 0, -1, 1, -2, 2, …, as ``int64``."""
    values = values.long()
    return torch.where(values < 0, -2 * values - 1, 2 * values)


def escape_length(beyond: Tensor, order: Tensor | int) -> Tensor:
    """Return the bits of the Exp-Golomb code of an order, for values of at least 0."""
    leading = torch.frexp((beyond + 2**order).double()).exponent - 1
    return (2 * leading - order + 1).float()


def _tensors_of(tables: CoderTables) -> tuple[Tensor, ...]:
    found = _tensors.get(tables)
    if found is None:
        # Copies, since torch warns of arrays that cannot be written to.
        found = _tensors[tables] = tuple(torch.from_numpy(array.copy()) for array in tables.arrays().values())
    return found


def _symbol_bits_of(tables: CoderTables) -> Tensor:
    found = _symbol_bits.get(tables)
    if found is None:
        counts = torch.from_numpy(numpy.diff(tables.cumulative.astype(numpy.float32), axis=1))
        found = _symbol_bits[tables] = -torch.log2(counts / TOTAL)
    return found


def _checked(values: Tensor, tables: CoderTables) -> Tensor:
    tables.checked_shape(values.shape)
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise CodecError(f"values to be coded must be integers; got {values.dtype}")
    return values.to("cpu", torch.int32).contiguous()
