"""Digests of tensors and of what a model reads, equal in every process and version of PyTorch."""

from __future__ import annotations

import enum
import hashlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchsurgeon.tracing.reading import CONTAINERS, PLAIN, Part
from torchsurgeon.tracing.source import code_text, is_library_code
from torchsurgeon.tracing.step import function_name


@dataclass(frozen=True)
class TensorDigest:
    """A tensor: its dtype (``"float32"``), its shape, and the SHA-256 of these and its bytes in hex."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "digest": self.digest}


def tensor_digest(tensor: Tensor) -> TensorDigest:
    """Return the digest of a tensor of any dtype, layout and class, on any device.

    A quantized tensor's scales and zero points count too, a sparse one's indices, and the tensors inside one of a
    subclass. Of a tensor without data (on the meta device) there are only dtype and shape.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    digest = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    for part in _memory(tensor.detach()):
        digest.update(part)
    return TensorDigest(dtype, shape, digest.hexdigest())


def _memory(tensor: Tensor) -> Iterator[Any]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        yield f"{type(tensor).__name__} {sorted(map(str, _texts(settings)))}".encode()
        for name in names:
            yield f"{name}\0{tensor_digest(getattr(tensor, name)).digest}".encode()
    elif tensor.is_quantized:
        yield str(tensor.qscheme()).encode()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{tensor.q_scale()!r} {tensor.q_zero_point()!r}".encode()
        else:
            yield f"{tensor.q_per_channel_axis()}".encode()
            yield from _memory(tensor.q_per_channel_scales())
            yield from _memory(tensor.q_per_channel_zero_points())
        yield from _memory(tensor.int_repr())
    elif tensor.layout is torch.sparse_coo:
        coalesced = tensor.coalesce()
        yield from (*_memory(coalesced.indices()), *_memory(coalesced.values()))
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from _memory(part)
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()):
            yield from _memory(part)
    elif tensor.layout is not torch.strided:
        yield from _memory(tensor.to_dense())
    elif tensor.numel() and tensor.device.type != "meta":
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        yield plain.reshape(-1).view(torch.uint8).numpy().data


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from (f"{key} {text}" for text in _texts(one))
    elif isinstance(value, (list, tuple)):
        yield from (text for one in value for text in _texts(one))
    else:
        yield value_text(value)


def part_digest(part: Part) -> str:
    """Return a short hex digest of what is read; tensors only by dtype and shape, for weights are compared apart."""
    return hashlib.sha256(value_text(part.value).encode()).hexdigest()[:12]


def part_label(part: Part) -> str:
    """Return in words what a part is and where."""
    if isinstance(part.value, types.FunctionType):
        return f"function {part.path}"
    return f"class of {part.path}" if isinstance(part.value, nn.Module) else f"value of {part.path}"


def value_text(value: Any) -> str:
    """Return a text of a value by itself: a ``Reading`` has the parts of what holds others."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (torch.Size, slice, range)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, Tensor):
        return f"tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        memory = np.ascontiguousarray(value)
        data = repr(memory.tolist()) if value.dtype.hasobject else hashlib.sha256(memory.data).hexdigest()
        return f"array {value.dtype} {value.shape} {data}"
    if isinstance(value, types.FunctionType):
        code = value.__code__
        return f"function {code.co_name}" if is_library_code(code) else f"function {code_text(code)}"
    if isinstance(value, CONTAINERS):
        return _container_text(value)
    if isinstance(value, (nn.Module, type)):
        return f"class {(value if isinstance(value, type) else type(value)).__name__}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"{type(value).__name__} {function_name(value)}"
    return type(value).__name__


def _container_text(value: Any) -> str:
    """Return a text of the plain values in a list, tuple, set or dict, with a place for each other element."""
    if isinstance(value, (dict, types.MappingProxyType)):
        inside = [f"{_element_text(key)}: {_element_text(one)}" for key, one in value.items()]
    else:
        inside = [_element_text(one) for one in value]
        inside = sorted(inside) if isinstance(value, (set, frozenset)) else inside
    return f"{type(value).__name__}({', '.join(inside)})"


def _element_text(value: Any) -> str:
    return value_text(value) if isinstance(value, PLAIN) else "…"
