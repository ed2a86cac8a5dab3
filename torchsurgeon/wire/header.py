"""The JSON header of a message: parsed strictly, every field checked, and remembered when it recurs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from torchsurgeon.codec import Codec, find_codec
from torchsurgeon.errors import BodyTooLargeError, CodecError, ProtocolError
from torchsurgeon.wire.tensors import (
    Quantization,
    checked_dim_order,
    checked_quantization,
    checked_shape,
    datatype_of,
    dtype_of,
    shortened,
)

Buffer: TypeAlias = "bytes | bytearray | memoryview"


HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_HEADER_BYTES = 1 << 20
MAX_REMEMBERED_BYTES = 4096


@dataclass(frozen=True)
class RequestedOutput:
    """One output a request asks for; ``binary`` says whether it wants it as bytes rather than as JSON numbers."""

    name: str
    binary: bool


def header_length(value: str | bytes, body_bytes: int | None = None) -> int:
    """Parse ``Inference-Header-Content-Length``. ProtocolError if it is no length, too long or longer than the body."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ProtocolError(f"{HEADER_LENGTH} is {shortened(text)}, which is not a number of bytes")
    check_header_length(int(text), body_bytes)
    return int(text)


def parse_json(data: Buffer, what: str) -> Any:
    """``data`` as strict JSON: UTF-8, no NaN or Infinity, no duplicate keys. Raises ProtocolError naming ``what``."""
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ProtocolError(f"{what} is nested too deeply to be a message of this protocol") from None
    except ValueError as error:
        raise ProtocolError(f"{what} is not valid JSON: {error}") from None


def check_header_length(header_bytes: int, body_bytes: int | None) -> None:
    """Refuse a header longer than is read, or than the body. Raises ProtocolError."""
    if header_bytes > MAX_HEADER_BYTES:
        raise BodyTooLargeError(f"the JSON header is {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    if body_bytes is not None and header_bytes > body_bytes:
        raise ProtocolError(f"{HEADER_LENGTH} is {header_bytes}, but the whole body has only {body_bytes} bytes")


def parsed_header(body: Buffer, header_bytes: int | None) -> dict[str, Any]:
    """The JSON header of a body (all of it when there is no header length) as an object. Raises ProtocolError."""
    if header_bytes is None:
        header = parse_json(body, "the body")
    else:
        header = parse_json(memoryview(body)[:header_bytes], "the JSON header")
    if not isinstance(header, dict):
        raise ProtocolError(f"the JSON header is a {type(header).__name__}, not an object")
    return header


@dataclass(frozen=True)
class Entry:
    """One tensor's description in a header, checked in itself: everything but the bytes it refers to."""

    name: str
    where: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size_bytes: int | None = None
    order: list[int] | None = None
    data: Any = None
    quantization: Quantization | None = None
    codec: Codec | None = None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor, however few carry it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class RequestHead:
    """A request's header, checked."""

    entries: list[Entry]
    outputs: tuple[RequestedOutput, ...]
    binary_output: bool
    dim_order: bool
    request_id: str | None
    parameters: Mapping[str, Any]
    output_codec: Codec | None = None
    crc32: bool = False


def request_head(header: dict[str, Any]) -> RequestHead:
    """Check a request's header. Raises ProtocolError."""
    parameters = parameters_of(header, "the request")
    outputs = []
    default = flag(parameters, "binary_data_output", "the request", False)
    for entry in _entries(header, "outputs", required=False):
        name = _name(entry, "outputs")
        wants = parameters_of(entry, f"output {name!r}")
        if wants.get("classification"):
            raise ProtocolError(f"output {name!r} asks for classification, which this server does not do; ask for data")
        outputs.append(RequestedOutput(name, flag(wants, "binary_data", f"output {name!r}", default)))
    if len({output.name for output in outputs}) != len(outputs):
        raise ProtocolError("the same output is asked for twice; list each output once")
    understands = flag(parameters, "dim_order", "the request", False)
    entries = _tensor_entries(_entries(header, "inputs", required=True), "input")
    codec = _codec(parameters.get("output_codec"), "output_codec of the request")
    crc32 = flag(parameters, "crc32", "the request", False)
    return RequestHead(entries, tuple(outputs), default, understands, _request_id(header), parameters, codec, crc32)


@lru_cache(maxsize=256)
def remembered_request_head(text: bytes) -> RequestHead:
    """The same, for the same text the same object: a device repeats its header as long as it cuts at one point."""
    return request_head(parsed_header(text, len(text)))


@dataclass(frozen=True)
class ResponseHead:
    """An answer's header, checked, but for its parameters."""

    entries: list[Entry]
    model_name: str
    model_version: str
    request_id: str | None


def response_head(header: dict[str, Any]) -> ResponseHead:
    """Check an answer's header. Raises ProtocolError."""
    entries = _tensor_entries(_entries(header, "outputs", required=True), "output")
    names = [header.get("model_name", ""), header.get("model_version", "")]
    if not all(isinstance(name, str) for name in names):
        raise ProtocolError("model_name and model_version must be strings")
    return ResponseHead(entries, names[0], names[1], _request_id(header))


@lru_cache(maxsize=256)
def remembered_response_head(text: bytes) -> ResponseHead:
    """The same, for the same text the same object."""
    return response_head(parsed_header(text, len(text)))


def split_response_head(text: bytes) -> tuple[ResponseHead, dict[str, Any]] | None:
    """A header that ends in its parameters, as two objects: answers differ in these, and in nothing else.

    None when it is not such a header. Cutting at a comma between two members of the outermost object gives two objects
    with the same members; a cut anywhere else gives something that is not JSON.
    """
    cut = text.rfind(b',"parameters":')
    if cut < 0:
        return None
    try:
        return remembered_response_head(text[:cut] + b"}"), parsed_header(b"{" + text[cut + 1 :], len(text) - cut)
    except ProtocolError:
        return None


def _tensor_entries(entries: list[dict[str, Any]], kind: str) -> list[Entry]:
    checked = [_tensor_entry(entry, kind) for entry in entries]
    seen: set[str] = set()
    for one in checked:
        if one.name in seen:
            raise ProtocolError(f"{one.where} appears twice; each tensor may be sent once")
        seen.add(one.name)
    return checked


def _tensor_entry(entry: dict[str, Any], kind: str) -> Entry:
    name = _name(entry, f"{kind}s")
    where = f"{kind} {name!r}"
    dtype = dtype_of(entry.get("datatype"))
    shape = checked_shape(entry.get("shape"), where)
    parameters = parameters_of(entry, where)
    if "shared_memory_region" in parameters:
        raise ProtocolError(f"{where} refers to shared memory, which is not supported; send its data")
    codec = _codec(parameters.get("codec"), where)
    if "binary_data_size" in parameters:
        if "data" in entry:
            raise ProtocolError(f"{where} has both data and binary_data_size; send one of them")
        size = parameters["binary_data_size"]
        needed = math.prod(shape) * dtype.itemsize
        if type(size) is not int or (size != needed if codec is None else not 0 <= size <= needed):
            raise ProtocolError(
                f"{where} declares binary_data_size {shortened(size)}, but {datatype_of(dtype)} of shape {list(shape)} "
                f"takes {needed} bytes"
            )
        order = checked_dim_order(parameters.get("dim_order"), len(shape), where)
        quantization = checked_quantization(parameters.get("quantized"), dtype, where)
        return Entry(name, where, dtype, shape, size, order, quantization=quantization, codec=codec)
    if codec is not None:
        raise ProtocolError(f"{where} has a codec but no binary_data_size; numbers in JSON are never encoded")
    if "data" not in entry:
        raise ProtocolError(f"{where} has neither data nor binary_data_size")
    return Entry(name, where, dtype, shape, data=entry["data"])


def _codec(name: Any, where: str) -> Codec | None:
    """The codec of this name; None for ``raw``, and where none is named."""
    if name is None or name == "raw":
        return None
    if not isinstance(name, str):
        raise ProtocolError(f"{where} has codec {shortened(name)}; it must be a codec's name")
    try:
        return find_codec(name)
    except CodecError as error:
        raise ProtocolError(f"{where}: {error}") from None


def _entries(header: dict[str, Any], key: str, *, required: bool) -> list[dict[str, Any]]:
    value = header.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ProtocolError(f'"{key}" must be a list of objects, one per tensor')
    return value


def _name(entry: dict[str, Any], key: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ProtocolError(f'an entry of "{key}" has name {shortened(name)}; it must be a non-empty string')
    return name


def parameters_of(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The parameters of a message or of one tensor; empty when there are none. Raises ProtocolError."""
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(f"the parameters of {where} must be an object")
    return parameters


def flag(parameters: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """A parameter that is true or false. Raises ProtocolError for any other."""
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"parameter {key} of {where} is {shortened(value)}; it must be true or false")
    return value


def _request_id(header: dict[str, Any]) -> str | None:
    request_id = header.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError(f'"id" is {shortened(request_id)}; it must be a string')
    return request_id


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


_JSON = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)
