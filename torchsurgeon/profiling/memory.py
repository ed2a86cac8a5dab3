"""Measure how much memory a model's tensors take while each of its layers runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchsurgeon.cutting.segment import Segment
from torchsurgeon.tracing.step import Environment, Step
from torchsurgeon.tracing.structure import flatten


def layer_memory(
    whole: Segment, tensors: Sequence[torch.Tensor], columns: Mapping[int, int], layers: int, device: torch.device
) -> NDArray[np.int64]:
    """Run the model once and return the most bytes that tensors take while each layer runs, shape (layers,).

    On the CPU, the tensors that are alive when the layer ends are counted, its inputs among them; memory that an
    operator takes and frees meanwhile is not seen. On CUDA it is the peak of PyTorch's allocator, which sees that too.
    Parameters and buffers are not counted.

    Args:
        whole: the whole model.
        tensors: its inputs.
        columns: by step index, the layer to which the step counts.
        layers: how many layers the model has.
        device: the device that the model is on.
    """
    watcher = _AllocatorPeak(columns, layers, device) if device.type == "cuda" else _LiveBytes(columns, layers)
    whole.watched(tensors, watcher)
    return watcher.most_bytes


class _LiveBytes:
    """Adds up, after each step, the memory under the tensors that are still in the environment."""

    def __init__(self, columns: Mapping[int, int], layers: int) -> None:
        self.most_bytes = np.zeros(layers, dtype=np.int64)
        self._columns = columns
        self._live: dict[int, dict[int, int]] = {}
        # The storages of parameters and buffers.
        self._own: set[int] = set()

    def before(self, step: Step, environment: Environment) -> None:
        if not self._live:
            self._live = {i: _storages(value) for i, value in enumerate(environment) if value is not None}

    def after(self, step: Step, environment: Environment, token: None) -> None:
        given = _storages(environment[step.index])
        if step.kind == "attr":
            self._own |= given.keys()
        self._live = {i: held for i, held in self._live.items() if environment[i] is not None} | {step.index: given}
        # By address, so that memory which several tensors share counts once.
        storages: dict[int, int] = {}
        for held in self._live.values():
            storages |= held
        size = sum(size_bytes for address, size_bytes in storages.items() if address not in self._own)
        column = self._columns[step.index]
        self.most_bytes[column] = max(self.most_bytes[column], size)


class _AllocatorPeak:
    """Reads the peak of PyTorch's CUDA allocator around each step."""

    def __init__(self, columns: Mapping[int, int], layers: int, device: torch.device) -> None:
        self.most_bytes = np.zeros(layers, dtype=np.int64)
        self._columns, self._device = columns, device
        # What was allocated before the run, inputs aside: the weights, and whatever else the process holds.
        self._without: int | None = None

    def before(self, step: Step, environment: Environment) -> None:
        if self._without is None:
            inputs: dict[int, int] = {}
            for value in environment:
                inputs |= _storages(value)
            self._without = torch.cuda.memory_allocated(self._device) - sum(inputs.values())
        torch.cuda.reset_peak_memory_stats(self._device)

    def after(self, step: Step, environment: Environment, token: None) -> None:
        assert self._without is not None
        size = torch.cuda.max_memory_allocated(self._device) - self._without
        column = self._columns[step.index]
        self.most_bytes[column] = max(self.most_bytes[column], size)


def _storages(value: Any) -> dict[int, int]:
    """Return the address and bytes of the memory under every tensor in a value; tensors that share memory, once."""
    found: dict[int, int] = {}
    for _, leaf in flatten(value)[0]:
        if isinstance(leaf, torch.Tensor):
            try:
                storage = leaf.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                # Sparse and MKL-DNN tensors do not show their storage.
                found[id(leaf)] = leaf.numel() * leaf.element_size()
    return found
