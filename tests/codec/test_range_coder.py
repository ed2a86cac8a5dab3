"""The entropy coder: what it is given comes back, in about as many bits as its tables say, whatever anybody sends."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from coder_tables import random_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchsurgeon import _native
from torchsurgeon.codec.range_coder import bits, decode, encode, fold, levels
from torchsurgeon.codec.range_fit import fit_tables
from torchsurgeon.codec.range_tables import LEVELS, TOTAL, CoderTables
from torchsurgeon.errors import CodecError, NativeUnavailableError

pytestmark = pytest.mark.skipif(not _native.available(), reason="no compiled extension: make setup")

GROUPS = 24
# Each group's parents are the two before it.
PARENTS = numpy.stack([numpy.arange(GROUPS) - 1, numpy.arange(GROUPS) - 2], axis=1).clip(-1).astype(numpy.int32)


def source(inputs: int, seed: int = 0, height: int = 5, width: int = 6) -> Tensor:
    """Integers like coefficients: groups of different spread, positions that are calm or busy in all groups."""
    generator = torch.Generator().manual_seed(seed)
    busy = torch.exp(0.8 * torch.randn(inputs, 1, height, width, generator=generator))
    spread = torch.exp(-torch.arange(GROUPS) / 6).view(1, -1, 1, 1) * 4
    return (torch.randn(inputs, GROUPS, height, width, generator=generator) * busy * spread).round().int()


@pytest.fixture(scope="module")
def tables() -> CoderTables:
    return fit_tables(source(64), PARENTS, symbols=16)


def reference_decode(data: bytes, shape: tuple[int, int, int], tables: CoderTables) -> list[list[list[int]]]:
    """Decode as the module's docstring says, with Python's integers and nothing quick."""
    groups, height, width = shape
    stream = data[:-4]
    state_bytes = 4 + len(stream) % 4
    state = int.from_bytes(stream[:state_bytes], "little")
    words = [int.from_bytes(stream[i : i + 4], "little") for i in range(state_bytes, len(stream), 4)]

    def advanced(new: int) -> int:
        return new << 32 | words.pop(0) if new < 1 << 31 and words else new

    def raw_bits(count: int) -> int:
        nonlocal state
        value = state & ((1 << count) - 1)
        state = advanced(state >> count)
        return value

    values = [[[0] * width for _ in range(height)] for _ in range(groups)]

    def magnitude(group: int, y: int, x: int) -> int:
        inside = group >= 0 and 0 <= y < height and 0 <= x < width
        return min(abs(values[group][y][x]), 31) if inside else 0

    state = advanced(state)
    for group in range(groups):
        for y in range(height):
            for x in range(width):
                near = [(group, y, x - 1), (group, y - 1, x), (group, y - 1, x - 1), (group, y - 1, x + 1)]
                seen = near + [(int(parent), y, x) for parent in tables.parents[group]]
                weights = [int(weight) for weight in tables.weights[group]]
                last = [min(sum(magnitude(group - n, y, x) for n in range(1, size + 1)), 255) for size in (16, 128)]
                weighted = weights[4] * last[0] // 16 + weights[5] * last[1] // 64 + int(tables.bias[group])
                for weight, at in zip(weights[:4] + weights[6:], seen, strict=True):
                    weighted += weight * magnitude(*at)
                total = min(weighted, 4095) + 4
                octave = total.bit_length() - 3
                row = tables.row_of[tables.table_of[group], 4 * octave + ((total >> octave) & 3)]
                ends = [int(end) for end in tables.cumulative[row]]
                slot = state % TOTAL
                symbol = max(s for s in range(tables.symbols) if ends[s] <= slot)
                state = advanced((ends[symbol + 1] - ends[symbol]) * (state // TOTAL) + slot - ends[symbol])
                if symbol == tables.symbols - 1:
                    order = count = int(tables.escape_bits[row])
                    while raw_bits(1) == 0:
                        count += 1
                    high = raw_bits(count - 16) if count > 16 else 0
                    symbol += (high << 16 | raw_bits(min(count, 16))) + 2**count - 2**order
                values[group][y][x] = -(symbol + 1) // 2 if symbol % 2 else symbol // 2
    assert (state, words) == (1 << 16, [])
    return values


def resealed(stream: bytes, shape: tuple[int, ...], tables: CoderTables) -> bytes:
    """What somebody would send who knows shape and tables, and how checksums are made."""
    described = b"".join(size.to_bytes(4, "little") for size in shape)
    return stream + zlib.crc32(stream, zlib.crc32(described, tables.checksum)).to_bytes(4, "little")


# --- there and back ---


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 16, 17, 18, 33, 64]), st.integers(0, 8), st.data())
def test_any_integers_come_back_under_any_tables(seed: int, symbols: int, parents: int, data: st.DataObject) -> None:
    rng = numpy.random.default_rng(seed)
    shape = tuple(data.draw(st.integers(0, most)) for most in (40, 4, 20))
    tables = random_tables(rng, shape[0], parents, symbols)
    spread = torch.from_numpy(rng.choice([0, 0, 1, 5, 100, 2**31], shape).astype(numpy.float64))
    values = (torch.from_numpy(rng.uniform(-1, 1, shape)) * spread).int()
    encoded = encode(values, tables)
    assert torch.equal(decode(encoded, shape, tables), values)
    assert reference_decode(encoded, shape, tables) == values.tolist()


@pytest.mark.parametrize("extreme", [2**31 - 1, -(2**31), -(2**31) + 1, 16, -17])
def test_values_far_beyond_the_samples_come_back(extreme: int, tables: CoderTables) -> None:
    values = source(1, seed=5)[0]
    values[3, 2, 1] = values[0, 0, 0] = values[-1, -1, -1] = extreme
    assert torch.equal(decode(encode(values, tables), values.shape, tables), values)
    everywhere = torch.full_like(values, extreme)
    assert torch.equal(decode(encode(everywhere, tables), values.shape, tables), everywhere)


@pytest.mark.parametrize("shape", [(24, 1, 1), (24, 1, 200), (24, 200, 1), (24, 33, 17), (24, 0, 4), (24, 4, 0)])
def test_the_grid_may_differ_from_that_of_the_samples(shape: tuple[int, int, int], tables: CoderTables) -> None:
    values = torch.randint(-3, 4, shape)
    assert torch.equal(decode(encode(values, tables), shape, tables), values.int())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.uint8])
def test_integers_of_any_width_are_taken_from_any_memory(dtype: torch.dtype, tables: CoderTables) -> None:
    values = source(1)[0].clamp(0, 100).to(dtype).permute(0, 2, 1)
    assert torch.equal(decode(encode(values, tables), values.shape, tables), values.int())


def test_many_threads_may_code_at_once(tables: CoderTables) -> None:
    inputs = list(source(16, seed=7))
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(lambda x: encode(x, tables), inputs * 4))
        decoded = list(pool.map(lambda data: decode(data, inputs[0].shape, tables), encoded))
    assert encoded == [encode(x, tables) for x in inputs] * 4
    assert all(map(torch.equal, decoded, inputs * 4))


def test_a_stream_is_the_same_on_every_machine_and_in_every_version() -> None:
    # A digest here would only say that something changed; the reference above says what is right.
    tables = CoderTables(
        cumulative=numpy.array(
            [[0, 20000, 24000, 28000, 30000, 32000, TOTAL], [0, 1, 2, 3, 4, 5, TOTAL]], numpy.uint16
        ),
        escape_bits=numpy.array([0, 3], numpy.uint8),
        row_of=(numpy.arange(2 * LEVELS).reshape(2, LEVELS) // 30 % 2).astype(numpy.uint8),
        table_of=numpy.array([0, 1, 1, 0], numpy.uint16),
        parents=numpy.array([[-1, -1], [0, -1], [-1, 1], [2, 0]], numpy.int32),
        weights=numpy.arange(32).reshape(4, 8).astype(numpy.uint8),
        bias=numpy.array([0, 5, 60, 700], numpy.uint16),
    )
    values = torch.tensor([[0, -1, 7], [2, 0, -40000], [0, 0, 1], [3, -3, 0]]).view(4, 1, 3)
    stream = "28b74989aba647000d4806324bc128b622aaae"
    assert encode(values, tables).hex() == stream
    assert torch.equal(decode(bytes.fromhex(stream), (4, 1, 3), tables), values.int())


# --- how many bits ---


def test_a_stream_is_as_long_as_its_tables_say(tables: CoderTables) -> None:
    for values in source(8, seed=3):
        size, ideal = len(encode(values, tables)), float(bits(values, tables).sum()) / 8
        assert ideal + 4 <= size <= ideal + 8 + ideal / 1000


def test_all_zero_takes_hardly_a_byte_beside_the_checksum() -> None:
    tables = fit_tables(torch.cat([source(8), torch.zeros(120, GROUPS, 5, 6, dtype=torch.int32)]), PARENTS)
    assert len(encode(torch.zeros(GROUPS, 5, 6, dtype=torch.int32), tables)) <= 4 + 4 + 18


def test_constriction_needs_as_many_bytes_for_the_same_symbols_and_decodes_the_same(tables: CoderTables) -> None:
    constriction = pytest.importorskip("constriction", reason="no wheel for this platform")
    values = source(1, seed=11)[0]
    row = tables.row_of[tables.table_of[:, None, None], levels(values, tables).numpy()].reshape(-1)
    symbols = fold(values).clamp(max=tables.symbols - 1).reshape(-1).int().numpy()
    chances = (numpy.diff(tables.cumulative.astype(numpy.float64)) / TOTAL)[row].astype(numpy.float32)
    family = constriction.stream.model.Categorical(perfect=False)
    theirs = constriction.stream.stack.AnsCoder()
    theirs.encode_reverse(symbols, family, chances)
    # What is left of our own price are the bits behind escapes, which they were not given.
    price, of_symbols = bits(values, tables).double().sum(), -numpy.log2(chances[numpy.arange(len(row)), symbols]).sum()
    escapes = float(price) - float(of_symbols)
    ours = 8 * (len(encode(values, tables)) - 4) - escapes
    assert abs(ours - theirs.num_valid_bits()) <= 32 + ours / 1000
    decoded = theirs.decode(family, chances)
    mine = decode(encode(values, tables), values.shape, tables).reshape(-1)
    assert numpy.array_equal(decoded, fold(mine).clamp(max=tables.symbols - 1).numpy())


def test_contexts_save_bits_on_values_that_were_not_fitted() -> None:
    sample, held_out = source(100), source(20, seed=1)
    fitted = fit_tables(sample)
    # Positions that are busy in one group are busy in all, which the windows see.
    spread_out = held_out.flatten(2)[:, :, torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    alone = torch.stack([one.roll(k, -1) for k, one in enumerate(spread_out.transpose(0, 1))], 1)
    taken = [float(bits(values, fitted).sum()) for values in (held_out, alone.view_as(held_out))]
    assert taken[0] < 0.95 * taken[1]


def test_parents_save_bits_where_they_alone_tell() -> None:
    generator = torch.Generator().manual_seed(0)

    def pairs(inputs: int) -> Tensor:
        """Group k + 12 is as busy at each position as group k is, and no other group is."""
        busy = torch.exp2(2 * torch.randn(inputs, 12, 4, 4, generator=generator)).repeat(1, 2, 1, 1)
        return (busy * torch.randn(inputs, GROUPS, 4, 4, generator=generator)).round().int()

    sample, held_out = pairs(100), pairs(20)
    parents = (numpy.arange(GROUPS)[:, None] - 12).clip(-1).astype(numpy.int32)
    without, with_them = (float(bits(held_out, fit_tables(sample, of)).sum()) for of in (None, parents))
    assert with_them < 0.97 * without


def test_candidates_are_priced_beside_values_that_stay(tables: CoderTables) -> None:
    values = source(1, seed=2)[0]
    assert torch.equal(bits(values, tables), bits(values, tables, beside=values))
    smaller = values - values.sign()
    priced = bits(smaller, tables, beside=values)
    assert priced.shape == values.shape
    assert float(priced.sum()) < float(bits(values, tables).sum())
    # A value's own magnitude is not among what its price rests on, and a later one's neither.
    last = values.clone()
    last[-1, -1, -1] += 3
    assert torch.equal(bits(values, tables, beside=last), bits(values, tables))
    several = torch.stack([values, smaller])
    assert torch.equal(bits(several, tables)[0], bits(values, tables))


def test_escaped_values_are_priced_with_their_code(tables: CoderTables) -> None:
    values = torch.full((GROUPS, 1, 1), 1000, dtype=torch.int32)
    size, ideal = len(encode(values, tables)), float(bits(values, tables).sum()) / 8
    assert abs(size - 6 - ideal) <= 2


def test_samples_of_one_value_are_enough_to_fit() -> None:
    for samples in (
        torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        torch.full((3, 2, 1, 5), -7),
        torch.randint(0, 99, (2, 3, 4, 5)),
    ):
        tables = fit_tables(samples)
        assert torch.equal(decode(encode(samples[0], tables), samples[0].shape, tables), samples[0].int())


# --- streams that nobody encoded ---


def test_a_damaged_stream_is_refused(tables: CoderTables) -> None:
    values = source(1)[0]
    data = encode(values, tables)
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(CodecError, match="checksum must be that of"):
            decode(damaged, values.shape, tables)
    for other in (b"", data[:3], data[:4], data[:-1], data[:-4], data[1:], data + b"\0", data + data):
        with pytest.raises(CodecError, match="checksum must be that of"):
            decode(other, values.shape, tables)


def test_a_stream_of_other_tables_or_of_another_shape_is_refused(tables: CoderTables) -> None:
    values = source(1)[0]
    data = encode(values, tables)
    bias = tables.bias.copy()
    bias[3] += 1
    for other_tables, shape in (
        (replace(tables, bias=bias), (GROUPS, 5, 6)),
        (tables, (GROUPS, 6, 5)),
        (tables, (GROUPS, 5, 7)),
    ):
        with pytest.raises(CodecError, match="another codec file"):
            decode(data, shape, other_tables)
    for shape in ((GROUPS - 1, 5, 6), (GROUPS, 30), (GROUPS, -1, 6), (GROUPS, 1 << 30, 1 << 30)):
        with pytest.raises(CodecError, match=r"values must be \[24, H, W\]"):
            decode(data, shape, tables)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.binary(max_size=64), st.integers(-1, 300))
def test_bytes_with_a_right_checksum_give_integers_or_a_codec_error(seed: int, data: bytes, cut: int) -> None:
    tables = random_tables(numpy.random.default_rng(seed), 5, 2, 7)
    shape = (5, 3, 4)
    if cut >= 0:
        data = encode(torch.full(shape, seed % 41 - 20), tables)[:-4][:cut] + data[:8]
    try:
        values = decode(resealed(data, shape, tables), shape, tables)
    except CodecError:
        return
    assert torch.equal(decode(encode(values, tables), shape, tables), values)


def test_a_stream_that_ends_too_early_or_too_late_is_refused_behind_a_right_checksum(tables: CoderTables) -> None:
    values = source(1)[0]
    stream = encode(values, tables)[:-4]
    assert torch.equal(decode(resealed(stream, values.shape, tables), values.shape, tables), values)
    for other in (stream[:-4], stream + bytes(4), stream[:7], stream[4:], bytes(len(stream)), b"\xff" * 40):
        with pytest.raises(CodecError, match="do not decode to shape"):
            decode(resealed(other, values.shape, tables), values.shape, tables)


# --- tables that cannot be ---


@pytest.mark.parametrize(
    ("name", "spoil", "match"),
    [
        ("cumulative", lambda a: a[:, ::-1].copy(), "must rise from 0 to 32768"),
        (
            "cumulative",
            lambda a: numpy.where(a == TOTAL, TOTAL - 1, a).astype(numpy.uint16),
            "must rise from 0 to 32768",
        ),
        ("cumulative", lambda a: numpy.where(a == a[0, 2], a[0, 1], a), "must rise from 0 to 32768"),
        ("cumulative", lambda a: a[:, :2], "2 to 64 symbols"),
        ("cumulative", lambda a: a[:0], "escape_bits of coder tables must be uint8"),
        ("cumulative", lambda a: a.astype(numpy.int32), "must be uint16"),
        ("cumulative", lambda a: a[0], "must be uint16"),
        ("escape_bits", lambda a: a + 17, "escape_bits of coder tables must be at most 16"),
        ("escape_bits", lambda a: a[1:], "escape_bits of coder tables must be uint8"),
        ("row_of", lambda a: a + 200, "row_of of coder tables must be rows from 0"),
        ("row_of", lambda a: a[:, 1:], "row_of of coder tables must be uint8"),
        ("row_of", lambda a: a[:0], "at least one table"),
        ("table_of", lambda a: a + 100, "table_of of coder tables must be tables from 0"),
        ("parents", lambda a: a + 2, "parents of coder tables must be earlier groups, or -1"),
        ("parents", lambda a: a - 1, "parents of coder tables must be earlier groups, or -1"),
        ("parents", lambda a: numpy.full((GROUPS, 9), -1, numpy.int32), "weights of coder tables must be uint8"),
        ("weights", lambda a: a[1:], "weights of coder tables must be uint8"),
        ("bias", lambda a: a * 0 + 65500, "weights of coder tables must be so small"),
        ("bias", lambda a: a[:3], "bias of coder tables must be uint16"),
        ("bias", lambda a: a.tolist(), "bias of coder tables must be uint16"),
        ("bias", lambda a: None, "bias of coder tables must be uint16"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    name: str, spoil: Callable[[Any], Any], match: str, tables: CoderTables
) -> None:
    with pytest.raises(CodecError, match=match):
        CoderTables(**{**tables.arrays(), name: spoil(tables.arrays()[name])})


def test_tables_are_the_same_again_from_their_arrays(tables: CoderTables) -> None:
    again = CoderTables(**{name: array.copy() for name, array in tables.arrays().items()})
    assert again.checksum == tables.checksum
    values = source(1)[0]
    assert encode(values, again) == encode(values, tables)


def test_nobody_changes_tables_behind_their_checks(tables: CoderTables) -> None:
    arrays = {name: array.copy() for name, array in tables.arrays().items()}
    own = CoderTables(**arrays)
    arrays["table_of"][:] = 9999
    assert own.checksum == tables.checksum
    with pytest.raises(ValueError, match="read-only"):
        own.table_of[0] = 9999


def test_values_and_samples_that_cannot_be_are_refused(tables: CoderTables) -> None:
    with pytest.raises(CodecError, match=r"must be integers; got torch\.float32"):
        encode(torch.zeros(GROUPS, 1, 1), tables)
    with pytest.raises(CodecError, match=r"values must be \[24, H, W\].*got the shape \[3, 1, 1\]"):
        encode(torch.zeros(3, 1, 1, dtype=torch.int32), tables)
    with pytest.raises(CodecError, match="must have the shape"):
        bits(source(1)[0], tables, beside=source(1, height=2)[0])
    with pytest.raises(CodecError, match="samples must be integers"):
        fit_tables(torch.zeros(2, 3, 4, 5))
    with pytest.raises(CodecError, match="samples must be integers"):
        fit_tables(torch.zeros(0, 3, 4, 5, dtype=torch.int32))
    with pytest.raises(CodecError, match="2 to 64 symbols"):
        fit_tables(source(2), symbols=65)
    with pytest.raises(CodecError, match="earlier groups, or -1"):
        fit_tables(source(2), PARENTS + 2)


def test_the_extension_refuses_memory_it_may_not_touch(tables: CoderTables) -> None:
    operators = _native.operators("this test")
    values, parts = source(1)[0], {name: torch.from_numpy(a.copy()) for name, a in tables.arrays().items()}
    room, stream = torch.empty(9999, dtype=torch.uint8), torch.zeros(20, dtype=torch.uint8)

    def refused(match: str, values: Tensor = values, room: Tensor = room, **changed: Tensor) -> None:
        lying = {**parts, **changed}.values()
        for run in (
            lambda: operators.range_encode(values, *lying, room),
            lambda: operators.range_decode(stream if room.dtype == torch.uint8 else room, *lying, values),
        ):
            with pytest.raises(RuntimeError, match=match):
                run()

    refused("values has another dtype or rank", values=values.long())
    refused("values has another dtype or rank", values=values.permute(0, 2, 1))
    refused("there are 24 groups, not 23", values=values[1:])
    refused("stream has another dtype", room=torch.empty(999))
    refused("a parent is not an earlier group", parents=parts["parents"] + 1)
    refused("parents, weights and bias are of different groups", weights=parts["weights"][:, 1:].contiguous())
    refused("parents, weights and bias are of different groups", bias=parts["bias"][1:])
    refused("names a row that is not there", row_of=torch.full((tables.row_of.shape), 255, dtype=torch.uint8))
    refused("names a table that is not there", table_of=torch.full((GROUPS,), 99, dtype=torch.uint16))
    refused("the tables are of different sizes", table_of=parts["table_of"][1:])
    refused("does not rise from 0", cumulative=torch.zeros_like(parts["cumulative"]))
    refused("from 2 to 64 symbols", cumulative=torch.zeros(1, 70, dtype=torch.uint16))
    refused("escape_bits are at most 16", escape_bits=torch.full_like(parts["escape_bits"], 17))
    with pytest.raises(RuntimeError, match="at least 16 bytes"):
        operators.range_encode(values, *parts.values(), room[:15])
    assert operators.range_encode(values, *parts.values(), room[:16]) == -1


def test_without_the_extension_an_error_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tables: CoderTables
) -> None:
    values = source(1)[0]
    data = encode(values, tables)
    monkeypatch.setattr(_native, "_load", lambda: (None, "the extension torchsurgeon._C is not built"))
    for run in (
        lambda: encode(values, tables),
        lambda: decode(data, values.shape, tables),
        lambda: fit_tables(source(2)),
    ):
        with pytest.raises(NativeUnavailableError, match="coding integers needs the compiled extension"):
            run()


def test_bits_of_a_certain_symbol_are_few(tables: CoderTables) -> None:
    found = bits(torch.zeros(GROUPS, 3, 3, dtype=torch.int32), tables)
    assert 0 < float(found.min()) < float(found.max()) < -math.log2(1 / TOTAL)
