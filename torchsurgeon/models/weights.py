"""Digests of a model's weights, so that two machines can tell whether they hold the same ones.

A digest is SHA-256 over a tensor's dtype, shape and bytes in row-major order, so it depends neither on memory layout
nor on the device, nor on the PyTorch version. A :class:`Snapshot` tells without reading them whether they have changed.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterator, Mapping
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


def identity(graph: str, weights: str) -> str:
    """Return the short name of a graph and weights (both fingerprints in hex), which a server puts in its answers."""
    return hashlib.sha256(f"{graph}\n{weights}".encode()).hexdigest()[:16]


class Snapshot:
    """Which parameters and buffers a model had when this was made, and their memory.

    A change of memory that PyTorch does not count, as through ``numpy``, is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables = [
            table for module in model.modules() for table in (module._parameters, module._buffers) if len(table)
        ]
        self._tensors: list[Tensor | None] = [tensor for table in self._tables for tensor in table.values()]
        given = {id(tensor): tensor for tensor in self._tensors if tensor is not None}.values()
        self._counted = [tensor for tensor in given if not tensor.is_inference()]
        self._placed = [tensor for tensor in given if tensor.layout is torch.strided]
        self._versions = list(map(_VERSION, self._counted))
        self._places = list(map(Tensor.data_ptr, self._placed))

    def same_weights(self) -> bool:
        """Whether every parameter and buffer is the one it was, where it was, and not written to since.

        Asked at every inference, so it runs in the interpreter's own loops.
        """
        return (
            all(map(operator.is_, _values(self._tables), self._tensors))
            and sum(map(len, self._tables)) == len(self._tensors)
            and list(map(_VERSION, self._counted)) == self._versions
            and list(map(Tensor.data_ptr, self._placed)) == self._places
        )


_VERSION = operator.attrgetter("_version")


def _values(tables: list[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, tables))
