"""Requests that wait together run together: how their tensors are joined, and whether and how far that pays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from torchsurgeon.serve.recent import Recent
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import TensorSpec

Batching = Literal["off", "exact", "rounded"]
"""Never; only as far as answers keep the bits that they have alone; also where they are the same to rounding only."""

# A larger number of samples has to take so much less time a sample before so many are taken together.
_WORTH = 0.95
# So often each number is tried at first, and after so many runs another number is tried again.
_FEW, _MANY = 3, 32
_SMOOTHING = 0.2
_MOST_KINDS = 256
# So many requests of a client run alone after one that has failed in the model, and of so many clients that is known.
_ALONE, _MOST_CLIENTS = 32, 1024


def batch_dimension(spec: TensorSpec) -> int | None:
    """Return the dimension of a tensor along which samples lie one after the other; None where there is none."""
    found = [i for i, step in enumerate(spec.batch_step) if step]
    if len(found) != 1 or spec.batch_step[found[0]] != 1 or spec.shape[found[0]] != spec.example_batch:
        return None
    return found[0]


@dataclass(frozen=True)
class Seam:
    """Where the tensors of several requests are joined, and where the outputs are taken apart again.

    Attributes:
        inputs: for each tensor of a request, in their order, the dimension along which samples lie.
        outputs: the same for each output of the model.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def of(graph: LayerGraph, names: Sequence[str]) -> Seam | None:
        """Return how requests with these tensors are joined; None where a tensor does not allow it."""
        if any(name in graph.layouts for name in names):
            return None
        inputs = [batch_dimension(graph.values[name]) for name in names]
        outputs = [batch_dimension(spec) for spec in graph.outputs]
        if None in (*inputs, *outputs):
            return None
        return Seam(tuple(one for one in inputs if one is not None), tuple(one for one in outputs if one is not None))

    def join(self, requests: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
        """Return the tensors of all requests as those of one; None where they lie in memory in an unusual way."""
        joined = []
        for dim, *tensors in zip(self.inputs, *requests, strict=True):
            if not (all(map(_is_contiguous, tensors)) or all(map(_is_channels_last, tensors))):
                return None
            whole = torch.cat(tensors, dim)
            if not all(map(_is_contiguous, tensors)) and not _is_channels_last(whole):
                return None
            joined.append(whole)
        return joined

    def part(self, results: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
        """Return the outputs of each request.

        Args:
            results: the outputs of all together.
            sizes: how many samples each request has.
        """
        parts = [result.split(list(sizes), dim) for dim, result in zip(self.outputs, results, strict=True)]
        return [list(one) for one in zip(*parts, strict=True)]

    def size(self, tensors: Sequence[Tensor]) -> int:
        """Return how many samples a request has."""
        return tensors[0].shape[self.inputs[0]]


# Tensors that lie otherwise, or in several ways, torch.cat would give another order in memory, and that decides which
# kernel runs.
def _is_contiguous(tensor: Tensor) -> bool:
    return tensor.is_contiguous()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


@dataclass
class _Kind:
    """How long a sample took in runs of 1, 2, 4, 8, … samples, and how often each number was tried."""

    each_s: dict[int, float] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)
    runs: int = 0

    def best(self) -> int:
        """Return the number with which a sample takes the least time, the smaller of two that are nearly the same."""
        best = 1
        for size in sorted(self.each_s):
            if 1 in self.each_s and self.each_s[size] < _WORTH * self.each_s[best]:
                best = size
        return best


class Gain:
    """How many requests are worth running together, found out while they run. Thread-safe.

    It begins with one. Then each power of two is tried a few times, once so many wait: two may take as long as one did
    each, and eight half of it. After that the best is taken, and now and then another one is tried again, because what
    pays depends on the load.

    Args:
        most: the most samples in one run.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sizes = [1 << power for power in range(most.bit_length())]
        self._kinds: Recent[object, _Kind] = Recent(_MOST_KINDS)
        self._lock = threading.Lock()

    def limit(self, kind: object) -> int:
        """Return how many samples of a kind of request to run together at most."""
        with self._lock:
            found = self._kinds.get(kind)
            if found is None:
                return 1
            found.runs += 1
            for size in self._sizes:
                tried = found.tried.get(size, 0)
                if tried < _FEW:
                    # Counted here, since so many may never wait.
                    found.tried[size] = tried + 1
                    return size
            if found.runs % _MANY == 0:
                return self._sizes[found.runs // _MANY % len(self._sizes)]
            # Of the last power of two, the runs that were measured may have been larger.
            best = found.best()
            return self._most if best == self._sizes[-1] else best

    def alone_s(self, kind: object) -> float | None:
        """Return how long a request of a kind takes alone; None before that is known."""
        with self._lock:
            found = self._kinds.get(kind)
            return None if found is None else found.each_s.get(1)

    def took(self, kind: object, size: int, duration_s: float) -> None:
        """Take notice of how long a run of ``size`` samples took."""
        rounded = 1 << (size.bit_length() - 1)
        with self._lock:
            found = self._kinds.get(kind)
            if found is None:
                found = _Kind()
                self._kinds.put(kind, found)
            each_s = duration_s / size
            before = found.each_s.get(rounded, each_s)
            found.each_s[rounded] = before + _SMOOTHING * (each_s - before)


class Apart:
    """Clients whose requests run alone, because one has failed in the model. Thread-safe.

    A batch that fails runs again one by one, which takes many times as long. So a client that sends what fails again
    and again would slow all others down.
    """

    def __init__(self) -> None:
        self._left: Recent[str, int] = Recent(_MOST_CLIENTS)

    def holds(self, client: str) -> bool:
        """Return whether the requests of a client run alone."""
        return bool(self._left.get(client))

    def failed(self, client: str) -> None:
        """Take notice of a request that has failed in the model."""
        self._left.put(client, _ALONE)

    def answered(self, client: str) -> None:
        """Take notice of a request that was answered."""
        left = self._left.get(client)
        if left:
            self._left.put(client, left - 1)
