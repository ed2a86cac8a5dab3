"""How tensors lie in memory and in JSON: datatypes, dimension orders, views of bytes."""

from __future__ import annotations

import math
import reprlib
from array import array
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor

from torchsurgeon.codec.host import on_host
from torchsurgeon.errors import ProtocolError
from torchsurgeon.tracing.layout import dense, logical

ALIGNMENT_BYTES = 64
MAX_RANK = 16
MAX_ELEMENTS = 1 << 40
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
_DTYPES = {name: dtype for dtype, name in _DATATYPES.items()}
# numpy has no bfloat16; only the bytes matter.
_NUMPY = {
    dtype: torch.empty(0, dtype=torch.int16 if dtype == torch.bfloat16 else dtype).numpy().dtype for dtype in _DATATYPES
}
# A quantized tensor travels as its integers; its scale and zero point are tensor parameters.
_QUANTIZED = {torch.uint8: torch.quint8, torch.int8: torch.qint8, torch.int32: torch.qint32}
_DATATYPES.update({kind: _DATATYPES[dtype] for dtype, kind in _QUANTIZED.items()})

Quantization = tuple[float, int]


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
        raise ProtocolError(f"unknown datatype {shortened(datatype)}; known ones are {', '.join(_DTYPES)}")
    return dtype


def quantization_of(tensor: Tensor) -> Quantization | None:
    """Scale and zero point of a quantized tensor; None for others. ProtocolError for one quantized per channel."""
    if not tensor.is_quantized:
        return None
    if tensor.qscheme() != torch.per_tensor_affine:
        raise ProtocolError(f"a tensor quantized by {tensor.qscheme()} cannot be sent; quantize activations per tensor")
    return tensor.q_scale(), tensor.q_zero_point()


def checked_quantization(value: Any, dtype: torch.dtype, where: str) -> Quantization | None:
    """The ``quantized`` parameter of a tensor, None when there is none. ProtocolError when it cannot be."""
    if value is None:
        return None
    scale, zero_point = (value.get(key) for key in ("scale", "zero_point")) if isinstance(value, dict) else (None, None)
    known = dtype in _QUANTIZED and isinstance(scale, float) and 0 < scale < math.inf and type(zero_point) is int
    if not known or not torch.iinfo(dtype).min <= zero_point <= torch.iinfo(dtype).max:  # type: ignore[operator]
        raise ProtocolError(
            f"{where} has the parameter quantized {shortened(value)}; it takes a positive scale and a zero_point "
            "within UINT8, INT8 or INT32, the tensor's datatype"
        )
    return scale, zero_point  # type: ignore[return-value]


def with_quantization(tensor: Tensor, quantization: Quantization) -> Tensor:
    """The quantized tensor that integers stand for."""
    return torch._make_per_tensor_quantized_tensor(tensor, *quantization)


def physical_order(tensor: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...] | None, Tensor]:
    """The dimension order of a dense tensor (None for row-major) and its memory, as a row-major CPU tensor."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = on_host(tensor)
    order, tensor = dense(tensor, shape)
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16; only the bytes matter.
        tensor = tensor.view(torch.int16)
    return order, tensor


def tensor_view(
    payload: memoryview | None,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: list[int] | None,
    where: str,
) -> Tensor:
    """A tensor on the bytes at ``offset``, with its dimensions in order; a copy only where those are not aligned."""
    count = math.prod(shape)
    if payload is None or count == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and numpy.ndarray(count, numpy.uint8, payload, offset).max() > 1:
        raise ProtocolError(f"{where} is BOOL and holds a byte other than 0 and 1")
    stored = shape if order is None else [shape[dim] for dim in order]
    # One call into torch; frombuffer and view would be two.
    tensor = torch.from_numpy(numpy.ndarray(stored, _NUMPY[dtype], payload, offset))
    if tensor.data_ptr() % ALIGNMENT_BYTES:
        tensor = tensor.clone()
    if dtype == torch.bfloat16:
        tensor = tensor.view(dtype)
    return logical(tensor, order)


def tensor_from_json(data: Any, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Tensor:
    """A tensor from JSON numbers, flat or nested like the shape. Raises ProtocolError for any other values."""
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


def checked_shape(value: Any, where: str) -> tuple[int, ...]:
    """A shape out of JSON. Raises ProtocolError."""
    if not isinstance(value, list) or not all(type(dim) is int and dim >= 0 for dim in value):
        raise ProtocolError(f"{where} has shape {shortened(value)}; a shape is a list of non-negative integers")
    if len(value) > MAX_RANK:
        raise ProtocolError(f"{where} has {len(value)} dimensions; at most {MAX_RANK} are accepted")
    if math.prod(dim for dim in value if dim) > MAX_ELEMENTS:
        raise ProtocolError(f"{where} has shape {shortened(value)}, more than {MAX_ELEMENTS} elements")
    return tuple(value)


def checked_dim_order(value: Any, rank: int, where: str) -> list[int] | None:
    """A permutation of ``rank`` dimensions out of JSON, None for none. Raises ProtocolError."""
    if value is None:
        return None
    permutation = isinstance(value, list) and all(type(dim) is int for dim in value)
    if not permutation or sorted(value) != list(range(rank)):
        raise ProtocolError(f"{where} has dim_order {shortened(value)}, no permutation of its {rank} dimensions")
    return list(value)


def shortened(value: object) -> str:
    """A value as it is quoted in an error message, however large or deep it is."""
    return reprlib.repr(value)
