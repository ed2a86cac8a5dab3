"""The JSON header of a message: parsed strictly, with every field checked, and cached for when it recurs.

Errors quote what a message holds in at most 300 characters, since a hostile client may send a name of 500 kB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import BodyTooLargeError, ProtocolError, short
from torchsurgeon.wire.fields import (
    ITEM_BYTES,
    Quantization,
    checked_datatype,
    checked_dim_order,
    checked_quantization,
    checked_shape,
    quoted,
    shortened,
)

Buffer: TypeAlias = "bytes | bytearray | memoryview"


DEADLINE = "Torchsurgeon-Deadline-S"
HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_HEADER_BYTES = 1 << 20
MAX_REMEMBERED_BYTES = 4096
PRIORITY = "Torchsurgeon-Priority"
PRIORITIES = ("high", "normal", "low")
"""The priorities that a request may have, from the one that runs first on."""


@dataclass(frozen=True)
class RequestedOutput:
    """One output that a request asks for.

    Attributes:
        name: the output's name.
        binary: whether it is asked for as bytes rather than as JSON numbers.
    """

    name: str
    binary: bool


def header_length(value: str | bytes, body_bytes: int | None = None) -> int:
    """Return the number of bytes that ``Inference-Header-Content-Length`` declares.

    Args:
        value: the HTTP header's value.
        body_bytes: length of the whole body; None where it is not known.

    Raises:
        ProtocolError: the value is no number of bytes, or is longer than the body.
        BodyTooLargeError: it is more than ``MAX_HEADER_BYTES``.
    """
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ProtocolError(f"{HEADER_LENGTH} must be a number of bytes; got {shortened(text)}")
    size = int(text)
    check_header_length(size, body_bytes)
    return size


def parse_json(data: Buffer, what: str) -> Any:
    """Return the value of strict JSON: UTF-8, without NaN and Infinity, and without duplicate keys.

    Args:
        data: the JSON text.
        what: what the text is, for the message of an error.

    Raises:
        ProtocolError: ``data`` is no such JSON.
    """
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        return _JSON.decode(text)
    except (RecursionError, ValueError) as error:
        if by_signal_handler(error):
            raise
        if isinstance(error, RecursionError):
            raise ProtocolError(f"{what} is nested too deeply to be a message of this protocol") from None
        raise ProtocolError(f"{what} is not valid JSON: {short(error)}") from None


def check_header_length(header_bytes: int, body_bytes: int | None) -> None:
    """Check that a header is not longer than its limit, nor than the body.

    Args:
        header_bytes: the header's declared length.
        body_bytes: the body's length; None where it is not known.

    Raises:
        BodyTooLargeError: the header is longer than ``MAX_HEADER_BYTES``.
        ProtocolError: the header is longer than the body.
    """
    if header_bytes > MAX_HEADER_BYTES:
        raise BodyTooLargeError(f"a JSON header may have at most {MAX_HEADER_BYTES} bytes; got {header_bytes}")
    if body_bytes is not None and header_bytes > body_bytes:
        raise ProtocolError(f"{HEADER_LENGTH} must be at most the body's {body_bytes} bytes; got {header_bytes}")


def parsed_header(body: Buffer, header_bytes: int | None) -> dict[str, Any]:
    """Return the JSON header of a body.

    Args:
        body: the whole body.
        header_bytes: the header's length; None where the whole body is the header.

    Raises:
        ProtocolError: the header is no valid JSON object.
    """
    if header_bytes is None:
        header = parse_json(body, "the body")
    else:
        header = parse_json(memoryview(body)[:header_bytes], "the JSON header")
    if not isinstance(header, dict):
        raise ProtocolError(f"the JSON header must be an object; got a {type(header).__name__}")
    return header


@dataclass(frozen=True)
class Entry:
    """One tensor's description in a header. It has been checked, except against the bytes that it refers to.

    Attributes:
        name: the tensor's name.
        where: the tensor as errors name it, such as ``input 'x'``; a long name is shortened.
        datatype: its datatype.
        shape: its shape.
        size_bytes: bytes that carry it; None where it is given as JSON numbers.
        order: the order of its dimensions in memory, outermost first; None for row-major.
        data: the JSON numbers.
        quantization: scale and zero point; None for a tensor that is not quantized.
        codec: the name of the codec of its bytes; None for ``raw``.
    """

    name: str
    where: str
    datatype: str
    shape: tuple[int, ...]
    size_bytes: int | None = None
    order: list[int] | None = None
    data: Any = None
    quantization: Quantization | None = None
    codec: str | None = None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor itself, which a codec may carry in fewer."""
        return math.prod(self.shape) * ITEM_BYTES[self.datatype]


@dataclass(frozen=True, eq=False)
class RequestHead:
    """A request's header after all checks.

    Attributes:
        entries: the tensors that are sent.
        outputs: the outputs that are asked for; empty for all of them.
        binary_output: whether outputs are asked for as bytes unless they say otherwise.
        dim_order: whether the client understands the tensor parameter ``dim_order``.
        request_id: the request's id.
        parameters: the request's parameters.
        output_codec: the name of the codec that the outputs are asked for in; None for ``raw``.
        crc32: whether the body ends in a checksum.
    """

    entries: list[Entry]
    outputs: tuple[RequestedOutput, ...]
    binary_output: bool
    dim_order: bool
    request_id: str | None
    parameters: Mapping[str, Any]
    output_codec: str | None = None
    crc32: bool = False


def request_head(header: dict[str, Any]) -> RequestHead:
    """Check a request's header.

    Raises:
        ProtocolError: a field is missing or not valid.
    """
    parameters = parameters_of(header, "the request")
    outputs = []
    default = flag(parameters, "binary_data_output", "the request", False)
    for entry in _entries(header, "outputs", required=False):
        name = _name(entry, "outputs")
        where = f"output {quoted(name)}"
        wants = parameters_of(entry, where)
        if wants.get("classification"):
            raise ProtocolError(f"{where} asks for classification, which this server does not support; ask for data")
        outputs.append(RequestedOutput(name, flag(wants, "binary_data", where, default)))
    if len({output.name for output in outputs}) != len(outputs):
        raise ProtocolError("the same output is asked for twice; list each output once")
    understands = flag(parameters, "dim_order", "the request", False)
    entries = _tensor_entries(_entries(header, "inputs", required=True), "input")
    codec = _codec(parameters.get("output_codec"), "output_codec of the request")
    crc32 = flag(parameters, "crc32", "the request", False)
    return RequestHead(entries, tuple(outputs), default, understands, _request_id(header), parameters, codec, crc32)


# A device repeats its header byte for byte while it cuts at one point, so a header is checked once. Callers pass only
# headers of at most MAX_REMEMBERED_BYTES, so a hostile client cannot fill the memory with this cache.
@lru_cache(maxsize=256)
def remembered_request_head(text: bytes) -> RequestHead:
    """Return ``request_head()`` of a header's text: for the same text the same object.

    Raises:
        ProtocolError: the text is no valid header of a request.
    """
    return request_head(parsed_header(text, len(text)))


@dataclass(frozen=True)
class ResponseHead:
    """An answer's header after all checks, without its parameters.

    Attributes:
        entries: the outputs.
        model_name: the model that answered.
        model_version: its version.
        request_id: the id of the request that is answered.
    """

    entries: list[Entry]
    model_name: str
    model_version: str
    request_id: str | None


def response_head(header: dict[str, Any]) -> ResponseHead:
    """Check an answer's header, except for its parameters.

    Raises:
        ProtocolError: a field is missing or not valid.
    """
    entries = _tensor_entries(_entries(header, "outputs", required=True), "output")
    names = [header.get("model_name", ""), header.get("model_version", "")]
    if not all(isinstance(name, str) for name in names):
        kinds = " and ".join(type(name).__name__ for name in names)
        raise ProtocolError(f"model_name and model_version must be strings; got {kinds}")
    return ResponseHead(entries, names[0], names[1], _request_id(header))


@lru_cache(maxsize=256)
def remembered_response_head(text: bytes) -> ResponseHead:
    """Return ``response_head()`` of a header's text: for the same text the same object.

    Raises:
        ProtocolError: the text is no valid header of an answer.
    """
    return response_head(parsed_header(text, len(text)))


def split_response_head(text: bytes) -> tuple[ResponseHead, dict[str, Any]] | None:
    """Split an answer's header into the part that recurs and the part that changes from answer to answer.

    torchsurgeon's servers write the parameters last, and only these (the times) differ between answers of one cut. So
    the header is cut before them: the first part is looked up in the cache, and only the parameters are parsed. Cutting
    at a comma between two members of the outermost object gives two objects with the same members; cutting anywhere
    else gives text that is not JSON.

    Returns:
        The header without its parameters, and an object with the parameters only; None where the header does not end in
        its parameters.
    """
    cut = text.rfind(b',"parameters":')
    if cut < 0:
        return None
    try:
        return remembered_response_head(text[:cut] + b"}"), parsed_header(b"{" + text[cut + 1 :], len(text) - cut)
    except ProtocolError as error:
        if by_signal_handler(error):
            raise
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
    where = f"{kind} {quoted(name)}"
    datatype = checked_datatype(entry.get("datatype"))
    shape = checked_shape(entry.get("shape"), where)
    parameters = parameters_of(entry, where)
    if "shared_memory_region" in parameters:
        raise ProtocolError(f"{where} refers to shared memory, which this server does not support; send its data")
    codec = _codec(parameters.get("codec"), where)
    if "binary_data_size" in parameters:
        if "data" in entry:
            raise ProtocolError(f"{where} has both data and binary_data_size; send one of them")
        size = parameters["binary_data_size"]
        needed = math.prod(shape) * ITEM_BYTES[datatype]
        if type(size) is not int or (size != needed if codec is None else not 0 <= size <= needed):
            raise ProtocolError(
                f"{datatype} of shape {list(shape)} takes {needed} bytes; {where} declares binary_data_size "
                f"{shortened(size)}"
            )
        order = checked_dim_order(parameters.get("dim_order"), len(shape), where)
        quantization = checked_quantization(parameters.get("quantized"), datatype, where)
        return Entry(name, where, datatype, shape, size, order, quantization=quantization, codec=codec)
    if codec is not None:
        raise ProtocolError(f"{where} has a codec but no binary_data_size; numbers in JSON are never encoded")
    if "data" not in entry:
        raise ProtocolError(f"{where} has neither data nor binary_data_size; send one of them")
    return Entry(name, where, datatype, shape, data=entry["data"])


def _codec(name: Any, where: str) -> str | None:
    """Return the name of a codec; None for ``raw``, and where no codec is named."""
    if name is None or name == "raw":
        return None
    if not isinstance(name, str):
        raise ProtocolError(f"the codec of {where} must be a codec's name; got {shortened(name)}")
    return name


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
        raise ProtocolError(f'the name of an entry of "{key}" must be a non-empty string; got {shortened(name)}')
    return name


def parameters_of(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of a message or of one tensor; empty where there are none.

    Args:
        entry: the header, or the tensor's entry in it.
        where: what has the parameters, for the message of an error.

    Raises:
        ProtocolError: the parameters are no object.
    """
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(f"the parameters of {where} must be an object; got {shortened(parameters)}")
    return parameters


def flag(parameters: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """Return a parameter that is true or false.

    Args:
        parameters: the parameters.
        key: the parameter's name.
        where: what has the parameters, for the message of an error.
        default: the value where the parameter is missing.

    Raises:
        ProtocolError: the parameter is neither true nor false.
    """
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"parameter {key} of {where} must be true or false; got {shortened(value)}")
    return value


def _request_id(header: dict[str, Any]) -> str | None:
    request_id = header.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError(f'"id" must be a string; got {shortened(request_id)}')
    return request_id


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


_JSON = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)
