"""Which values can cross from one side to the other: the only place that decides it.

A tensor crosses as the bytes of its elements. So it has to have a dtype with a name on the wire, and memory of its own
in which its elements lie. What cannot cross, such as a sparse tensor or an object, is no boundary tensor: no cut is
offered while a later layer still reads it.
"""

from __future__ import annotations

from typing import Any

import torch

PROTOCOL_DATATYPES: dict[torch.dtype, str] = {
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
"""The Open Inference Protocol's own names."""

_EXTENSIONS = {
    "complex32": "COMPLEX32",
    "complex64": "COMPLEX64",
    "complex128": "COMPLEX128",
    "float8_e4m3fn": "FP8_E4M3FN",
    "float8_e4m3fnuz": "FP8_E4M3FNUZ",
    "float8_e5m2": "FP8_E5M2",
    "float8_e5m2fnuz": "FP8_E5M2FNUZ",
    "float8_e8m0fnu": "FP8_E8M0FNU",
    "float4_e2m1fn_x2": "FP4_E2M1FN_X2",
}
# Older versions of PyTorch lack some of these.
EXTENSION_DATATYPES: dict[torch.dtype, str] = {
    getattr(torch, dtype): name for dtype, name in _EXTENSIONS.items() if hasattr(torch, dtype)
}
"""torchsurgeon's names of the dtypes that the protocol has no name for."""

# A quantized tensor travels as its integers, with scale and zero point beside them.
INTEGERS_OF_QUANTIZED = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}


def obstacle(value: Any) -> str | None:
    """Return what a value is that keeps it from crossing ("a sparse tensor"); None where it is a tensor that crosses.

    Args:
        value: a tensor, or anything else that a layer gives.
    """
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} object"
    form = sparse_or_nested(value)
    if form is not None:
        return form
    if value.dtype in INTEGERS_OF_QUANTIZED:
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return None
        return "a tensor quantized per channel"
    if value.dtype in PROTOCOL_DATATYPES or value.dtype in EXTENSION_DATATYPES:
        return None
    return f"a tensor of {value.dtype}"


def sparse_or_nested(tensor: torch.Tensor) -> str | None:
    """Return what a tensor is if it has no memory of its own in which its elements lie in order; None if it has."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})" if "sparse" in str(tensor.layout) else f"a {tensor.layout} tensor"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, a tensor made of other tensors"
    return None
