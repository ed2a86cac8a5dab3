"""Codecs and messages on NumPy arrays are byte for byte those on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from messages import joined

from torchsurgeon import codec as torch_codec
from torchsurgeon import wire
from torchsurgeon.codec import pictures
from torchsurgeon.edge import codec as edge_codec
from torchsurgeon.edge.bundle import DATATYPES
from torchsurgeon.edge.message import decode_answer, encode_request
from torchsurgeon.errors import CodecError, ProtocolError
from torchsurgeon.wire.fields import ITEM_BYTES
from torchsurgeon.wire.tensors import datatype_of, dtype_of

SHAPES = [(2, 70), (1, 3, 8, 9), (3, 2, 5, 4, 4), (257,), (1,), (4, 0, 2), (2, 64, 6, 6)]
RNG = np.random.default_rng(0)


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if dtype == "bool":
        return RNG.random(shape) < 0.5
    if dtype.startswith(("int", "uint")):
        return RNG.integers(0, 100, shape).astype(dtype)
    return (RNG.standard_normal(shape) * 3).astype(dtype)


def same(name: str, array: np.ndarray[Any, Any]) -> None:
    """Encode an array both ways, and decode each way's bytes by the other."""
    tensor = torch.from_numpy(array)
    theirs = torch_codec.find_codec(name).encode(tensor)
    used, data = edge_codec.find_codec(name).encode(array)
    assert (used, bytes(data)) == (theirs.codec, bytes(theirs.data))
    back = edge_codec.find_codec(used).decode(memoryview(bytes(data)), array.dtype, array.shape)
    again = torch_codec.find_codec(used).decode(bytes(data), tensor.dtype, array.shape, max_bytes=1 << 30)
    assert back.dtype == array.dtype
    assert np.array_equal(back, again.numpy(), equal_nan=array.dtype.kind == "f")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("name", edge_codec.NAMES)
def test_an_array_is_encoded_as_a_tensor_is(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    same(name, values(dtype, shape))


PICTURES = ["png", "webp-lossless", "jpeg", "jpeg444-70", "webp-60", "webp-80@0.5", "avif", "avif-60@0.75"]


@pytest.mark.parametrize("name", [name for name in PICTURES if pictures.available(pictures.parse(name).format)])  # type: ignore[union-attr]
@pytest.mark.parametrize("shape", [(3, 40, 30), (2, 3, 33, 40), (1, 1, 48, 48)], ids=str)
def test_images_are_written_as_a_tensors_are(name: str, shape: tuple[int, ...]) -> None:
    soft = np.sin(np.arange(np.prod(shape)) / 400).reshape(shape)
    array = ((soft + 1) * 127).astype(np.uint8)
    same(name, array)
    assert edge_codec.find_codec(name).encode(array)[0] == torch_codec.find_codec(name).name
    # What is no picture, and noise that a picture does not make smaller, are sent as they are.
    for other in (array.astype(np.float32), array.reshape(-1), values("uint8", (1, 3, 2, 2))):
        same(name, other)
        assert edge_codec.find_codec(name).encode(other)[0] == "raw"


def test_pictures_in_memory_of_another_order_are_read() -> None:
    shape = (2, 3, 24, 32)
    array = np.linspace(0, 255, int(np.prod(shape))).reshape(shape).astype(np.uint8)
    tensor = torch.from_numpy(array).contiguous(memory_format=torch.channels_last)
    sent = torch_codec.find_codec("png").encode(tensor)
    assert sent.order == (0, 2, 3, 1)
    back = edge_codec.find_codec("png").decode(sent.data, np.dtype("uint8"), shape, sent.order)
    assert np.array_equal(back.transpose(0, 3, 1, 2), array)


def test_damaged_pictures_are_refused() -> None:
    png, dtype, shape = edge_codec.find_codec("png"), np.dtype("uint8"), (3, 24, 32)
    _, data = png.encode(np.zeros(shape, np.uint8))
    for damaged in (data[:-1], data[4:], memoryview(bytes(data) + b"x")):
        with pytest.raises(CodecError):
            png.decode(damaged, dtype, shape)
    with pytest.raises(CodecError, match="its shape needs a png picture in RGB of 32×25; got RGB of 32×24"):
        png.decode(data, dtype, (3, 25, 32))
    with pytest.raises(CodecError, match="does not encode float32"):
        png.decode(data, np.dtype("float32"), shape)


EDGES = [
    [np.nan, 1.0, 2.0], [np.inf, 1.0], [-np.inf], [0.0] * 300, [5.0] * 300, [1e38, -1e38] * 40, [3e38, -3e38] * 40,
    [65504.0, -65504.0] * 40, [65505.0] * 70, [65519.9, 0.0] * 40, [3.39e38, 0.0] * 40, [1e-40, 0.0] * 40,
    [0.0, 1e-31] * 40, [-0.0, 0.0] * 40, [1.0, 1.0 + 1e-7] * 40, [1.0009765625, 1.0029296875, 1.00390625] * 30,
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: str(edge[:2]))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", edge_codec.NAMES)
def test_values_at_the_edges_are_encoded_as_a_tensors_are(name: str, dtype: str, edge: list[float]) -> None:
    with np.errstate(over="ignore"):
        array = np.array(edge).astype(dtype)
    same(name, array)
    same(name, np.stack([array, array[::-1]])[:, None])


@example([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.0, 1.0], "int8")
@example([0.0, -0.0, 1.0], "int8-channel")
@given(st.lists(st.floats(width=32), min_size=1, max_size=200), st.sampled_from(edge_codec.NAMES))
def test_any_values_are_encoded_as_a_tensors_are(found: list[float], name: str) -> None:
    same(name, np.array(found, np.float32))


@pytest.mark.parametrize("name", ["int8", "int8-channel", "int4", "raw", "zstd", "float16"])
def test_bytes_that_a_codec_cannot_have_made_are_refused(name: str) -> None:
    used, data = edge_codec.find_codec(name).encode(values("float32", (2, 64, 6, 6)))
    assert used == name
    codec, dtype = edge_codec.find_codec(name), np.dtype("float32")
    with pytest.raises(CodecError):
        codec.decode(data[:-1], dtype, (2, 64, 6, 6))
    if name.startswith("int"):
        damaged = bytearray(data)
        damaged[:4] = b"\xff\xff\xff\xff"
        with pytest.raises(CodecError, match="its low must be finite"):
            codec.decode(memoryview(damaged), dtype, (2, 64, 6, 6))
        with pytest.raises(CodecError, match="does not encode int64"):
            codec.decode(data, np.dtype("int64"), (2, 64, 6, 6))


@pytest.mark.parametrize("dtype", DATATYPES.values())
@pytest.mark.parametrize("name", ["raw", "zstd", "int8+zstd", "bfloat16"])
def test_a_request_is_byte_for_byte_that_of_tensors(name: str, dtype: str) -> None:
    arrays = {"a": values(dtype, (2, 70)), "b.c": values(dtype, (1, 3, 4, 4)), "none": values(dtype, (0, 2))}
    arrays["number"] = np.array(7, dtype)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
    ours = encode_request(arrays, edge_codec.find_codec(name))
    codecs = dict.fromkeys(tensors, torch_codec.find_codec(name))
    theirs = wire.encode_request(tensors, codecs=codecs, crc32=True)
    assert joined(ours) == joined(theirs)
    assert (ours.header_bytes, ours.size_bytes) == (theirs.header_bytes, theirs.size_bytes)


def test_an_array_that_is_not_row_major_is_sent_row_major() -> None:
    array = values("float32", (2, 3, 4)).transpose(2, 0, 1)
    message = encode_request({"a": array}, edge_codec.find_codec("raw"))
    decoded = wire.decode_request(joined(message), message.header_bytes)
    assert np.array_equal(decoded.tensors["a"].numpy(), array)


@pytest.mark.parametrize("dtype", DATATYPES.values())
@pytest.mark.parametrize("name", ["raw", "zstd", "int8-channel+zstd", "int4"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_answer_is_read_as_tensors_are(name: str, dtype: str, layout: torch.memory_format) -> None:
    tensors = {"a": torch.from_numpy(values(dtype, (2, 64, 6, 6))).to(memory_format=layout)}
    message = wire.encode_response(
        "m", "1", tensors, codec=torch_codec.find_codec(name), parameters={"queue_s": 0.5}, crc32=True
    )
    arrays, parameters = decode_answer(joined(message), message.header_bytes, max_bytes=1 << 20)
    theirs = wire.decode_response(joined(message), message.header_bytes)
    assert parameters["queue_s"] == 0.5
    assert arrays["a"].dtype == dtype
    assert np.array_equal(arrays["a"], theirs.tensors["a"].numpy())


def test_an_answer_that_numpy_cannot_hold_is_refused() -> None:
    for tensors, as_json in (({"a": torch.zeros(2, dtype=torch.bfloat16)}, ()), ({"a": torch.zeros(2)}, ("a",))):
        message = wire.encode_response("m", "1", tensors, as_json=as_json)
        with pytest.raises(ProtocolError, match="must be binary data of a datatype that NumPy has"):
            decode_answer(joined(message), message.header_bytes, max_bytes=1 << 20)


def test_a_damaged_answer_is_refused() -> None:
    body = joined(message := wire.encode_response("m", "1", {"a": torch.zeros(2)}, crc32=True))
    body[-6] ^= 1
    with pytest.raises(ProtocolError, match="CRC-32"):
        decode_answer(body, message.header_bytes, max_bytes=1 << 20)
    small = wire.encode_response("m", "1", {"a": torch.zeros(2000)}, codec=torch_codec.find_codec("zstd"))
    with pytest.raises(ProtocolError, match="at most 100 are accepted"):
        decode_answer(joined(small), small.header_bytes, max_bytes=100)


def test_datatypes_have_the_sizes_that_pytorch_gives_them() -> None:
    for datatype, size in ITEM_BYTES.items():
        dtype = dtype_of(datatype)
        assert (dtype.itemsize, datatype_of(dtype)) == (size, datatype)
