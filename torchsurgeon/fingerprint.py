"""Digests of a model's weights, so that two machines can tell whether they hold the same ones.

A digest is SHA-256 over a tensor's dtype, shape and bytes in row-major order, so it depends neither on memory layout
nor on the device, nor on the PyTorch version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorDigest:
    """One parameter or buffer: dtype (``"float32"``), shape, and the SHA-256 of both and of its bytes, in hex."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "digest": self.digest}


@dataclass(frozen=True)
class WeightDigests:
    """Digests of all parameters and buffers by name (shared ones under each name), and ``combined`` over all."""

    tensors: Mapping[str, TensorDigest]
    combined: str

    def to_json(self) -> dict[str, Any]:
        return {"weights": self.combined, "tensors": {name: one.to_json() for name, one in self.tensors.items()}}


def weight_digests(model: nn.Module) -> WeightDigests:
    """Digest every parameter and buffer of ``model``, non-persistent buffers included. Reads all of them once."""
    known: dict[int, TensorDigest] = {}
    tensors: dict[str, TensorDigest] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(named, key=lambda item: item[0]):
        if id(tensor) not in known:
            known[id(tensor)] = tensor_digest(tensor)
        tensors[name] = known[id(tensor)]
    combined = hashlib.sha256()
    for name, one in tensors.items():
        combined.update(f"{name}\0{one.digest}\n".encode())
    return WeightDigests(tensors, combined.hexdigest())


def tensor_digest(tensor: Tensor) -> TensorDigest:
    """Digest one dense tensor of any dtype (bfloat16 included) on any device."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    digest = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    if tensor.numel():
        memory = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memory.numpy().data)
    return TensorDigest(dtype, shape, digest.hexdigest())
