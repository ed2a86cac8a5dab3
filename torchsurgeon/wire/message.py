"""A message of the Open Inference Protocol v2, encoded and decoded: requests and answers with named tensors."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsurgeon.codec import Codec, EncodedTensor
from torchsurgeon.errors import BodyTooLargeError, CodecError, ProtocolError
from torchsurgeon.wire.header import (
    HEADER_LENGTH,
    MAX_REMEMBERED_BYTES,
    Buffer,
    Entry,
    RequestedOutput,
    check_header_length,
    flag,
    parameters_of,
    parsed_header,
    remembered_request_head,
    request_head,
    response_head,
    split_response_head,
)
from torchsurgeon.wire.tensors import (
    ALIGNMENT_BYTES,
    Quantization,
    datatype_of,
    physical_order,
    quantization_of,
    tensor_from_json,
    tensor_view,
    with_quantization,
)

_NONE: Mapping[str, Any] = MappingProxyType({})
_MAX_DECODED_BYTES = 1 << 30
_PLAIN_REQUEST = '{"parameters":{"binary_data_output":true,"dim_order":true}'
_CHECKED_REQUEST = '{"parameters":{"crc32":true,"binary_data_output":true,"dim_order":true}'
_CRC_BYTES = 4


class InferRequest(NamedTuple):
    """A decoded request. ``outputs`` is empty when the client wants all of them, in the form ``binary_output`` says.

    ``dim_order`` says that the client understands the tensor parameter of that name in the answer. Requests with the
    same header have the same object as ``recurring``; it is None when the header is not remembered, or will not recur.
    """

    tensors: dict[str, Tensor]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    dim_order: bool = False
    request_id: str | None = None
    parameters: Mapping[str, Any] = _NONE
    recurring: object | None = None
    output_codec: Codec | None = None
    crc32: bool = False


class InferResponse(NamedTuple):
    """A decoded answer."""

    tensors: dict[str, Tensor]
    model_name: str = ""
    model_version: str = ""
    request_id: str | None = None
    parameters: Mapping[str, Any] = _NONE


class Encoded(NamedTuple):
    """An encoded message: write ``buffers`` one after the other.

    ``header_bytes`` is the value of ``Inference-Header-Content-Length``, or None when the message is JSON only and the
    header must not be sent. The buffers after the first are views of the tensors' memory and keep it alive.
    """

    buffers: list[Buffer]
    header_bytes: int | None
    size_bytes: int


def encode_request(
    tensors: Mapping[str, Tensor],
    *,
    outputs: Collection[str] = (),
    request_id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    codecs: Mapping[str, Codec] | None = None,
    output_codec: Codec | None = None,
    crc32: bool = False,
) -> Encoded:
    """Encode named tensors as a binary infer request that asks for binary outputs (all of them unless named).

    ``codecs`` has the codec of each tensor that is not sent as it lies in memory, ``output_codec`` is asked for in the
    answer. With ``crc32`` the request ends in its checksum, and asks for one in the answer.
    """
    described, views = _encode_tensors(tensors, (), True, codecs)
    header = _CHECKED_REQUEST if crc32 else _PLAIN_REQUEST
    if output_codec is not None and output_codec.name != "raw":
        parameters = {**(parameters or {}), "output_codec": output_codec.name}
    if parameters:
        own = {"binary_data_output": True, "dim_order": True, **({"crc32": True} if crc32 else {})}
        header = '{"parameters":' + _text({**parameters, **own})
    if request_id is not None:
        header += ',"id":' + _text(request_id)
    if outputs:
        wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        header += ',"outputs":' + _text(wanted)
    return _message(f'{header},"inputs":[{described}]}}', views, True, crc32)


def encode_response(
    model_name: str,
    model_version: str,
    tensors: Mapping[str, Tensor],
    *,
    as_json: Collection[str] = (),
    dim_order: bool = True,
    request_id: str | None = None,
    parameters: Mapping[str, Any] | str | None = None,
    codec: Codec | None = None,
    crc32: bool = False,
) -> Encoded:
    """Encode an answer. Outputs named in ``as_json`` are written as JSON numbers, the others as bytes.

    ``parameters`` may be given as JSON already. ``codec`` encodes the outputs that are written as bytes. Without
    ``dim_order`` every tensor is sent row-major, for clients that do not know that parameter. With ``crc32`` a binary
    answer ends in its checksum.

    Raises ProtocolError when an output to be written as JSON holds NaN or infinity, which JSON cannot say.
    """
    codecs = None if codec is None else dict.fromkeys(tensors, codec)
    described, views = _encode_tensors(tensors, as_json, dim_order, codecs)
    header = f'{{"model_name":{_quoted(model_name)},"model_version":{_quoted(model_version)}'
    if request_id is not None:
        header += ',"id":' + _text(request_id)
    header += f',"outputs":[{described}]'
    binary = any(name not in as_json for name in tensors)
    told = parameters if isinstance(parameters, str) else _text(parameters) if parameters else ""
    if crc32 and binary:
        told = '{"crc32":true' + (f",{told[1:]}" if told else "}")
    if told:
        header += f',"parameters":{told}'
    return _message(header + "}", views, binary, crc32)


def decode_request(
    body: Buffer, header_bytes: int | None = None, *, max_decoded_bytes: int = _MAX_DECODED_BYTES
) -> InferRequest:
    """Decode an infer request. ``header_bytes`` is ``Inference-Header-Content-Length``, None when it was not sent.

    The tensors are views of ``body`` wherever it is writable and aligned. Those that a codec carries may be
    ``max_decoded_bytes`` together. Raises ProtocolError.
    """
    payload = _payload(body, header_bytes)
    remembered = header_bytes is not None and header_bytes <= MAX_REMEMBERED_BYTES
    if remembered:
        head = remembered_request_head(bytes(body[:header_bytes]))
    else:
        head = request_head(parsed_header(body, header_bytes))
    if head.crc32:
        payload = _checked(body, payload)
    tensors = _tensors(head.entries, payload, max_decoded_bytes)
    # What is compressed has another size, and so another header, every time.
    compressed = any(entry.codec is not None and entry.codec.zstd for entry in head.entries)
    recurring = head if remembered and not compressed else None
    return InferRequest(
        tensors,
        head.outputs,
        head.binary_output,
        head.dim_order,
        head.request_id,
        head.parameters,
        recurring,
        head.output_codec,
        head.crc32,
    )


def decode_response(
    body: Buffer, header_bytes: int | None = None, *, max_decoded_bytes: int = _MAX_DECODED_BYTES
) -> InferResponse:
    """Decode an answer; the counterpart of :func:`decode_request`. Raises ProtocolError."""
    payload = _payload(body, header_bytes)
    parts = None
    if header_bytes is not None and header_bytes <= MAX_REMEMBERED_BYTES:
        parts = split_response_head(bytes(body[:header_bytes]))
    if parts is None:
        header = parsed_header(body, header_bytes)
        head = response_head(header)
    else:
        head, header = parts
    parameters = parameters_of(header, "the answer")
    if flag(parameters, "crc32", "the answer", False):
        payload = _checked(body, payload)
    tensors = _tensors(head.entries, payload, max_decoded_bytes)
    return InferResponse(tensors, head.model_name, head.model_version, head.request_id, parameters)


def _message(header: str, views: list[memoryview], binary: bool, crc32: bool = False) -> Encoded:
    text = header.encode()
    if not binary:
        return Encoded([text], None, len(text))
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    check_header_length(len(text), None)
    buffers: list[Buffer] = [text, *views]
    if crc32:
        found = 0
        for buffer in buffers:
            found = zlib.crc32(buffer, found)
        buffers.append(found.to_bytes(_CRC_BYTES, "little"))
    return Encoded(buffers, len(text), sum(map(len, buffers)))


def _encode_tensors(
    tensors: Mapping[str, Tensor], as_json: Collection[str], dim_order: bool, codecs: Mapping[str, Codec] | None
) -> tuple[str, list[memoryview]]:
    """The header's entries, as text, and views of the tensors' memory."""
    entries: list[str] = []
    views: list[memoryview] = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name in as_json:
            entries.append(_entry_with_data(name, tensor))
            continue
        quantization = quantization_of(tensor)
        if quantization is not None:
            tensor = tensor.int_repr()
        if codecs is not None and (codec := codecs.get(name)) is not None and codec.name != "raw":
            encoded = codec.encode(tensor if dim_order else tensor.contiguous())
            if encoded.codec != "raw":
                entries.append(_text(_described(name, tensor.dtype, shape, quantization, encoded)))
                views.append(encoded.data)
                continue
        order, physical = physical_order(tensor if dim_order else tensor.contiguous(), shape)
        entries.append(_entry(name, tensor.dtype, shape, order, quantization))
        if 0 not in shape:
            views.append(physical.numpy().data.cast("B"))
    return ",".join(entries), views


@lru_cache(maxsize=1024)
def _entry(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None,
    quantization: Quantization | None,
) -> str:
    """The entry of a tensor that is sent as it lies in memory."""
    return _text(_described(name, dtype, shape, quantization, None, order))


def _described(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    quantization: Quantization | None,
    encoded: EncodedTensor | None,
    order: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    parameters: dict[str, Any] = {"binary_data_size": math.prod(shape) * dtype.itemsize}
    if encoded is not None:
        parameters = {"binary_data_size": len(encoded.data), "codec": encoded.codec}
        order = encoded.order
    if order is not None:
        parameters["dim_order"] = order
    if quantization is not None:
        parameters["quantized"] = dict(zip(("scale", "zero_point"), quantization, strict=True))
    return {"name": name, "datatype": datatype_of(dtype), "shape": shape, "parameters": parameters}


def _entry_with_data(name: str, tensor: Tensor) -> str:
    data = tensor.detach().reshape(-1).tolist()
    try:
        return _text({"name": name, "datatype": datatype_of(tensor.dtype), "shape": tuple(tensor.shape), "data": data})
    except ValueError:
        raise ProtocolError(
            f"output {name!r} holds NaN or infinity, which JSON cannot say; ask for binary outputs"
        ) from None


def _payload(body: Buffer, header_bytes: int | None) -> memoryview | None:
    """The bytes after the header, as memory that may be written; None for a message without any."""
    if header_bytes is None:
        return None
    if isinstance(header_bytes, bool) or header_bytes < 0:
        raise ProtocolError(f"{HEADER_LENGTH} is {header_bytes}, which is not a number of bytes")
    check_header_length(header_bytes, len(body))
    payload = memoryview(body)[header_bytes:]
    # torch has no read-only tensors; a view of immutable bytes would be undefined behaviour once written to.
    return memoryview(bytearray(payload)) if payload.readonly else payload


def _checked(body: Buffer, payload: memoryview | None) -> memoryview:
    """The payload without the checksum at its end. Raises ProtocolError when the body is not what was sent."""
    if payload is None or len(payload) < _CRC_BYTES:
        raise ProtocolError('the message says "crc32", but no checksum follows its tensors; it was cut short')
    told, found = int.from_bytes(payload[-_CRC_BYTES:], "little"), zlib.crc32(memoryview(body)[:-_CRC_BYTES])
    if told != found:
        raise ProtocolError(
            f"the message has CRC-32 {found:08x}, but its sender gave it {told:08x}: it was damaged on its way"
        )
    return payload[:-_CRC_BYTES]


def _tensors(entries: list[Entry], payload: memoryview | None, max_decoded_bytes: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    available = 0 if payload is None else len(payload)
    for entry in entries:
        if entry.size_bytes is None:
            tensors[entry.name] = tensor_from_json(entry.data, entry.dtype, entry.shape, entry.where)
            continue
        if entry.size_bytes > available - offset:
            raise ProtocolError(
                f"{entry.where} declares {entry.size_bytes} bytes of binary data, but {available - offset} are left in "
                f"the body{f'; was {HEADER_LENGTH} sent?' if payload is None else ''}"
            )
        if entry.codec is None:
            tensor = tensor_view(payload, offset, entry.dtype, entry.shape, entry.order, entry.where)
        else:
            tensor = _decoded(entry, entry.codec, payload, offset, max_decoded_bytes)
            max_decoded_bytes -= entry.tensor_bytes
        tensors[entry.name] = tensor if entry.quantization is None else with_quantization(tensor, entry.quantization)
        offset += entry.size_bytes
    if offset != available:
        raise ProtocolError(f"{available - offset} bytes are left over after the tensors the header declares")
    return tensors


def _decoded(entry: Entry, codec: Codec, payload: memoryview | None, offset: int, max_bytes: int) -> Tensor:
    if entry.tensor_bytes > max_bytes:
        raise BodyTooLargeError(
            f"{entry.where} is {entry.tensor_bytes} bytes once {codec.name} is undone; at most {max_bytes} are taken"
        )
    data = memoryview(b"" if payload is None else payload)[offset : offset + (entry.size_bytes or 0)]
    try:
        return codec.decode(data, entry.dtype, entry.shape, entry.order, max_bytes=max_bytes)
    except CodecError as error:
        raise ProtocolError(f"{entry.where} cannot be decoded: {error}") from None


_text = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@lru_cache(maxsize=256)
def _quoted(name: str) -> str:
    return _text(name)
