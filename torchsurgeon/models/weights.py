"""Digests of a model's weights, by which two machines know whether they hold the same ones.

A digest is the SHA-256 of a tensor's dtype, shape and bytes in row-major order. So it depends neither on the memory
layout, nor on the device, nor on the PyTorch version. A ``Snapshot`` tells whether weights have changed without reading
them.
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
    """A parameter or buffer: its dtype (``"float32"``), its shape, and the SHA-256 of these and its bytes in hex."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "digest": self.digest}


@dataclass(frozen=True)
class WeightDigests:
    """The digests of all parameters and buffers by name, and the digest of all of them, ``combined``.

    A tensor that has several names is under each of them.
    """

    tensors: Mapping[str, TensorDigest]
    combined: str

    def to_json(self) -> dict[str, Any]:
        return {"weights": self.combined, "tensors": {name: one.to_json() for name, one in self.tensors.items()}}


def weight_digests(model: nn.Module) -> WeightDigests:
    """Return the digests of every parameter and buffer of ``model``, also of the buffers that are not persistent."""
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
    """Return the digest of a dense tensor of any dtype on any device."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    digest = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    if tensor.numel():
        memory = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memory.numpy().data)
    return TensorDigest(dtype, shape, digest.hexdigest())


def identity(graph: str, weights: str) -> str:
    """Return a short digest of a graph and its weights, which a server puts into its answers.

    Args:
        graph: the graph's fingerprint in hex.
        weights: the weights' combined digest in hex.
    """
    return hashlib.sha256(f"{graph}\n{weights}".encode()).hexdigest()[:16]


class Snapshot:
    """The parameters and buffers of a model at one moment: which tensors, where in memory, and in which version.

    A change that PyTorch does not count, such as one through ``numpy``, is not noticed.
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
        """Return whether every parameter and buffer is the same tensor in the same place, not written to since.

        It is called at every inference, so it consists of built-in loops (``map``, ``all``), which are the fastest.
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
