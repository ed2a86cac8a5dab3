"""The tails of a served model, which are cut when they are first asked for, and how requests are run on them."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import short
from torchsurgeon.models.arithmetic import ArithmeticReader
from torchsurgeon.serve.batching import Seam
from torchsurgeon.tracing.graph import LayerGraph

_CUT_CHARACTERS = 200


class Tails:
    """The tails that were cut so far, by the names of the tensors that they take. Thread-safe.

    Args:
        graph: the traced model.
        capacity: how many tails to keep; the least recently used ones are dropped.
    """

    def __init__(self, graph: LayerGraph, capacity: int) -> None:
        self._graph = graph
        self.capacity = capacity
        self._tails: OrderedDict[tuple[str, ...], Segment] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tails)

    def get(self, names: tuple[str, ...]) -> Segment:
        """Return the tail that takes these tensors. It is cut now if it is not kept.

        Args:
            names: the sorted names of the tensors.

        Raises:
            PartitionError: the tensors do not determine the model's output, or the graph has none of such a name.
        """
        with self._lock:
            tail = self._tails.get(names)
            if tail is not None:
                self._tails.move_to_end(names)
                return tail
        # Cut outside the lock. Two threads may cut the same tail at the same time; either result serves.
        tail = tail_for(self._graph, names, flat=True)
        with self._lock:
            self._tails[names] = tail
            while len(self._tails) > self.capacity:
                self._tails.popitem(last=False)
        return tail


def place_of(model: nn.Module) -> torch.device:
    """Return where a model's weights are; the CPU for a model without weights."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def run_at(place: torch.device, run: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
    """Run a tail on tensors that came over the wire, where its weights are, and wait until it has computed."""
    results = run(*[tensor.to(place, non_blocking=True) for tensor in tensors])
    if place.type == "cuda":
        # The time that an answer tells is that of the tail, and not that of launching its kernels.
        torch.cuda.current_stream(place).synchronize()
    return results


@dataclass(frozen=True)
class RequestPlan:
    """How requests with one header are run: ``run`` with the tensors in the order of ``names``, after ``check``.

    Attributes:
        seam: how such requests are joined to run as one; None where they are not.
        samples: how many samples a request has.
        arithmetic: reads what devices are told that the server computes with; None to tell them nothing.
        tail: what runs it where that is eager PyTorch on the CPU, which can stop between two layers; None otherwise.
        cut: the names as the log tells them.
    """

    names: tuple[str, ...]
    run: Callable[..., Sequence[Tensor]]
    outputs: tuple[str, ...] | None
    as_json: tuple[str, ...]
    check: Callable[[Mapping[str, Tensor]], None] | None = None
    seam: Seam | None = None
    tail: Segment | None = None
    samples: int = 1
    arithmetic: ArithmeticReader | None = None
    cut: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cut", short(",".join(self.names), _CUT_CHARACTERS, quote=False))
