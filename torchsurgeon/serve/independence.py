"""Whether the samples of a batch leave each other alone, and whether a batch keeps the bits that each has alone.

A traced model may take any batch, and still mix its samples: it may subtract their mean, or scale them by the largest
of all. And a kernel may add up in another order for eight samples than for one. Both show when samples are run alone
and together, and the results of all layers are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import short
from torchsurgeon.serve.batching import batch_dimension
from torchsurgeon.serve.tails import place_of
from torchsurgeon.tracing.flow import Value
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.state import left_as_it_was
from torchsurgeon.tracing.step import Environment, Step

# In batches of one size, the same kernels run for a sample whatever lies beside it, so it may move by hardly anything.
# From one size to another, kernels change, and may multiply more coarsely than a tensor's type says: in TF32 on a GPU,
# or where float32 may be multiplied in less than its precision. Only then may a value move by as much as in 16 bits.
_IN_ONE_SIZE, _IN_ANOTHER_SIZE, _IN_FLOAT64 = 1e-3, 5e-2, 1e-9
_NOTHING = 1e-30
_ZEROS = 0.6
# Batches of up to so many samples are compared bit for bit.
MOST_EXACT = 8
_SMALL_BYTES, _REPEATS = 1 << 20, 8


def why_alone(graph: LayerGraph, tensors: Sequence[Tensor]) -> str | None:
    """Return why requests of a model must not be joined to a batch, in words; None where they may.

    Args:
        graph: the traced model.
        tensors: the example's tensors, in the order of ``graph.inputs``.
    """
    if not graph.batch_free:
        return "it takes the example's batch size only"
    if graph.check_values is not None or graph.sizes_vary:
        return "the path that it takes depends on values"
    for spec in (*graph.inputs, *graph.outputs):
        if batch_dimension(spec) is None:
            return f"its tensor {short(spec.name)} has no dimension for samples"
    samples = _samples(graph, tensors, 2)
    together = _Kept(graph).of(_joined(graph, samples))
    for index, sample in enumerate(samples):
        alone, twice = _Kept(graph).of(sample), _Kept(graph).of(_joined(graph, [sample, sample]))
        for name, whole in together.items():
            beside_itself = _sample_of(graph, name, twice[name], index, 2)
            beside_another = _sample_of(graph, name, whole, index, 2)
            if beside_itself is None or beside_another is None:
                continue
            if _moves(beside_another, beside_itself, alone[name]):
                return f"its samples do not leave each other alone: in a batch, {short(name)} is another"
    return None


def most_exact(graph: LayerGraph, tensors: Sequence[Tensor], most: int = MOST_EXACT) -> int:
    """Return how many samples may run together so that each result of each layer keeps its bits; 1 if none may.

    Args:
        graph: a traced model whose samples leave each other alone.
        tensors: the example's tensors, in the order of ``graph.inputs``.
        most: how many to try at most.
    """
    # Few numbers may be equal by chance, so a small model is run on more samples.
    small = sum(spec.size_bytes for spec in graph.values.values()) < _SMALL_BYTES
    for seed in range(_REPEATS if small else 1):
        most = _exact_on(graph, _samples(graph, tensors, most, seed))
    return most


def _exact_on(graph: LayerGraph, samples: Sequence[Sequence[Tensor]]) -> int:
    alone = [_Kept(graph).of(samples[0])]
    for size in range(2, len(samples) + 1):
        alone.append(_Kept(graph).of(samples[size - 1]))
        together = _Kept(graph).of(_joined(graph, samples[:size]))
        for name, whole in together.items():
            for index in range(size):
                own = _sample_of(graph, name, whole, index, size)
                if own is None or not _same(own, alone[index][name]):
                    return size - 1
    return len(samples)


class _Kept:
    """Keeps what each layer gives, as it is before a later layer overwrites it."""

    def __init__(self, graph: LayerGraph) -> None:
        self._graph = graph
        self._values: dict[int, list[Value]] = {}
        for name in graph.values:
            value = graph.value(name)
            self._values.setdefault(value.step, []).append(value)
        self.found: dict[str, Tensor] = {}

    def of(self, tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Run the model on tensors, and return what its layers and the model itself give, by name."""
        graph = self._graph
        whole: Segment = tail_for(graph, tuple(sorted(spec.name for spec in graph.inputs)), flat=True)
        place = place_of(graph.model)
        given = {spec.name: one.to(place) for spec, one in zip(graph.inputs, tensors, strict=True)}
        with left_as_it_was(graph.model), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            environment = whole.watched([given[name] for name in sorted(given)], self)
            results = whole.result(environment)
        outputs = [spec.name for spec in graph.outputs]
        return {**self.found, **{f"output {name}": one for name, one in zip(outputs, results, strict=True)}}

    def before(self, step: Step, environment: Environment) -> None:
        """Nothing is looked at before a step."""

    def after(self, step: Step, environment: Environment, token: Any) -> None:
        """Keep what a step has given."""
        for value in self._values.get(step.index, ()):
            if environment[step.index] is not None:
                self.found[value.name] = value.leaf(environment).clone()


def _samples(graph: LayerGraph, tensors: Sequence[Tensor], count: int, seed: int = 0) -> list[list[Tensor]]:
    """Return examples of one sample each: the example's first sample, and others of the same kind."""
    pairs = zip(graph.inputs, tensors, strict=True)
    first = [_narrow(tensor.cpu(), batch_dimension(spec), 0) for spec, tensor in pairs]
    noise = torch.Generator().manual_seed(seed)
    return [first, *([_another(tensor, noise) for tensor in first] for _ in range(count - 1))]


def _another(tensor: Tensor, noise: torch.Generator) -> Tensor:
    """Return a tensor with other values in the range of this one's."""
    if not tensor.numel():
        return tensor.clone()
    mixed = tensor.reshape(-1)[torch.randperm(tensor.numel(), generator=noise)].reshape(tensor.shape)
    if tensor.is_complex():
        return mixed
    if not tensor.is_floating_point():
        # In another order, a mask would let as many through, and a text would be as long. So some become zero, which is
        # a valid token, and a valid place in any table.
        return mixed.masked_fill(torch.rand(tensor.shape, generator=noise) < _ZEROS, 0)
    low, high = float(tensor.min()), float(tensor.max())
    spread = (high - low) or 1.0
    added = torch.rand(tensor.shape, generator=noise, dtype=torch.float32) * spread
    # Of another size too, so that a scale that is taken of all samples shows.
    return ((mixed.float() + added) * (0.3 + float(torch.rand((), generator=noise)))).to(tensor.dtype)


def _joined(graph: LayerGraph, samples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    dims = [batch_dimension(spec) or 0 for spec in graph.inputs]
    return [torch.cat(list(parts), dim) for dim, parts in zip(dims, zip(*samples, strict=True), strict=True)]


def _sample_of(graph: LayerGraph, name: str, whole: Tensor, index: int, count: int) -> Tensor | None:
    """Return the part of a tensor that belongs to one sample of a batch; the whole where it does not grow with it."""
    spec = graph.values.get(name) or next(one for one in graph.outputs if f"output {one.name}" == name)
    dim = batch_dimension(spec)
    if dim is not None:
        return _narrow(whole, dim, index)
    growing = [i for i, step in enumerate(spec.batch_step) if step]
    if not growing:
        return whole
    size = whole.shape[growing[0]] // count
    # Several rows a sample, one sample after the other.
    return whole.narrow(growing[0], index * size, size) if len(growing) == 1 else None


def _narrow(tensor: Tensor, dim: int | None, index: int) -> Tensor:
    return tensor if dim is None else tensor.narrow(dim, index, 1)


def _moves(beside_another: Tensor, beside_itself: Tensor, alone: Tensor) -> bool:
    """Return whether what lies beside a sample in a batch changes its result, or how many lie there."""
    wide = alone.dtype in (torch.float64, torch.complex128)
    if _distance(beside_another, beside_itself) > (_IN_FLOAT64 if wide else _IN_ONE_SIZE):
        return True
    # Rounding may move a number over an edge, and whole numbers with it, so these are not compared between sizes.
    if not (alone.is_floating_point() or alone.is_complex()):
        return False
    coarse = alone.is_cuda or torch.get_float32_matmul_precision() != "highest"
    exact = alone.dtype in (torch.float32, torch.complex64) and not coarse
    return _distance(beside_itself, alone) > (_IN_FLOAT64 if wide else _IN_ONE_SIZE if exact else _IN_ANOTHER_SIZE)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return how far two tensors are from each other, as a part of the second one's largest value.

    Of whole numbers and truth values, it is 0 where all are equal, and infinite otherwise.
    """
    if one.shape != other.shape:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    if one.is_quantized or not (one.is_floating_point() or one.is_complex()):
        return math.inf
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    one, other = one.double(), other.double()
    both = one.isfinite() & other.isfinite()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return math.inf
    if not bool(both.any()):
        return 0.0
    far, size = float((one - other)[both].abs().max()), float(other[both].abs().max())
    return far / size if size else math.inf if far > _NOTHING else 0.0


def _same(one: Tensor, other: Tensor) -> bool:
    if not one.dim() and not one.dtype.is_floating_point:
        # A size, which is that of the batch.
        return True
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
