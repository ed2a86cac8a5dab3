"""Requests and answers of the Open Inference Protocol v2, with their named tensors: encoding and decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.codec import Codec, find_codec
from torchsurgeon.errors import BodyTooLargeError, CodecError, EncodingError, ProtocolError
from torchsurgeon.tracing.crossing import EXTENSION_DATATYPES
from torchsurgeon.wire.body import (
    Encoded,
    assembled,
    described,
    json_text,
    payload_of,
    places,
    read_answer,
    request_header,
    without_checksum,
)
from torchsurgeon.wire.fields import Quantization, quoted
from torchsurgeon.wire.header import (
    MAX_REMEMBERED_BYTES,
    Buffer,
    Entry,
    RequestedOutput,
    parsed_header,
    remembered_request_head,
    request_head,
)
from torchsurgeon.wire.tensors import (
    datatype_of,
    dtype_of,
    physical_order,
    quantization_of,
    tensor_from_json,
    tensor_view,
    with_quantization,
)

_NONE: Mapping[str, Any] = MappingProxyType({})
_MAX_DECODED_BYTES = 1 << 30


class InferRequest(NamedTuple):
    """A decoded request.

    Attributes:
        tensors: the tensors by name.
        outputs: the outputs that are asked for; empty for all of them, in the form that ``binary_output`` says.
        binary_output: whether outputs are asked for as bytes unless they say otherwise.
        dim_order: whether the client understands the tensor parameter ``dim_order`` in the answer.
        request_id: the request's id.
        parameters: the request's parameters.
        recurring: an object that all requests with the same header share; None where the header is not cached, or does
            not recur because it has compressed tensors.
        output_codec: the codec that the outputs are asked for in; None for ``raw``.
        crc32: whether a checksum was sent, and is asked for in the answer.
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
    """A decoded answer.

    Attributes:
        tensors: the outputs by name.
        model_name: the model that answered.
        model_version: its version.
        request_id: the id of the request that is answered.
        parameters: the answer's parameters.
    """

    tensors: dict[str, Tensor]
    model_name: str = ""
    model_version: str = ""
    request_id: str | None = None
    parameters: Mapping[str, Any] = _NONE


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
    """Encode named tensors as a binary inference request that asks for binary outputs.

    Args:
        tensors: the tensors by name.
        outputs: names of the outputs to ask for; all of them by default.
        request_id: an id that the answer repeats.
        parameters: further parameters of the request.
        codecs: the codec of each tensor that is not sent as it lies in memory.
        output_codec: the codec to ask for in the answer.
        crc32: whether the request ends in a checksum, and asks for one in the answer.

    Raises:
        EncodingError: a tensor has a dtype without a name in messages, or is quantized per channel.
    """
    entries, views = _encode_tensors(tensors, (), True, codecs)
    header = request_header(
        entries,
        outputs=outputs,
        request_id=request_id,
        parameters=parameters,
        output_codec="raw" if output_codec is None else output_codec.name,
        crc32=crc32,
    )
    return assembled(header, views, True, crc32)


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
    """Encode an answer.

    Args:
        model_name: the model that answers.
        model_version: its version.
        tensors: the outputs by name.
        as_json: names of the outputs to write as JSON numbers; the others are written as bytes.
        dim_order: whether the client understands the tensor parameter ``dim_order``. If not, tensors go row-major.
        request_id: the id of the request that is answered.
        parameters: the answer's parameters, or their JSON text.
        codec: the codec of the outputs that are written as bytes.
        crc32: whether a binary answer ends in a checksum.

    Raises:
        EncodingError: an output to be written as JSON holds NaN or infinity, or has a datatype without a form in JSON;
            or an output has a dtype without a name in messages.
    """
    codecs = None if codec is None else dict.fromkeys(tensors, codec)
    entries, views = _encode_tensors(tensors, as_json, dim_order, codecs)
    header = f'{{"model_name":{_json_string(model_name)},"model_version":{_json_string(model_version)}'
    if request_id is not None:
        header += ',"id":' + json_text(request_id)
    header += f',"outputs":[{entries}]'
    binary = any(name not in as_json for name in tensors)
    added = parameters if isinstance(parameters, str) else json_text(parameters) if parameters else ""
    if crc32 and binary:
        added = '{"crc32":true' + (f",{added[1:]}" if added else "}")
    if added:
        # Last, so that split_response_head can cut them off: they change with every answer, and nothing else does.
        header += f',"parameters":{added}'
    return assembled(header + "}", views, binary, crc32)


def decode_request(
    body: Buffer,
    header_bytes: int | None = None,
    *,
    max_decoded_bytes: int = _MAX_DECODED_BYTES,
    check_codec: Callable[[Codec], None] | None = None,
) -> InferRequest:
    """Decode an inference request. Its tensors are views of ``body`` where that is writable and aligned.

    Args:
        body: the whole body.
        header_bytes: the value of ``Inference-Header-Content-Length``; None where it was not sent.
        max_decoded_bytes: the most bytes that tensors sent with a codec have together once they are decoded.
        check_codec: called with every codec that the request names, before anything is decoded. It raises for a codec
            that is not accepted.

    Raises:
        ProtocolError: the body is no valid request.
        BodyTooLargeError: the header, or the decoded tensors, are larger than allowed.
    """
    payload = payload_of(body, header_bytes)
    remembered = header_bytes is not None and header_bytes <= MAX_REMEMBERED_BYTES
    if remembered:
        head = remembered_request_head(bytes(body[:header_bytes]))
    else:
        head = request_head(parsed_header(body, header_bytes))
    if head.crc32:
        payload = without_checksum(body, payload)
    codecs = [_codec_of(entry.codec, entry.where) for entry in head.entries if entry.codec is not None]
    output_codec = None
    if head.output_codec is not None:
        output_codec = _codec_of(head.output_codec, "output_codec of the request")
    if check_codec is not None:
        for codec in codecs if output_codec is None else (*codecs, output_codec):
            check_codec(codec)
    tensors = _tensors(head.entries, payload, max_decoded_bytes)
    # A compressed tensor has another size, so another header, in every request: nothing is gained by caching for it.
    compressed = any(codec.varies for codec in codecs)
    recurring = head if remembered and not compressed else None
    return InferRequest(
        tensors,
        head.outputs,
        head.binary_output,
        head.dim_order,
        head.request_id,
        head.parameters,
        recurring,
        output_codec,
        head.crc32,
    )


def decode_response(
    body: Buffer, header_bytes: int | None = None, *, max_decoded_bytes: int = _MAX_DECODED_BYTES
) -> InferResponse:
    """Decode an answer. Its tensors are views of ``body`` where that is writable and aligned.

    Args:
        body: the whole body.
        header_bytes: the value of ``Inference-Header-Content-Length``; None where it was not sent.
        max_decoded_bytes: the most bytes that tensors sent with a codec have together once they are decoded.

    Raises:
        ProtocolError: the body is no valid answer.
        BodyTooLargeError: the header, or the decoded tensors, are larger than allowed.
    """
    head, parameters, payload = read_answer(body, header_bytes)
    tensors = _tensors(head.entries, payload, max_decoded_bytes)
    return InferResponse(tensors, head.model_name, head.model_version, head.request_id, parameters)


def _encode_tensors(
    tensors: Mapping[str, Tensor], as_json: Collection[str], dim_order: bool, codecs: Mapping[str, Codec] | None
) -> tuple[str, list[memoryview]]:
    """Return the header's entries as text, and views of the tensors' memory."""
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
            encoded = codec.encode(tensor if dim_order else tensor.contiguous(), name)
            if encoded.codec != "raw":
                entry = described(
                    name,
                    datatype_of(tensor.dtype),
                    shape,
                    len(encoded.data),
                    codec=encoded.codec,
                    order=encoded.order,
                    quantization=quantization,
                )
                entries.append(json_text(entry))
                views.append(encoded.data)
                continue
        order, physical = physical_order(tensor if dim_order else tensor.contiguous(), shape)
        entries.append(_entry(name, tensor.dtype, shape, order, quantization))
        if 0 not in shape:
            views.append(physical.numpy().data.cast("B"))
    return ",".join(entries), views


# Cached, since the same tensors are sent at every inference of one cut.
@lru_cache(maxsize=1024)
def _entry(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None,
    quantization: Quantization | None,
) -> str:
    """Return the entry of a tensor that is sent as it lies in memory."""
    size_bytes = math.prod(shape) * dtype.itemsize
    return json_text(described(name, datatype_of(dtype), shape, size_bytes, order=order, quantization=quantization))


def _entry_with_data(name: str, tensor: Tensor) -> str:
    if tensor.dtype in EXTENSION_DATATYPES:
        raise EncodingError(
            f"output {quoted(name)} is {datatype_of(tensor.dtype)}, which has no form in JSON; ask for binary outputs"
        )
    data = tensor.detach().reshape(-1).tolist()
    try:
        return json_text(
            {"name": name, "datatype": datatype_of(tensor.dtype), "shape": tuple(tensor.shape), "data": data}
        )
    except ValueError:
        raise EncodingError(
            f"JSON has no NaN and no infinity, but output {quoted(name)} holds one; ask for binary outputs"
        ) from None


def _codec_of(name: str, where: str) -> Codec:
    """Return the codec that a message names.

    Raises:
        ProtocolError: there is none of this name here.
    """
    try:
        return find_codec(name)
    except CodecError as error:
        if by_signal_handler(error):
            raise
        raise ProtocolError(f"{where}: {error}") from None


def _tensors(entries: Sequence[Entry], payload: memoryview | None, max_decoded_bytes: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for entry, offset in places(entries, payload):
        dtype = dtype_of(entry.datatype)
        if entry.size_bytes is None:
            tensors[entry.name] = tensor_from_json(entry.data, dtype, entry.shape, entry.where)
            continue
        if entry.codec is None:
            tensor = tensor_view(payload, offset, dtype, entry.shape, entry.order, entry.where)
        else:
            codec = _codec_of(entry.codec, entry.where)
            tensor = _decoded(entry, codec, dtype, payload, offset, max_decoded_bytes)
            # One budget for all tensors, or a message of many small bombs would be a large one.
            max_decoded_bytes -= entry.tensor_bytes
        tensors[entry.name] = tensor if entry.quantization is None else with_quantization(tensor, entry.quantization)
    return tensors


def _decoded(
    entry: Entry, codec: Codec, dtype: torch.dtype, payload: memoryview | None, offset: int, max_bytes: int
) -> Tensor:
    if entry.tensor_bytes > max_bytes:
        raise BodyTooLargeError(
            f"{entry.where} has {entry.tensor_bytes} bytes once {codec.name} is decoded; at most {max_bytes} are "
            "accepted"
        )
    data = memoryview(b"" if payload is None else payload)[offset : offset + (entry.size_bytes or 0)]
    try:
        return codec.decode(data, dtype, entry.shape, entry.order, max_bytes=max_bytes)
    except CodecError as error:
        if by_signal_handler(error):
            raise
        raise ProtocolError(f"{entry.where} does not decode as {codec.name}: {error}") from None


@lru_cache(maxsize=256)
def _json_string(name: str) -> str:
    return json_text(name)
