"""The fields of a message's JSON header that describe a tensor: its datatype, its shape, and how its bytes lie.

Neither this file nor the header knows a tensor library: a device without PyTorch reads the same messages.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

from torchsurgeon.errors import ProtocolError, short

ALIGNMENT_BYTES = 64
MAX_RANK = 16
MAX_ELEMENTS = 1 << 40

ITEM_BYTES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8,
    "COMPLEX32": 4, "COMPLEX64": 8, "COMPLEX128": 16,
    "FP8_E4M3FN": 1, "FP8_E4M3FNUZ": 1, "FP8_E5M2": 1, "FP8_E5M2FNUZ": 1, "FP8_E8M0FNU": 1, "FP4_E2M1FN_X2": 1,
}  # fmt: skip
"""Bytes of an element of each datatype: first the protocol's own, then torchsurgeon's."""

# A quantized tensor travels as its integers.
_RANGES = {"UINT8": (0, 255), "INT8": (-128, 127), "INT32": (-(1 << 31), (1 << 31) - 1)}

Quantization = tuple[float, int]

_NAME_CHARACTERS, _VALUE_CHARACTERS = 100, 200
_SHALLOW = reprlib.Repr()
_SHALLOW.maxlevel = 2


def checked_datatype(value: object) -> str:
    """Return the datatype out of JSON.

    Raises:
        ProtocolError: there is no such datatype, or none that a tensor can have (BYTES).
    """
    if not isinstance(value, str) or value not in ITEM_BYTES:
        raise ProtocolError(f"a datatype must be one of {', '.join(ITEM_BYTES)}; got {shortened(value)}")
    return value


def checked_quantization(value: Any, datatype: str, where: str) -> Quantization | None:
    """Return scale and zero point out of the JSON parameter ``quantized``; None where it is missing.

    Args:
        value: the parameter.
        datatype: the datatype of the tensor's integers.
        where: the tensor, for the message of an error.

    Raises:
        ProtocolError: scale or zero point is missing or out of its range, or the datatype is not that of a quantized
            tensor.
    """
    if value is None:
        return None
    scale, zero_point = (value.get(key) for key in ("scale", "zero_point")) if isinstance(value, dict) else (None, None)
    low, high = _RANGES.get(datatype, (1, 0))
    known = isinstance(scale, float) and 0 < scale < math.inf and type(zero_point) is int
    if not known or not low <= zero_point <= high:  # type: ignore[operator]
        raise ProtocolError(
            f"the parameter quantized of {where} must have a positive scale, and a zero_point in the range of the "
            f"tensor's datatype, which must be UINT8, INT8 or INT32; got {shortened(value)}"
        )
    return scale, zero_point  # type: ignore[return-value]


def checked_shape(value: Any, where: str) -> tuple[int, ...]:
    """Return a shape out of JSON.

    Args:
        value: the shape.
        where: the tensor, for the message of an error.

    Raises:
        ProtocolError: it is no list of non-negative integers, or has too many dimensions or elements.
    """
    if not isinstance(value, list) or not all(type(dim) is int and dim >= 0 for dim in value):
        raise ProtocolError(f"the shape of {where} must be a list of non-negative integers; got {shortened(value)}")
    if len(value) > MAX_RANK:
        raise ProtocolError(f"a tensor may have at most {MAX_RANK} dimensions; {where} has {len(value)}")
    if math.prod(dim for dim in value if dim) > MAX_ELEMENTS:
        raise ProtocolError(
            f"a tensor may have at most {MAX_ELEMENTS} elements; {where} has shape {shortened(value)}, which has more"
        )
    return tuple(value)


def checked_dim_order(value: Any, rank: int, where: str) -> list[int] | None:
    """Return the order of a tensor's dimensions out of JSON; None where it is missing.

    Args:
        value: the order.
        rank: how many dimensions the tensor has.
        where: the tensor, for the message of an error.

    Raises:
        ProtocolError: it is no permutation of the tensor's dimensions.
    """
    if value is None:
        return None
    permutation = isinstance(value, list) and all(type(dim) is int for dim in value)
    if not permutation or sorted(value) != list(range(rank)):
        raise ProtocolError(
            f"dim_order of {where} must be a permutation of its {rank} dimensions; got {shortened(value)}"
        )
    return list(value)


def shortened(value: object) -> str:
    """Return a JSON value as errors quote it, in at most 200 characters, without walking through all of it."""
    return _SHALLOW.repr(value)[:_VALUE_CHARACTERS]


def quoted(name: str) -> str:
    """Return a tensor's name as errors quote it, in at most 100 characters."""
    text = repr(name)
    return text if len(text) <= _NAME_CHARACTERS else short(name, _NAME_CHARACTERS)
