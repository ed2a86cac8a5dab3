"""How tensors lie in memory and in JSON: datatypes, orders of dimensions, and views of a message's bytes."""

from __future__ import annotations

import math
from array import array
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.codec.host import on_host
from torchsurgeon.errors import EncodingError, ProtocolError
from torchsurgeon.tracing.crossing import EXTENSION_DATATYPES, INTEGERS_OF_QUANTIZED, PROTOCOL_DATATYPES
from torchsurgeon.tracing.layout import dense, logical
from torchsurgeon.wire.fields import ALIGNMENT_BYTES, Quantization, shortened

_DATATYPES = {**PROTOCOL_DATATYPES, **EXTENSION_DATATYPES}
_DTYPES = {name: dtype for dtype, name in _DATATYPES.items()}
# NumPy has neither bfloat16 nor float8 nor half-precision complex numbers. An integer of the same size stands in for
# them, since only the bytes matter.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_OF_NUMPY = {*PROTOCOL_DATATYPES, torch.complex64, torch.complex128} - {torch.bfloat16}
_STAND_INS = {dtype: _INTEGERS[dtype.itemsize] for dtype in _DATATYPES if dtype not in _OF_NUMPY}
_NUMPY = {dtype: torch.empty(0, dtype=_STAND_INS.get(dtype, dtype)).numpy().dtype for dtype in _DATATYPES}
# A quantized tensor travels as its integers, with scale and zero point as tensor parameters.
_QUANTIZED = {integers: kind for kind, integers in INTEGERS_OF_QUANTIZED.items()}
_DATATYPES.update({kind: _DATATYPES[integers] for kind, integers in INTEGERS_OF_QUANTIZED.items()})


def datatype_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in messages, such as ``"FP32"``.

    Raises:
        EncodingError: there is none.
    """
    try:
        return _DATATYPES[dtype]
    except KeyError:
        raise EncodingError(
            f"no datatype of the protocol is {dtype}; convert the tensor to one of {', '.join(_DTYPES)}"
        ) from None


def dtype_of(datatype: object) -> torch.dtype:
    """Return the torch dtype of a datatype in a message.

    Raises:
        ProtocolError: there is no such datatype, or no dtype for it (BYTES).
    """
    dtype = _DTYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise ProtocolError(f"a datatype must be one of {', '.join(_DTYPES)}; got {shortened(datatype)}")
    return dtype


def quantization_of(tensor: Tensor) -> Quantization | None:
    """Return scale and zero point of a quantized tensor; None for one that is not quantized.

    Raises:
        EncodingError: the tensor is not quantized per tensor.
    """
    if not tensor.is_quantized:
        return None
    if tensor.qscheme() != torch.per_tensor_affine:
        raise EncodingError(f"a quantized tensor must be quantized per tensor to be sent; got {tensor.qscheme()}")
    return tensor.q_scale(), tensor.q_zero_point()


def with_quantization(tensor: Tensor, quantization: Quantization) -> Tensor:
    """Return the quantized tensor of these integers, scale and zero point."""
    return torch._make_per_tensor_quantized_tensor(tensor, *quantization)


def physical_order(tensor: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...] | None, Tensor]:
    """Return a tensor's order of dimensions (None for row-major), and its memory as a row-major CPU tensor.

    A tensor with gaps between its elements is copied, and one that is lazily conjugated or negated is computed.

    Args:
        tensor: the tensor, on any device.
        shape: its shape.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = on_host(tensor)
    order, tensor = dense(tensor, shape)
    stand_in = _STAND_INS.get(tensor.dtype)
    return order, tensor if stand_in is None else tensor.view(stand_in)


def tensor_view(
    payload: memoryview | None,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: list[int] | None,
    where: str,
) -> Tensor:
    """Return a tensor that is a view of a message's bytes, or a copy of them where they are not aligned.

    Args:
        payload: the bytes after the header; None where there are none.
        offset: where the tensor begins.
        dtype: the tensor's dtype.
        shape: the tensor's shape.
        order: the order of its dimensions in memory, outermost first; None for row-major.
        where: the tensor, for the message of an error.

    Raises:
        ProtocolError: a byte of a BOOL tensor is neither 0 nor 1.
    """
    count = math.prod(shape)
    if payload is None or count == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and numpy.ndarray(count, numpy.uint8, payload, offset).max() > 1:
        raise ProtocolError(f"the bytes of a BOOL tensor must be 0 or 1; {where} holds a byte other than 0 and 1")
    stored = shape if order is None else [shape[dim] for dim in order]
    # One call into PyTorch, where frombuffer and view would be two.
    tensor = torch.from_numpy(numpy.ndarray(stored, _NUMPY[dtype], payload, offset))
    if tensor.data_ptr() % ALIGNMENT_BYTES:
        # Byte by byte: kernels that copy complex128 crash where it does not lie on 16 bytes.
        data = numpy.ndarray(count * dtype.itemsize, numpy.uint8, payload, offset)
        tensor = torch.from_numpy(data).clone().view(dtype).view(stored)
    elif dtype in _STAND_INS:
        tensor = tensor.view(dtype)
    return logical(tensor, order)


def tensor_from_json(data: Any, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Tensor:
    """Return a tensor of JSON numbers.

    Args:
        data: the numbers, flat or nested like the shape.
        dtype: the tensor's dtype.
        shape: the tensor's shape.
        where: the tensor, for the message of an error.

    Raises:
        ProtocolError: the datatype has no form in JSON, or the values are not numbers, do not fit the dtype, or do not
            match the shape.
    """
    count = math.prod(shape)
    if dtype in EXTENSION_DATATYPES:
        raise ProtocolError(f"{where} is {datatype_of(dtype)}, which has no form in JSON; send it as binary data")
    flat = _flatten(data, shape, where)
    if len(flat) != count:
        raise ProtocolError(f"shape {list(shape)} needs {count} values; {where} has {len(flat)} values")
    kinds = set(map(type, flat))
    allowed = {int, float} if dtype.is_floating_point else {int, bool} if dtype == torch.bool else {int}
    if not kinds <= allowed:
        wrong = ", ".join(sorted(kind.__name__ for kind in kinds - allowed))
        raise ProtocolError(f"{where} must hold {datatype_of(dtype)} values; got {wrong} values")
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
    except OverflowError as error:
        if by_signal_handler(error):
            raise
        raise ProtocolError(f"the values of {where} must fit {datatype_of(dtype)}; one does not fit") from None
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(values, dtype=wide).to(dtype).view(shape)


def _flatten(data: Any, shape: tuple[int, ...], where: str) -> list[Any]:
    rows: list[Any] = data if isinstance(data, list) else [data]
    depth = 0
    while rows and isinstance(rows[0], list):
        if depth >= len(shape) or len(rows) != math.prod(shape[: depth + 1]):
            raise ProtocolError(f"the nesting of the data of {where} must match its shape {list(shape)}")
        dim = shape[depth + 1] if depth + 1 < len(shape) else -1
        if not all(isinstance(row, list) and len(row) == dim for row in rows):
            raise ProtocolError(f"the nesting of the data of {where} must match its shape {list(shape)}")
        rows = list(chain.from_iterable(rows))
        depth += 1
    return rows
