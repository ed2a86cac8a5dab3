"""Digests of a model's weights, by which two machines know whether they hold the same ones.

Weights are parameters and buffers, the packed weights of quantized modules, and tensors that the model reads from
plain attributes, lists, dicts, closures and global names. A digest is the SHA-256 of a tensor's dtype, shape and bytes
in row-major order. So it depends neither on the memory layout, nor on the device, nor on the PyTorch version. A
``Snapshot`` tells whether weights have changed without reading them.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.tracing.digests import TensorDigest, tensor_digest, value_text
from torchsurgeon.tracing.reading import Reading, plain_tensors, read_model
from torchsurgeon.tracing.step import unique


@dataclass(frozen=True)
class WeightDigests:
    """The digests of all weights by name, and the digest of all of them, ``combined``.

    A tensor that has several names as a parameter or buffer is under each of them. The numbers beside a packed weight
    (its scale) have digests too.
    """

    tensors: Mapping[str, TensorDigest]
    combined: str

    def to_json(self) -> dict[str, Any]:
        return {"weights": self.combined, "tensors": {name: one.to_json() for name, one in self.tensors.items()}}


def weight_digests(model: nn.Module, reading: Reading | None = None) -> WeightDigests:
    """Return the digests of all weights of ``model``, also of the buffers that are not persistent.

    Args:
        model: the model.
        reading: what the model reads; found out by default.
    """
    known: dict[int, TensorDigest] = {}

    def digest(tensor: Tensor) -> TensorDigest:
        if id(tensor) not in known:
            known[id(tensor)] = tensor_digest(tensor)
        return known[id(tensor)]

    registered = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    tensors = {name: digest(tensor) for name, tensor in registered}
    for name, value in _packed(model):
        tensors[unique(name, tensors)] = tensor_digest(value) if isinstance(value, Tensor) else _number_digest(value)
    for name, tensor in plain_tensors(model, reading or read_model(model)).items():
        tensors[unique(name, tensors)] = digest(tensor)
    tensors = dict(sorted(tensors.items()))
    combined = hashlib.sha256()
    for name, one in tensors.items():
        combined.update(f"{name}\0{one.digest}\n".encode())
    return WeightDigests(tensors, combined.hexdigest())


def identity(graph: str, weights: str) -> str:
    """Return a short digest of a graph and its weights, which a server puts into its answers.

    Args:
        graph: the graph's fingerprint in hex.
        weights: the weights' combined digest in hex.
    """
    return hashlib.sha256(f"{graph}\n{weights}".encode()).hexdigest()[:16]


class Snapshot:
    """The weights of a model at one moment: which tensors, where in memory, and in which version.

    A write that PyTorch does not count, such as one through ``numpy``, is not noticed; see ``WatchedWeights``.

    Args:
        model: the model, whose parameters, buffers and packed weights may also be replaced.
        plain: other tensors that it reads, of which only changes in place count.

    Attributes:
        tensors: the tensors that count, each once, and those inside them.
    """

    def __init__(self, model: nn.Module, plain: Iterable[Tensor] = ()) -> None:
        modules = list(model.modules())
        tables: list[dict[str, Any]] = [table for one in modules for table in (one._parameters, one._buffers)]
        self._tables = list(filter(None, tables))
        self._tensors: list[Tensor | None] = [tensor for table in self._tables for tensor in table.values()]
        self._single = [i for i, tensor in enumerate(self._tensors) if tensor is None or tensor.numel() < 2]
        self._singles = [self._tensors[i] for i in self._single]
        self._packed = [
            (module.__dict__, key, value)
            for module in modules
            for key, value in module.__dict__.items()
            if isinstance(value, torch.ScriptObject)
        ]
        # The number of batches that a batch norm has seen is counted in training, and computes nothing afterwards.
        idle = {id(module._buffers.get("num_batches_tracked")) for module in modules if isinstance(module, _BATCH_NORM)}
        given: dict[int, Tensor] = {}
        for tensor in (*self._tensors, *plain):
            if tensor is not None and id(tensor) not in idle:
                given |= {id(one): one for one in (tensor, *_inner(tensor))}
        self.tensors = tuple(given.values())
        self._counted = [tensor for tensor in given.values() if not tensor.is_inference()]
        self._placed = [one for one in given.values() if one.layout is torch.strided and not _is_wrapper(one)]
        self._numbers = [*map(_VERSION, self._counted), *map(_PLACE, self._placed)]

    def same_weights(self) -> bool:
        """Return whether every weight is the same tensor in the same place, not written to since.

        It is called at every inference, so it consists of built-in loops (``map``, ``all``), which are the fastest.
        """
        return (
            self._same_tensors()
            and [*map(_VERSION, self._counted), *map(_PLACE, self._placed)] == self._numbers
            and (not self._packed or all(table.get(key) is value for table, key, value in self._packed))
        )

    def _same_tensors(self) -> bool:
        # Lists compare their elements by identity first, which is faster than a loop with "is". Only other tensors are
        # compared by value, which raises unless they have one element, so those are compared by identity.
        now = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        try:
            if now != self._tensors:
                return False
            return not self._single or all(map(operator.is_, map(now.__getitem__, self._single), self._singles))
        except Exception as error:
            if by_signal_handler(error):
                raise
            return False


_VERSION, _PLACE = operator.attrgetter("_version"), Tensor.data_ptr
_BATCH_NORM = nn.modules.batchnorm._NormBase


def _is_wrapper(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    """Return the tensors inside one of a subclass, such as the integers and scales of a quantized weight."""
    if _is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield getattr(tensor, name)
            yield from _inner(getattr(tensor, name))


def _packed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return what modules keep besides parameters and buffers: packed weights, scales and zero points, by name."""
    for path, module in model.named_modules():
        for name, value in _packed_in(module).items():
            yield from _flat(f"{path}.{name}".lstrip("."), value)


def _packed_in(module: nn.Module) -> dict[str, Any]:
    cls = type(module)
    packed = {key: value for key, value in module.__dict__.items() if isinstance(value, torch.ScriptObject)}
    plain = cls._save_to_state_dict is nn.Module._save_to_state_dict
    if plain and cls.get_extra_state is nn.Module.get_extra_state:
        return packed
    saved: dict[str, Any] = {}
    try:
        module._save_to_state_dict(saved, "", True)
    except Exception:
        # A module that cannot be saved; what it has packed is compared as it is.
        return packed
    return {key: one for key, one in saved.items() if key not in module._parameters and key not in module._buffers}


def _flat(name: str, value: Any, depth: int = 6) -> Iterator[tuple[str, Any]]:
    script: Any = value
    if isinstance(value, torch.ScriptObject) and script._has_method("__getstate__"):
        value = script.__getstate__()
    if isinstance(value, (tuple, list, dict)) and not isinstance(value, torch.Size) and depth:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}", one, depth - 1)
    else:
        yield name, value


def _number_digest(value: Any) -> TensorDigest:
    return TensorDigest(type(value).__name__, (), hashlib.sha256(value_text(value).encode()).hexdigest())
