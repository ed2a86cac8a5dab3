"""The body of a message around its tensors: header, padding and checksum; no tensor library is needed here."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torchsurgeon.errors import ProtocolError
from torchsurgeon.wire.fields import ALIGNMENT_BYTES, Quantization
from torchsurgeon.wire.header import (
    HEADER_LENGTH,
    MAX_REMEMBERED_BYTES,
    Buffer,
    Entry,
    ResponseHead,
    check_header_length,
    flag,
    parameters_of,
    parsed_header,
    response_head,
    split_response_head,
)

# The start of almost every request's header, ready made.
_PLAIN_REQUEST = '{"parameters":{"binary_data_output":true,"dim_order":true}'
_CHECKED_REQUEST = '{"parameters":{"crc32":true,"binary_data_output":true,"dim_order":true}'
_CRC_BYTES = 4

json_text = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Returns a value as JSON without spaces, and refuses NaN."""


class Encoded(NamedTuple):
    """An encoded message.

    Attributes:
        buffers: the body in parts, to be written one after the other. Those after the first are views of the tensors'
            memory, which they keep alive: a tensor must not change before its view has been written.
        header_bytes: the value of ``Inference-Header-Content-Length``; None for a message of JSON only, with which that
            HTTP header must not be sent.
        size_bytes: length of the whole body.
    """

    buffers: list[Buffer]
    header_bytes: int | None
    size_bytes: int


def request_header(
    described: str,
    *,
    outputs: Collection[str] = (),
    request_id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    output_codec: str = "raw",
    crc32: bool = False,
) -> str:
    """Return the header of an inference request that asks for binary outputs.

    Args:
        described: the entries of its tensors, as JSON.
        outputs: names of the outputs to ask for; all of them by default.
        request_id: an id that the answer repeats.
        parameters: further parameters of the request.
        output_codec: the codec to ask for in the answer.
        crc32: whether the request ends in a checksum, and asks for one in the answer.
    """
    header = _CHECKED_REQUEST if crc32 else _PLAIN_REQUEST
    if output_codec != "raw":
        parameters = {**(parameters or {}), "output_codec": output_codec}
    if parameters:
        own = {"binary_data_output": True, "dim_order": True, **({"crc32": True} if crc32 else {})}
        header = '{"parameters":' + json_text({**parameters, **own})
    if request_id is not None:
        header += ',"id":' + json_text(request_id)
    if outputs:
        wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        header += ',"outputs":' + json_text(wanted)
    return f'{header},"inputs":[{described}]}}'


def described(
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    size_bytes: int,
    *,
    codec: str | None = None,
    order: Sequence[int] | None = None,
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """Return the header's entry of a tensor that is sent as bytes.

    Args:
        name: its name.
        datatype: its datatype.
        shape: its shape.
        size_bytes: how many bytes carry it.
        codec: the name of their codec; None for ``raw``.
        order: the order of its dimensions in memory, outermost first; None for row-major.
        quantization: scale and zero point; None for a tensor that is not quantized.
    """
    parameters: dict[str, Any] = {"binary_data_size": size_bytes}
    if codec is not None:
        parameters["codec"] = codec
    if order is not None:
        parameters["dim_order"] = order
    if quantization is not None:
        parameters["quantized"] = dict(zip(("scale", "zero_point"), quantization, strict=True))
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}


def assembled(header: str, views: list[memoryview], binary: bool, crc32: bool = False) -> Encoded:
    """Return a message.

    Args:
        header: its header.
        views: the tensors' bytes, in the header's order.
        binary: whether it has tensors as bytes; if not, it is JSON only.
        crc32: whether a binary message ends in a checksum.

    Raises:
        BodyTooLargeError: the header is longer than its limit.
    """
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


def payload_of(body: Buffer, header_bytes: int | None) -> memoryview | None:
    """Return the bytes after the header, as writable memory; None for a message of JSON only.

    Args:
        body: the whole body.
        header_bytes: the value of ``Inference-Header-Content-Length``; None where it was not sent.

    Raises:
        ProtocolError: the header is longer than the body.
    """
    if header_bytes is None:
        return None
    if isinstance(header_bytes, bool) or header_bytes < 0:
        raise ProtocolError(f"{HEADER_LENGTH} must be a number of bytes; got {header_bytes}")
    check_header_length(header_bytes, len(body))
    payload = memoryview(body)[header_bytes:]
    # Tensors are views of it. PyTorch has none that are read-only, and writing to a view of immutable bytes would be
    # undefined behaviour.
    return memoryview(bytearray(payload)) if payload.readonly else payload


def without_checksum(body: Buffer, payload: memoryview | None) -> memoryview:
    """Check the checksum at the end of the payload, and return the payload without it.

    Args:
        body: the whole body.
        payload: the bytes after its header; None for a message of JSON only.

    Raises:
        ProtocolError: the checksum is missing or wrong.
    """
    if payload is None or len(payload) < _CRC_BYTES:
        raise ProtocolError('a message with "crc32" must end in four bytes of checksum; this one is cut short')
    sent, found = int.from_bytes(payload[-_CRC_BYTES:], "little"), zlib.crc32(memoryview(body)[:-_CRC_BYTES])
    if sent != found:
        raise ProtocolError(
            f"the message must have the CRC-32 {sent:08x} that its sender computed; got {found:08x}. It was damaged on "
            "its way, so send it again"
        )
    return payload[:-_CRC_BYTES]


def read_answer(body: Buffer, header_bytes: int | None) -> tuple[ResponseHead, Mapping[str, Any], memoryview | None]:
    """Return an answer's header, its parameters, and its tensors' bytes; None for an answer of JSON only.

    Args:
        body: the whole body.
        header_bytes: the value of ``Inference-Header-Content-Length``; None where it was not sent.

    Raises:
        ProtocolError: the body is no valid answer.
        BodyTooLargeError: the header is longer than its limit.
    """
    payload = payload_of(body, header_bytes)
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
        payload = without_checksum(body, payload)
    return head, parameters, payload


def places(entries: Sequence[Entry], payload: memoryview | None) -> Iterator[tuple[Entry, int]]:
    """Yield each tensor's entry, and where its bytes begin; the place of one that is given as JSON means nothing.

    Args:
        entries: the entries of a header.
        payload: the bytes after the header; None where there are none.

    Raises:
        ProtocolError: the entries declare more bytes than there are, or fewer.
    """
    offset = 0
    available = 0 if payload is None else len(payload)
    for entry in entries:
        if entry.size_bytes is None:
            yield entry, offset
            continue
        if entry.size_bytes > available - offset:
            raise ProtocolError(
                f"{entry.where} declares {entry.size_bytes} bytes of binary data, but {available - offset} are left in "
                f"the body{f'; send {HEADER_LENGTH} with binary data' if payload is None else ''}"
            )
        yield entry, offset
        offset += entry.size_bytes
    if offset != available:
        raise ProtocolError(f"{available - offset} bytes are left over after the tensors that the header declares")
