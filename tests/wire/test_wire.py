"""The wire format: what goes in comes out, to the bit and to the stride, and nothing malformed gets through."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import answered, asked, joined
from partitions import bits
from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.codec import codec_names, find_codec
from torchsurgeon.errors import BodyTooLargeError, EncodingError, ProtocolError
from torchsurgeon.tracing.crossing import EXTENSION_DATATYPES

DTYPES = [
    *[torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64],
    *[torch.int8, torch.int16, torch.int32, torch.int64],
    *[torch.float16, torch.bfloat16, torch.float32, torch.float64],
]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw %= 2
    return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    rank = draw(st.integers(0, 5))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)))
    order = draw(st.permutations(range(rank)))
    tensor = random_tensor(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    inverse = sorted(range(rank), key=lambda dim: order[dim])
    return tensor.permute(order).contiguous().permute(inverse)


names = st.text(min_size=1, max_size=12)


@given(st.dictionaries(names, tensors(), max_size=4), st.none() | names)
@settings(max_examples=150)
def test_any_dense_tensors_come_back_with_their_bits_and_strides(
    sent: dict[str, Tensor], request_id: str | None
) -> None:
    received = asked(sent, request_id=request_id)
    assert list(received.tensors) == list(sent)
    assert received.request_id == request_id
    for name, tensor in sent.items():
        assert_same(received.tensors[name], tensor)
        if tensor.numel():
            assert received.tensors[name].stride() == tensor.stride()


@given(st.dictionaries(names, tensors(), max_size=3))
@settings(max_examples=60)
def test_an_answer_in_json_numbers_says_the_same_as_one_in_bytes(sent: dict[str, Tensor]) -> None:
    sent = {
        name: torch.nan_to_num(tensor.float()).to(tensor.dtype).nan_to_num(0, 0, 0)
        if tensor.dtype.is_floating_point
        else tensor
        for name, tensor in sent.items()
    }
    message = wire.encode_response("m", "1", sent, as_json=set(sent))
    assert message.header_bytes is None
    received = wire.decode_response(joined(message)).tensors
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


@pytest.mark.parametrize("shape", [(1, 512, 1, 1), (2, 512, 1, 1), (2, 3, 8, 8), (1, 1, 4, 4), (2, 1, 1, 7)])
def test_channels_last_survives_even_where_sizes_of_one_hide_it(shape: tuple[int, ...]) -> None:
    tensor = torch.empty_strided(shape, torch.empty(shape).to(memory_format=torch.channels_last).stride())
    _, c, h, w = shape
    tensor = tensor.normal_().as_strided(shape, (h * w * c, 1, w * c, c))
    assert asked({"x": tensor}).tensors["x"].stride() == tensor.stride()


def test_tensors_that_are_not_dense_are_sent_row_major() -> None:
    base = torch.arange(48.0).view(2, 4, 6)
    for tensor in (base[:, ::2], base.expand(3, 2, 4, 6), base[..., 1:], base.transpose(0, 2)[:, 1:]):
        received = asked({"x": tensor}).tensors["x"]
        assert torch.equal(received, tensor)
        assert received.is_contiguous()


def test_a_client_that_does_not_know_dim_order_is_answered_row_major() -> None:
    tensor = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    message = wire.encode_response("m", "1", {"y": tensor}, dim_order=False)
    assert b"dim_order" not in message.buffers[0]
    assert torch.equal(wire.decode_response(joined(message), message.header_bytes).tensors["y"], tensor)


def test_encoding_copies_no_dense_tensor() -> None:
    plain = torch.zeros(2, 3, 8, 8)
    last = torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)
    message = wire.encode_request({"plain": plain, "last": last})
    plain[0, 0, 0, 0] = 7.0
    last[1, 2, 3, 4] = 9.0
    received = wire.decode_request(joined(message), message.header_bytes).tensors
    assert received["plain"][0, 0, 0, 0] == 7.0
    assert received["last"][1, 2, 3, 4] == 9.0


def test_decoding_aligned_bytes_copies_nothing_and_decoding_others_aligns_them() -> None:
    message = wire.encode_request({"a": torch.ones(3), "b": torch.ones(16)})
    assert message.header_bytes is not None
    assert message.header_bytes % 64 == 0
    body = torch.empty(message.size_bytes, dtype=torch.uint8)
    body.numpy().data[:] = joined(message)
    received = wire.decode_request(body.numpy().data, message.header_bytes).tensors
    body.zero_()
    assert received["a"].sum() == 0
    assert received["b"].sum() == 16
    assert all(tensor.data_ptr() % 64 == 0 for tensor in received.values())


def test_read_only_bytes_are_decoded_into_memory_that_may_be_written() -> None:
    message = wire.encode_request({"a": torch.ones(16)})
    body = bytes(joined(message))
    wire.decode_request(body, message.header_bytes).tensors["a"].zero_()
    assert wire.decode_request(body, message.header_bytes).tensors["a"].sum() == 16


def test_parameters_outputs_and_ids_are_carried() -> None:
    request = asked({"x": torch.ones(1)}, outputs=["y", "z"], request_id="7", parameters={"deadline": 3})
    assert [(output.name, output.binary) for output in request.outputs] == [("y", True), ("z", True)]
    assert request.binary_output
    assert request.request_id == "7"
    assert request.parameters["deadline"] == 3
    response = answered({"y": torch.ones(1)}, "2", request_id="7", parameters={"queue_s": 0.5})
    assert (response.model_name, response.model_version, response.request_id) == ("m", "2", "7")
    assert response.parameters["queue_s"] == 0.5


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_json_data_may_be_flat_or_nested(data: list[Any]) -> None:
    received = decode({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 3], "data": data}]})
    assert torch.equal(received.tensors["x"], torch.arange(1.0, 7.0).view(2, 3))


def test_nan_cannot_be_answered_in_json() -> None:
    with pytest.raises(ProtocolError, match="binary"):
        wire.encode_response("m", "1", {"y": torch.tensor([math.nan])}, as_json=["y"])


def test_a_dtype_without_a_name_cannot_be_sent() -> None:
    with pytest.raises(EncodingError, match="bits8"):
        wire.encode_request({"x": torch.zeros(1, dtype=torch.uint8).view(torch.bits8)})


EXTENSIONS = sorted(EXTENSION_DATATYPES.items(), key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize(("dtype", "name"), EXTENSIONS, ids=[name for _, name in EXTENSIONS])
def test_complex_and_float8_cross_with_every_bit_under_every_codec(dtype: torch.dtype, name: str, codec: str) -> None:
    for shape in ((2, 8, 4, 6), (), (0, 3), (1, 4, 1, 1)):
        data = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        dense = data.view(dtype).reshape(shape) if data.numel() else torch.empty(shape, dtype=dtype)
        forms = [dense, *(([dense.to(memory_format=torch.channels_last), dense[:, ::2]]) if dense.dim() == 4 else [])]
        for tensor in forms:
            sent = {"x": tensor, "one": torch.ones(3)}
            message = wire.encode_request(sent, codecs={"x": find_codec(codec)}, crc32=True)
            assert f'"datatype":"{name}"'.encode() in bytes(message.buffers[0])
            received = wire.decode_request(joined(message), message.header_bytes).tensors["x"]
            assert_same(received, tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_lazily_conjugated_and_negated_tensors_cross_as_their_values(dtype: torch.dtype, codec: str) -> None:
    tensor = torch.randn(3, 5, dtype=dtype)
    lazy = {"conj": tensor.conj(), "neg": tensor.conj().imag, "both": torch._neg_view(tensor.conj()), "t": tensor.mH}
    received = asked(lazy, codecs=dict.fromkeys(lazy, find_codec(codec))).tensors
    for name, sent in lazy.items():
        assert torch.equal(received[name], sent.resolve_conj().resolve_neg()), name
        assert not received[name].is_conj()
        assert not received[name].is_neg()


@pytest.mark.parametrize(("dtype", "name"), EXTENSIONS, ids=[name for _, name in EXTENSIONS])
def test_complex_and_float8_have_no_form_in_json(dtype: torch.dtype, name: str) -> None:
    tensor = torch.zeros(2 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    with pytest.raises(EncodingError, match=f"{name}, which has no form in JSON; ask for binary"):
        wire.encode_response("m", "1", {"y": tensor}, as_json=["y"])
    with pytest.raises(ProtocolError, match=f"{name}, which has no form in JSON; send it as binary"):
        decode({"inputs": [{"name": "x", "datatype": name, "shape": [2], "data": [0, 0]}]})


def decode(header: object, payload: bytes = b"", header_bytes: int | None = None) -> wire.InferRequest:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    binary = payload or header_bytes is not None
    return wire.decode_request(bytearray(text + payload), (header_bytes or len(text)) if binary else None)


def one(**changes: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    entry.update(changes)
    return {"inputs": [{key: value for key, value in entry.items() if value is not ...}]}


def size(value: object) -> dict[str, object]:
    return {"binary_data_size": value}


EIGHT = bytes(8)

ATTACKS: list[tuple[str, object, bytes, str]] = [
    ("no JSON at all", b"\x00\x01", b"", "not valid JSON"),
    ("empty body", b"", b"", "not valid JSON"),
    ("not UTF-8", b'{"id": "\xff"}', b"", "not UTF-8"),
    ("not an object", [1], b"", "must be an object"),
    ("cut off", b'{"inputs": [', b"", "not valid JSON"),
    ("NaN", b'{"inputs": [NaN]}', b"", "not valid JSON"),
    ("duplicate key", b'{"inputs": [], "inputs": []}', b"", "same key twice"),
    ("nesting bomb", b'{"inputs": ' + b"[" * 200_000, b"", "nested too deeply"),
    ("object bomb", b'{"a": ' * 100_000, b"", "nested too deeply"),
    ("huge number", b'{"inputs": [' + b"9" * 100_000 + b"]}", b"", "not valid JSON"),
    ("no inputs", {}, b"", "inputs"),
    ("inputs not a list", {"inputs": {"x": 1}}, b"", "list of objects"),
    ("input not an object", {"inputs": [3]}, b"", "list of objects"),
    ("name missing", one(name=...), EIGHT, "non-empty string"),
    ("name not text", one(name=3), EIGHT, "non-empty string"),
    ("datatype missing", one(datatype=...), EIGHT, "datatype"),
    ("datatype unknown", one(datatype="BYTES"), EIGHT, "datatype must be one of"),
    ("datatype unhashable", one(datatype=["FP32"]), EIGHT, "datatype must be one of"),
    ("shape missing", one(shape=...), EIGHT, "shape"),
    ("shape negative", one(shape=[-2]), EIGHT, "non-negative"),
    ("shape minus one twice", one(shape=[-1, -2]), EIGHT, "non-negative"),
    ("shape float", one(shape=[2.0]), EIGHT, "non-negative"),
    ("shape bool", one(shape=[True, 2]), EIGHT, "non-negative"),
    ("shape text", one(shape="2"), EIGHT, "non-negative"),
    ("shape nested bomb", one(shape=json.loads("[" * 300 + "]" * 300)), EIGHT, "non-negative"),
    ("shape overflows", one(shape=[2**62, 4], parameters=size(0)), EIGHT, "elements"),
    ("shape overflows beside zero", one(shape=[2**62, 0], parameters=size(0)), EIGHT, "elements"),
    ("rank too high", one(shape=[1] * 40, parameters=size(4)), EIGHT, "dimensions"),
    ("size short", one(parameters=size(4)), EIGHT, "takes 8 bytes"),
    ("size long", one(parameters=size(16)), EIGHT, "takes 8 bytes"),
    ("size negative", one(parameters=size(-8)), EIGHT, "takes 8 bytes"),
    ("size float", one(parameters=size(8.0)), EIGHT, "takes 8 bytes"),
    ("size bool", one(shape=[1], datatype="UINT8", parameters=size(True)), EIGHT, "takes 1 bytes"),
    ("size huge", one(shape=[2**30], parameters=size(2**32)), EIGHT, "are left in the body"),
    ("body too short", one(shape=[4], parameters=size(16)), EIGHT, "are left in the body"),
    ("bytes left over", one(shape=[1], parameters=size(4)), EIGHT, "left over"),
    ("no header length", one(), b"", "are left in the body"),
    ("data and bytes", one(data=[1, 2]), EIGHT, "both data and binary_data_size"),
    ("neither", one(parameters=...), b"", "neither data nor binary_data_size"),
    ("parameters not an object", one(parameters=[8]), EIGHT, "must be an object"),
    ("shared memory", one(parameters={"shared_memory_region": "a"}), EIGHT, "shared memory"),
    ("dim_order short", one(parameters={**size(8), "dim_order": []}), EIGHT, "permutation"),
    ("dim_order bool", one(shape=[1, 2], parameters={**size(8), "dim_order": [True, False]}), EIGHT, "permutation"),
    ("dim_order repeats", one(shape=[1, 2], parameters={**size(8), "dim_order": [0, 0]}), EIGHT, "permutation"),
    ("bool out of range", one(datatype="BOOL", shape=[8]), b"\x02" * 8, "other than 0 and 1"),
    ("twice the same", {"inputs": one()["inputs"] * 2}, EIGHT * 2, "twice"),
    ("id not text", {"id": 3, **one()}, EIGHT, "must be a string"),
    ("flag not bool", {"parameters": {"binary_data_output": 1}, **one()}, EIGHT, "true or false"),
    ("output twice", {"outputs": [{"name": "y"}, {"name": "y"}], **one()}, EIGHT, "twice"),
    ("classification", {"outputs": [{"name": "y", "parameters": {"classification": 3}}], **one()}, EIGHT, "classif"),
    ("data too short", one(parameters=..., data=[1]), b"", "1 values"),
    ("data too long", one(parameters=..., data=[1, 2, 3]), b"", "3 values"),
    ("data ragged", one(parameters=..., shape=[2, 2], data=[[1, 2], [3]]), b"", "nesting"),
    ("data too deep", one(parameters=..., data=[[1, 2]]), b"", "nesting"),
    ("data bomb", one(parameters=..., data=json.loads("[" * 300 + "]" * 300)), b"", "nesting"),
    ("data text", one(parameters=..., data=["1", "2"]), b"", "str values"),
    ("data null", one(parameters=..., data=[None, 1]), b"", "NoneType values"),
    ("data object", one(parameters=..., data={"0": 1}), b"", "values"),
    ("data bool for float", one(parameters=..., data=[True, 1.0]), b"", "bool values"),
    ("data float for int", one(parameters=..., datatype="INT32", data=[1.5, 1]), b"", "float values"),
    ("data out of range", one(parameters=..., datatype="UINT8", data=[256, 1]), b"", "does not fit"),
    ("data negative", one(parameters=..., datatype="UINT64", data=[-1, 1]), b"", "does not fit"),
    ("data huge", one(parameters=..., datatype="INT64", data=[2**63, 1]), b"", "does not fit"),
    ("data infinite", b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[1e999]}]}', b"", "does not fit"),
    ("data too large for half", one(parameters=..., datatype="FP16", data=[70000.0, 1]), b"", "does not fit"),
    ("data two for bool", one(parameters=..., datatype="BOOL", data=[2, 1]), b"", "does not fit"),
]


@pytest.mark.parametrize(("header", "payload", "says"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
def test_a_malformed_message_is_refused_with_the_reason(header: object, payload: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(header, payload)


@pytest.mark.parametrize("length", [-1, 10_000, True])
def test_a_header_length_that_lies_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=wire.HEADER_LENGTH):
        wire.decode_request(bytearray(b"{}"), length)


@pytest.mark.parametrize("text", ["", "-1", "1e3", "0x10", " 5", "5 ", "٣", "1" * 40])
def test_a_header_length_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="number of bytes"):
        wire.header_length(text)


def test_a_header_over_the_cap_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(BodyTooLargeError, match="at most"):
        wire.decode_request(bytearray(b" " * (wire.MAX_HEADER_BYTES + 1)), wire.MAX_HEADER_BYTES + 1)


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_message_decodes_or_is_refused_and_nothing_else(data: st.DataObject) -> None:
    message = wire.encode_request({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bool)})
    body = joined(message)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    with contextlib.suppress(ProtocolError):
        wire.decode_request(body, data.draw(st.sampled_from([message.header_bytes, None, 10])))


# PyTorch means to remove the dtypes of quantized tensors one day; models that have them are still about.
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32])
def test_a_quantized_tensor_keeps_its_integers_scale_zero_point_and_layout(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tensor = torch.quantize_per_tensor(values, 0.1 + 2**-40, 3, dtype)
    decoded = asked({"q": tensor}).tensors["q"]
    assert decoded.dtype == dtype
    assert (decoded.q_scale(), decoded.q_zero_point()) == (tensor.q_scale(), tensor.q_zero_point())
    assert torch.equal(decoded.int_repr(), tensor.int_repr())
    assert decoded.stride() == tensor.stride()


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_a_tensor_quantized_per_channel_is_refused() -> None:
    tensor = torch.quantize_per_channel(torch.randn(2, 3), torch.ones(2), torch.zeros(2), 0, torch.qint8)
    with pytest.raises(ProtocolError, match="per tensor"):
        wire.encode_request({"q": tensor})


@pytest.mark.parametrize(
    ("datatype", "quantized"),
    [
        ("UINT8", {"scale": 0.0, "zero_point": 0}),
        ("UINT8", {"scale": -1.0, "zero_point": 0}),
        ("UINT8", {"scale": 1, "zero_point": 0}),
        ("UINT8", {"scale": 1.0, "zero_point": 256}),
        ("INT8", {"scale": 1.0, "zero_point": 200}),
        ("UINT8", {"scale": 1.0}),
        ("UINT8", {"scale": 1.0, "zero_point": True}),
        ("UINT8", [1.0, 0]),
        ("INT16", {"scale": 1.0, "zero_point": 0}),
    ],
)
def test_a_quantization_that_cannot_be_is_refused(datatype: str, quantized: object) -> None:
    size = 2 if datatype == "INT16" else 1
    entry = {
        "name": "q",
        "datatype": datatype,
        "shape": [1],
        "parameters": {"binary_data_size": size, "quantized": quantized},
    }
    header = json.dumps({"inputs": [entry]}).encode()
    with pytest.raises(ProtocolError, match="quantized"):
        wire.decode_request(header + bytes(size), len(header))


@given(st.dictionaries(names, tensors(), min_size=1, max_size=3), st.data())
@settings(max_examples=150)
def test_a_flipped_bit_of_a_checked_message_is_always_found(sent: dict[str, Tensor], data: st.DataObject) -> None:
    request = wire.encode_request(sent, crc32=True)
    assert wire.decode_request(joined(request), request.header_bytes).crc32
    answer = wire.encode_response("model", "1", sent, parameters='{"queue_s":0.1}', crc32=True)
    received = wire.decode_response(joined(answer), answer.header_bytes)
    assert received.parameters["queue_s"] == 0.1
    for name, tensor in sent.items():
        assert_same(received.tensors[name], tensor)

    bit = data.draw(st.integers(0, 8 * min(request.size_bytes, answer.size_bytes) - 1))
    for message, decode in ((request, wire.decode_request), (answer, wire.decode_response)):
        body = joined(message)
        body[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            decode(body, message.header_bytes)
        with pytest.raises(ProtocolError):
            decode(body[:-1], message.header_bytes)
