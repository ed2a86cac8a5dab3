"""Tails that a backend runs on the server, built in a thread of their own while requests run in eager PyTorch."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.backends import Backend, BuiltPart, Part
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.profiling import LayerProfile, example_inputs
from torchsurgeon.profiling.fused import fused_profile
from torchsurgeon.serve.tails import place_of
from torchsurgeon.tracing.graph import LayerGraph

_logger = logging.getLogger(__name__)

# How long the parts of a model are measured, and how often each.
_BUDGET_S, _REPEATS = 10.0, 7

_Job = Callable[[], object]


class TailBuilder:
    """Has a backend build the tails for which requests ask. Thread-safe.

    Args:
        name: the model's name.
        graph: the traced model.
        backend: what runs its tails.
        capacity: how many built tails to keep.

    Attributes:
        profile: the JSON of what heads and tails take by the backend; None until it has been measured.
    """

    def __init__(self, name: str, graph: LayerGraph, backend: Backend, capacity: int) -> None:
        backend.check(graph)
        self._name, self._graph, self._backend, self._capacity = name, graph, backend, capacity
        self._said: set[str] = set()
        self._built: dict[tuple[str, ...], BuiltPart] = {}
        self.profile: dict[str, Any] | None = None
        self._measuring = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def run(self, names: tuple[str, ...], tail: Segment) -> Callable[..., Sequence[Tensor]]:
        """Return what runs a tail: eager PyTorch at first, and the backend once it has built the tail.

        Args:
            names: the names of the tensors that the tail takes.
            tail: the tail. One that was cut anew, since weights were replaced, is built anew.
        """
        with self._lock:
            built = self._built.get(names)
            if built is None or built.part.segment is not tail:
                if len(self._built) >= self._capacity:
                    self._built.clear()
                built = self._built[names] = BuiltPart(
                    Part.of_tail(self._graph, names, tail), self._backend, self._said
                )
        asked = False

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            nonlocal asked
            if not asked:
                # Two threads may both ask. The tail is built once.
                asked = True
                self._ask(built, tensors)
            return built(*tensors)

        return run

    def built(self) -> list[BuiltPart]:
        """Return the tails that are kept, whether they have been built or not."""
        with self._lock:
            return list(self._built.values())

    def close(self) -> None:
        """End the thread after what it builds now."""
        self._jobs.put(None)

    def measure(self, eager: LayerProfile) -> None:
        """Begin to measure what heads and tails take, unless that has begun already.

        Args:
            eager: what the layers take in eager PyTorch here.
        """
        if self._measuring:
            return
        self._measuring = True

        def job() -> None:
            try:
                inputs = example_inputs(self._graph, place_of(self._graph.model))
                self.profile = fused_profile(
                    self._graph, self._backend, eager, inputs, repeats=_REPEATS, budget_s=_BUDGET_S
                ).to_json()
            except Exception:
                _logger.exception(
                    "what model %s takes by backend %s could not be measured; it is tried again when a device asks",
                    self._name,
                    self._backend.name,
                )
                self._measuring = False

        self._put(job)

    def _ask(self, built: BuiltPart, tensors: Sequence[Tensor]) -> None:
        # The tensors lie in a buffer that the next request overwrites.
        copies = [tensor.clone() for tensor in tensors]
        self._put(lambda: built.build(*copies))

    def _put(self, job: _Job) -> None:
        threads = torch.get_num_threads()  # of the thread that runs requests

        def run() -> None:
            torch.set_num_threads(threads)
            job()

        self._jobs.put(run)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"torchsurgeon-{self._name}-build", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            # What the model raises for these tensors was told to whoever sent them; it is built for others later.
            with torch.no_grad(), contextlib.suppress(Exception):
                job()
