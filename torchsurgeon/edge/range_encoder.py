"""The encoder of integers on NumPy arrays: the same streams as ``torchsurgeon.codec.range_coder`` makes.

All integers are known to an encoder, so NumPy finds what is likely for each at once. Only the state of the asymmetric
numeral system goes from one integer to the next, in a loop of Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from torchsurgeon.codec.range_tables import (
    CHECKSUM_BYTES,
    MOST_IN_WINDOW,
    MOST_MAGNITUDE,
    NEIGHBOURS,
    OWN_WEIGHTS,
    TOTAL,
    WINDOWS,
    CoderTables,
)

Array = np.ndarray[Any, Any]

_MOST_SUM = 4095
# The state of an empty stream, and the bits of the words that it gives to the stream.
_EMPTY_STATE, _WORD_BITS, _WORD_BYTES = 1 << 16, 32, 4
_WORD = (1 << _WORD_BITS) - 1
# A state below a frequency's limit takes a symbol of this frequency without a word.
_LIMIT_BITS = 48
# So many integers are objects of Python at a time, which take about a hundred bytes each.
_PIECE = 1 << 15
# The first level of each octave of sums, which begin with 4.
_SUMS = np.arange(_MOST_SUM + 1) + 4
_OCTAVES = np.frexp(_SUMS)[1] - 3
_LEVEL_OF = (4 * _OCTAVES + ((_SUMS >> _OCTAVES) & 3)).astype(np.uint8)


def encode(values: Array, tables: CoderTables) -> bytes:
    """Return integers as a stream.

    Args:
        values: ``int32 [K, H, W]``; H and W are free.
        tables: fitted to such values.

    Raises:
        CodecError: the shape is not that of the tables.
    """
    tables.checked_shape(values.shape)
    wide = values.astype(np.int64)
    folded = np.where(wide < 0, -2 * wide - 1, 2 * wide)
    # A decoder gets integers in the reverse order, so the last is encoded first.
    rows = tables.row_of[tables.table_of[:, None, None], levels(folded, tables)].reshape(-1)[::-1]
    folded = folded.reshape(-1)[::-1]
    stream = _Stream()
    for begin in range(0, len(rows), _PIECE):
        _put(stream, folded[begin : begin + _PIECE], rows[begin : begin + _PIECE], tables)
    data = stream.finished()
    return data + tables.checksum_of(data, values.shape).to_bytes(CHECKSUM_BYTES, "little")


def levels(folded: Array, tables: CoderTables) -> Array:
    """Return the level of each integer: ``uint8`` of the shape of ``folded``.

    Args:
        folded: the integers [K, H, W] as symbols, with their signs folded in.
        tables: what the integers are coded with.
    """
    magnitudes = np.minimum((folded + 1) >> 1, MOST_MAGNITUDE).astype(np.int32)
    weights = tables.weights.astype(np.int32)[:, :, None, None]
    sums = np.broadcast_to(tables.bias.astype(np.int32)[:, None, None], folded.shape).copy()
    groups = len(magnitudes)
    # The sums of all groups before each.
    before = np.zeros((groups + 1, *magnitudes.shape[1:]), np.int32)
    np.cumsum(magnitudes, axis=0, out=before[1:])
    for place, (size, divisor) in enumerate(WINDOWS, NEIGHBOURS):
        window = before[:groups].copy()
        window[size:] -= before[: max(0, groups - size)]
        sums += np.minimum(window, MOST_IN_WINDOW) * weights[:, place] // divisor
    for place, parents in enumerate(tables.parents.T, OWN_WEIGHTS):
        there = np.flatnonzero(parents >= 0)
        sums[there] += magnitudes[parents[there]] * weights[there, place]
    sums[:, :, 1:] += magnitudes[:, :, :-1] * weights[:, 0]
    sums[:, 1:] += magnitudes[:, :-1] * weights[:, 1]
    sums[:, 1:, 1:] += magnitudes[:, :-1, :-1] * weights[:, 2]
    sums[:, 1:, :-1] += magnitudes[:, :-1, 1:] * weights[:, 3]
    found: Array = _LEVEL_OF[np.minimum(sums, _MOST_SUM)]
    return found


class _Stream:
    """A stream that is written from its end to its beginning."""

    def __init__(self) -> None:
        self.state = _EMPTY_STATE
        self.words: list[int] = []

    def put_symbols(self, starts: list[int], frequencies: list[int]) -> None:
        """Add symbols that begin at ``starts`` and are so frequent, in 32,768ths."""
        state, words = self.state, self.words
        for start, frequency in zip(starts, frequencies, strict=True):
            if state >> _LIMIT_BITS >= frequency:
                words.append(state & _WORD)
                state >>= _WORD_BITS
            # 32,768 times the quotient, and the rest.
            state += state // frequency * (TOTAL - frequency) + start
        self.state = state

    def put_escaped(self, beyond: int, order: int) -> None:
        """Add an Exp-Golomb code of an order: in the reverse order zeros, a one, and the bits."""
        code = beyond + (1 << order)
        bits = code.bit_length() - 1
        low = min(bits, 16)
        self._put_bits(code & ((1 << low) - 1), low)
        if bits > 16:
            self._put_bits(code >> 16 & ((1 << (bits - 16)) - 1), bits - 16)
        self._put_bits(1, 1)
        zeros = bits - order
        while zeros:
            self._make_room(62)
            # So many fit until a word is due.
            some = min(zeros, 63 - self.state.bit_length())
            self.state <<= some
            zeros -= some

    def _put_bits(self, value: int, bits: int) -> None:
        self._make_room(63 - bits)
        self.state = self.state << bits | value

    def _make_room(self, limit_bits: int) -> None:
        if self.state >> limit_bits:
            self.words.append(self.state & _WORD)
            self.state >>= _WORD_BITS

    def finished(self) -> bytes:
        """Return the stream: the state, and the words, of which the last comes first."""
        self._make_room(56)
        size = max(_WORD_BYTES, (self.state.bit_length() + 7) // 8)
        return self.state.to_bytes(size, "little") + np.array(self.words[::-1], "<u4").tobytes()


def _put(stream: _Stream, folded: Array, rows: Array, tables: CoderTables) -> None:
    """Add integers, the last first, which have these rows of the tables."""
    escape = tables.symbols - 1
    symbols = np.minimum(folded, escape)
    starts = tables.cumulative[rows, symbols]
    frequencies = (tables.cumulative[rows, symbols + 1] - starts).tolist()
    starts = starts.tolist()
    escaped = np.flatnonzero(symbols == escape)
    beyond, orders = (folded[escaped] - escape).tolist(), tables.escape_bits[rows[escaped]].tolist()
    begin = 0
    # A decoder finds the symbol of the escape before its bits, so these are added first.
    for end, far, order in zip(escaped.tolist(), beyond, orders, strict=True):
        stream.put_symbols(starts[begin:end], frequencies[begin:end])
        stream.put_escaped(far, order)
        begin = end
    stream.put_symbols(starts[begin:], frequencies[begin:])
