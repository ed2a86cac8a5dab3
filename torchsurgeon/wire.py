"""Open Inference Protocol v2 (REST) with the binary tensor data extension: bytes to named tensors and back.

A message is a JSON header, padded with spaces to a multiple of 64 bytes, followed by the tensors' memory, little
endian, in the order the header lists them. Encoding copies no tensor that lies densely in CPU memory: it returns the
header and views of the tensors' own memory. Decoding returns tensors that are views of the message's buffer; only one
that does not lie on a 64-byte boundary there is copied, because kernels choose code paths, and with them the last
bits, by alignment.

A tensor whose dimensions are stored in another order than row-major (``channels_last`` and the like) travels as its
physical memory with the tensor parameter ``"dim_order"``: the permutation from the outermost to the innermost
dimension. A request says with the parameter ``"dim_order": true`` that its sender understands the same in the answer;
others get row-major answers.

Specification: https://github.com/kserve/open-inference-protocol and the binary tensor data extension of
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
Every malformed message is a :class:`~torchsurgeon.errors.ProtocolError` that says what is wrong with it.
"""

from __future__ import annotations

import json
import math
import reprlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from operator import mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchsurgeon.errors import BodyTooLargeError, ProtocolError

Buffer: TypeAlias = "bytes | bytearray | memoryview"

HEADER_LENGTH = "Inference-Header-Content-Length"
ALIGNMENT_BYTES = 64
MAX_HEADER_BYTES = 1 << 20
MAX_RANK = 16
MAX_ELEMENTS = 1 << 40
_MAX_REMEMBERED_BYTES = 4096

_DATATYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
_PLAIN_REQUEST = '{"parameters":{"binary_data_output":true,"dim_order":true}'
_DTYPES = {name: dtype for dtype, name in _DATATYPES.items()}


@dataclass(frozen=True)
class RequestedOutput:
    """One output a request asks for; ``binary`` says whether it wants it as bytes rather than as JSON numbers."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A decoded request. ``outputs`` is empty when the client wants all of them, in the form ``binary_output`` says.

    ``dim_order`` says that the client understands the tensor parameter of that name in the answer. Requests with the
    same header have the same object as ``recurring``; it is None when the header is not remembered.
    """

    tensors: dict[str, Tensor]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    dim_order: bool = False
    request_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    recurring: object | None = None


@dataclass(frozen=True)
class InferResponse:
    """A decoded answer."""

    tensors: dict[str, Tensor]
    model_name: str = ""
    model_version: str = ""
    request_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """An encoded message: write ``buffers`` one after the other.

    ``header_bytes`` is the value of ``Inference-Header-Content-Length``, or None when the message is JSON only and the
    header must not be sent. The buffers after the first are views of the tensors' memory and keep it alive.
    """

    buffers: list[Buffer]
    header_bytes: int | None
    size_bytes: int


def datatype_of(dtype: torch.dtype) -> str:
    """The protocol's name of a dtype (``"FP32"``). Raises ProtocolError for one the protocol has no name for."""
    try:
        return _DATATYPES[dtype]
    except KeyError:
        raise ProtocolError(
            f"{dtype} has no name in the Open Inference Protocol; convert the tensor to one of {', '.join(_DTYPES)}"
        ) from None


def dtype_of(datatype: object) -> torch.dtype:
    """The torch dtype of a protocol datatype. Raises ProtocolError for an unknown one (BYTES included)."""
    dtype = _DTYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise ProtocolError(f"unknown datatype {_short(datatype)}; known ones are {', '.join(_DTYPES)}")
    return dtype


def encode_request(
    tensors: Mapping[str, Tensor],
    *,
    outputs: Collection[str] = (),
    request_id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encode named tensors as a binary infer request that asks for binary outputs (all of them unless named)."""
    described, views = _encode_tensors(tensors, (), True)
    header = _PLAIN_REQUEST
    if parameters:
        header = '{"parameters":' + _text({**parameters, "binary_data_output": True, "dim_order": True})
    if request_id is not None:
        header += ',"id":' + _text(request_id)
    if outputs:
        wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        header += ',"outputs":' + _text(wanted)
    return _message(f'{header},"inputs":[{described}]}}', views, True)


def encode_response(
    model_name: str,
    model_version: str,
    tensors: Mapping[str, Tensor],
    *,
    as_json: Collection[str] = (),
    dim_order: bool = True,
    request_id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encode an answer. Outputs named in ``as_json`` are written as JSON numbers, the others as bytes.

    Without ``dim_order`` every tensor is sent row-major, for clients that do not know that parameter.

    Raises ProtocolError when an output to be written as JSON holds NaN or infinity, which JSON cannot say.
    """
    described, views = _encode_tensors(tensors, as_json, dim_order)
    header = f'{{"model_name":{_text(model_name)},"model_version":{_text(model_version)}'
    if request_id is not None:
        header += ',"id":' + _text(request_id)
    header += f',"outputs":[{described}]'
    if parameters:
        header += ',"parameters":' + _text(parameters)
    return _message(header + "}", views, any(name not in as_json for name in tensors))


def decode_request(body: Buffer, header_bytes: int | None = None) -> InferRequest:
    """Decode an infer request. ``header_bytes`` is ``Inference-Header-Content-Length``, None when it was not sent.

    The tensors are views of ``body`` wherever it is writable and aligned. Raises ProtocolError.
    """
    payload = _payload(body, header_bytes)
    remembered = header_bytes is not None and header_bytes <= _MAX_REMEMBERED_BYTES
    if remembered:
        head = _remembered_request_head(bytes(body[:header_bytes]))
    else:
        head = _request_head(_parsed(body, header_bytes))
    tensors = _tensors(head.entries, payload)
    recurring = head if remembered else None
    return InferRequest(
        tensors, head.outputs, head.binary_output, head.dim_order, head.request_id, head.parameters, recurring
    )


def decode_response(body: Buffer, header_bytes: int | None = None) -> InferResponse:
    """Decode an answer; the counterpart of :func:`decode_request`. Raises ProtocolError."""
    payload = _payload(body, header_bytes)
    parts = None
    if header_bytes is not None and header_bytes <= _MAX_REMEMBERED_BYTES:
        parts = _without_parameters(bytes(body[:header_bytes]))
    if parts is None:
        header = _parsed(body, header_bytes)
        head = _response_head(header)
    else:
        head, header = parts
    tensors = _tensors(head.entries, payload)
    parameters = _parameters(header, "the answer")
    return InferResponse(tensors, head.model_name, head.model_version, head.request_id, parameters)


def header_length(value: str | bytes, body_bytes: int | None = None) -> int:
    """Parse ``Inference-Header-Content-Length``. ProtocolError if it is no length, too long or longer than the body."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ProtocolError(f"{HEADER_LENGTH} is {_short(text)}, which is not a number of bytes")
    _check_header_length(int(text), body_bytes)
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


def _message(header: str, views: list[memoryview], binary: bool) -> Encoded:
    text = header.encode()
    if not binary:
        return Encoded([text], None, len(text))
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    _check_header_length(len(text), None)
    return Encoded([text, *views], len(text), len(text) + sum(map(len, views)))


def _encode_tensors(
    tensors: Mapping[str, Tensor], as_json: Collection[str], dim_order: bool
) -> tuple[str, list[memoryview]]:
    """The header's entries, as text, and views of the tensors' memory."""
    entries: list[str] = []
    views: list[memoryview] = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name in as_json:
            entries.append(_entry_with_data(name, tensor))
            continue
        order, physical = _physical(tensor if dim_order else tensor.contiguous(), shape)
        entries.append(_entry(name, tensor.dtype, shape, order))
        if 0 not in shape:
            views.append(physical.numpy().data.cast("B"))
    return ",".join(entries), views


@lru_cache(maxsize=1024)
def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...] | None) -> str:
    parameters: dict[str, Any] = {"binary_data_size": math.prod(shape) * dtype.itemsize}
    if order is not None:
        parameters["dim_order"] = order
    return _text({"name": name, "datatype": datatype_of(dtype), "shape": shape, "parameters": parameters})


def _entry_with_data(name: str, tensor: Tensor) -> str:
    data = tensor.detach().reshape(-1).tolist()
    try:
        return _text({"name": name, "datatype": datatype_of(tensor.dtype), "shape": tuple(tensor.shape), "data": data})
    except ValueError:
        raise ProtocolError(
            f"output {name!r} holds NaN or infinity, which JSON cannot say; ask for binary outputs"
        ) from None


def _physical(tensor: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...] | None, Tensor]:
    """The dimension order of a dense tensor (None for row-major) and its memory, as a row-major CPU tensor."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    order: tuple[int, ...] | None = None
    strides = tensor.stride()
    if strides != _row_major(shape) and not (tensor.is_contiguous() and _descending(strides)):
        # Equal strides mean a dimension of size one beside a larger one; the larger one lies outside.
        order = tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], shape[dim] == 1)))
        permuted = tensor.permute(order)
        if 0 not in shape and permuted.is_contiguous() and order != tuple(range(len(shape))):
            tensor = permuted
        else:
            order, tensor = None, tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16; only the bytes matter.
        tensor = tensor.view(torch.int16)
    return order, tensor


def _descending(strides: Sequence[int]) -> bool:
    # Of a contiguous tensor: only the strides of dimensions of size one differ from row-major, and mean nothing.
    return all(outer > inner for outer, inner in pairwise(strides))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else ()


def _check_header_length(header_bytes: int, body_bytes: int | None) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise BodyTooLargeError(f"the JSON header is {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    if body_bytes is not None and header_bytes > body_bytes:
        raise ProtocolError(f"{HEADER_LENGTH} is {header_bytes}, but the whole body has only {body_bytes} bytes")


def _payload(body: Buffer, header_bytes: int | None) -> memoryview | None:
    """The bytes after the header, as memory that may be written; None for a message without any."""
    if header_bytes is None:
        return None
    if isinstance(header_bytes, bool) or header_bytes < 0:
        raise ProtocolError(f"{HEADER_LENGTH} is {header_bytes}, which is not a number of bytes")
    _check_header_length(header_bytes, len(body))
    payload = memoryview(body)[header_bytes:]
    # torch has no read-only tensors; a view of immutable bytes would be undefined behaviour once written to.
    return memoryview(bytearray(payload)) if payload.readonly else payload


def _parsed(body: Buffer, header_bytes: int | None) -> dict[str, Any]:
    if header_bytes is None:
        header = parse_json(body, "the body")
    else:
        header = parse_json(memoryview(body)[:header_bytes], "the JSON header")
    if not isinstance(header, dict):
        raise ProtocolError(f"the JSON header is a {type(header).__name__}, not an object")
    return header


@dataclass(frozen=True)
class _Entry:
    """One tensor's description in a header, checked in itself: everything but the bytes it refers to."""

    name: str
    where: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size_bytes: int | None = None
    order: list[int] | None = None
    data: Any = None


@dataclass(frozen=True, eq=False)
class _RequestHead:
    entries: list[_Entry]
    outputs: tuple[RequestedOutput, ...]
    binary_output: bool
    dim_order: bool
    request_id: str | None
    parameters: Mapping[str, Any]


def _request_head(header: dict[str, Any]) -> _RequestHead:
    parameters = _parameters(header, "the request")
    outputs = []
    default = _flag(parameters, "binary_data_output", "the request", False)
    for entry in _entries(header, "outputs", required=False):
        name = _name(entry, "outputs")
        wants = _parameters(entry, f"output {name!r}")
        if wants.get("classification"):
            raise ProtocolError(f"output {name!r} asks for classification, which this server does not do; ask for data")
        outputs.append(RequestedOutput(name, _flag(wants, "binary_data", f"output {name!r}", default)))
    if len({output.name for output in outputs}) != len(outputs):
        raise ProtocolError("the same output is asked for twice; list each output once")
    understands = _flag(parameters, "dim_order", "the request", False)
    entries = _tensor_entries(_entries(header, "inputs", required=True), "input")
    return _RequestHead(entries, tuple(outputs), default, understands, _request_id(header), parameters)


@lru_cache(maxsize=256)
def _remembered_request_head(text: bytes) -> _RequestHead:
    # A device sends the same header as long as it cuts at the same point.
    return _request_head(_parsed(text, len(text)))


@dataclass(frozen=True)
class _ResponseHead:
    entries: list[_Entry]
    model_name: str
    model_version: str
    request_id: str | None


def _response_head(header: dict[str, Any]) -> _ResponseHead:
    entries = _tensor_entries(_entries(header, "outputs", required=True), "output")
    names = [header.get("model_name", ""), header.get("model_version", "")]
    if not all(isinstance(name, str) for name in names):
        raise ProtocolError("model_name and model_version must be strings")
    return _ResponseHead(entries, names[0], names[1], _request_id(header))


@lru_cache(maxsize=256)
def _remembered_response_head(text: bytes) -> _ResponseHead:
    return _response_head(_parsed(text, len(text)))


def _without_parameters(text: bytes) -> tuple[_ResponseHead, dict[str, Any]] | None:
    """A header that ends in its parameters, as two objects: answers differ in these, and in nothing else.

    None when it is not such a header. Cutting at a comma between two members of the outermost object gives two objects
    with the same members; a cut anywhere else gives something that is not JSON.
    """
    cut = text.rfind(b',"parameters":')
    if cut < 0:
        return None
    try:
        return _remembered_response_head(text[:cut] + b"}"), _parsed(b"{" + text[cut + 1 :], len(text) - cut)
    except ProtocolError:
        return None


def _tensor_entries(entries: list[dict[str, Any]], kind: str) -> list[_Entry]:
    checked = [_tensor_entry(entry, kind) for entry in entries]
    seen: set[str] = set()
    for one in checked:
        if one.name in seen:
            raise ProtocolError(f"{one.where} appears twice; each tensor may be sent once")
        seen.add(one.name)
    return checked


def _tensor_entry(entry: dict[str, Any], kind: str) -> _Entry:
    name = _name(entry, f"{kind}s")
    where = f"{kind} {name!r}"
    dtype = dtype_of(entry.get("datatype"))
    shape = _shape(entry.get("shape"), where)
    parameters = _parameters(entry, where)
    if "shared_memory_region" in parameters:
        raise ProtocolError(f"{where} refers to shared memory, which is not supported; send its data")
    if "binary_data_size" in parameters:
        if "data" in entry:
            raise ProtocolError(f"{where} has both data and binary_data_size; send one of them")
        size = parameters["binary_data_size"]
        needed = math.prod(shape) * dtype.itemsize
        if type(size) is not int or size != needed:
            raise ProtocolError(
                f"{where} declares binary_data_size {_short(size)}, but {datatype_of(dtype)} of shape {list(shape)} "
                f"takes {needed} bytes"
            )
        order = _dim_order(parameters.get("dim_order"), len(shape), where)
        return _Entry(name, where, dtype, shape, size, order)
    if "data" not in entry:
        raise ProtocolError(f"{where} has neither data nor binary_data_size")
    return _Entry(name, where, dtype, shape, data=entry["data"])


def _tensors(entries: list[_Entry], payload: memoryview | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    available = 0 if payload is None else len(payload)
    for entry in entries:
        if entry.size_bytes is None:
            tensors[entry.name] = _from_json(entry.data, entry.dtype, entry.shape, entry.where)
            continue
        if entry.size_bytes > available - offset:
            raise ProtocolError(
                f"{entry.where} declares {entry.size_bytes} bytes of binary data, but {available - offset} are left in "
                f"the body{f'; was {HEADER_LENGTH} sent?' if payload is None else ''}"
            )
        tensors[entry.name] = _view(payload, offset, entry.dtype, entry.shape, entry.order, entry.where)
        offset += entry.size_bytes
    if offset != available:
        raise ProtocolError(f"{available - offset} bytes are left over after the tensors the header declares")
    return tensors


def _view(
    payload: memoryview | None,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: list[int] | None,
    where: str,
) -> Tensor:
    count = math.prod(shape)
    if payload is None or count == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and int(torch.frombuffer(payload, dtype=torch.uint8, count=count, offset=offset).max()) > 1:
        raise ProtocolError(f"{where} is BOOL and holds a byte other than 0 and 1")
    flat = torch.frombuffer(payload, dtype=dtype, count=count, offset=offset)
    if flat.data_ptr() % ALIGNMENT_BYTES:
        flat = flat.clone()
    if order is None:
        return flat.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dim] for dim in order]).permute(inverse)


def _from_json(data: Any, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Tensor:
    count = math.prod(shape)
    flat = _flatten(data, shape, where)
    if len(flat) != count:
        raise ProtocolError(f"{where} has {len(flat)} values, but shape {list(shape)} needs {count}")
    kinds = set(map(type, flat))
    allowed = {int, float} if dtype.is_floating_point else {int, bool} if dtype == torch.bool else {int}
    if not kinds <= allowed:
        wrong = ", ".join(sorted(kind.__name__ for kind in kinds - allowed))
        raise ProtocolError(f"{where} is {datatype_of(dtype)} but its data holds {wrong} values")
    code, wide = ("d", torch.float64) if dtype.is_floating_point else ("Q", torch.uint64)
    if not dtype.is_floating_point and dtype != torch.uint64:
        code, wide = "q", torch.int64
    try:
        values = array(code, flat)
        if dtype == torch.bool:
            low, high = 0.0, 1.0
        else:
            limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
            low, high = limits.min, limits.max
        if count and not (low <= min(values) and max(values) <= high):
            raise OverflowError
    except OverflowError:
        raise ProtocolError(f"{where} holds a value that does not fit {datatype_of(dtype)}") from None
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(values, dtype=wide).to(dtype).view(shape)


def _flatten(data: Any, shape: tuple[int, ...], where: str) -> list[Any]:
    rows: list[Any] = data if isinstance(data, list) else [data]
    depth = 0
    while rows and isinstance(rows[0], list):
        if depth >= len(shape) or len(rows) != math.prod(shape[: depth + 1]):
            raise ProtocolError(f"the nesting of {where}'s data does not match its shape {list(shape)}")
        dim = shape[depth + 1] if depth + 1 < len(shape) else -1
        if not all(isinstance(row, list) and len(row) == dim for row in rows):
            raise ProtocolError(f"the nesting of {where}'s data does not match its shape {list(shape)}")
        rows = list(chain.from_iterable(rows))
        depth += 1
    return rows


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(dim) is int and dim >= 0 for dim in value):
        raise ProtocolError(f"{where} has shape {_short(value)}; a shape is a list of non-negative integers")
    if len(value) > MAX_RANK:
        raise ProtocolError(f"{where} has {len(value)} dimensions; at most {MAX_RANK} are accepted")
    if math.prod(dim for dim in value if dim) > MAX_ELEMENTS:
        raise ProtocolError(f"{where} has shape {_short(value)}, more than {MAX_ELEMENTS} elements")
    return tuple(value)


def _dim_order(value: Any, rank: int, where: str) -> list[int] | None:
    if value is None:
        return None
    permutation = isinstance(value, list) and all(type(dim) is int for dim in value)
    if not permutation or sorted(value) != list(range(rank)):
        raise ProtocolError(f"{where} has dim_order {_short(value)}, no permutation of its {rank} dimensions")
    return list(value)


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
        raise ProtocolError(f'an entry of "{key}" has name {_short(name)}; it must be a non-empty string')
    return name


def _parameters(entry: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(f"the parameters of {where} must be an object")
    return parameters


def _flag(parameters: dict[str, Any], key: str, where: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"parameter {key} of {where} is {_short(value)}; it must be true or false")
    return value


def _request_id(header: dict[str, Any]) -> str | None:
    request_id = header.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError(f'"id" is {_short(request_id)}; it must be a string')
    return request_id


def _short(value: object) -> str:
    return reprlib.repr(value)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


_text = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_JSON = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)
