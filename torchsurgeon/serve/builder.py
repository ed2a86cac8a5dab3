"""Tails that a backend runs on the server, built in a thread of their own while requests run in eager PyTorch."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.backends import Backend, BuiltPart, Part
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.profiling import LayerProfile, example_inputs
from torchsurgeon.profiling.fused import fused_profile
from torchsurgeon.serve.recent import Recent
from torchsurgeon.serve.tails import place_of
from torchsurgeon.tracing.graph import LayerGraph

_logger = logging.getLogger(__name__)

# How long the parts of a model are measured, and how often each.
_BUDGET_S, _REPEATS = 10.0, 7
# So many jobs wait at most, since each keeps the tensors of a request. A tail that finds no place is built when a later
# request asks for it.
_MOST_WAITING = 8

_Job = Callable[[], object]


@dataclass
class _Tail:
    """A tail, and whether it waits to be built or has been built."""

    built: BuiltPart
    asked: bool = False


class TailBuilder:
    """Has a backend build the tails for which requests ask. Thread-safe.

    Args:
        name: the model's name.
        graph: the traced model.
        backend: what runs its tails.
        capacity: how many built tails to keep.

    Attributes:
        profile: the JSON of what heads and tails take by the backend; None until it has been measured.
        measuring: whether that has begun.
    """

    def __init__(self, name: str, graph: LayerGraph, backend: Backend, capacity: int) -> None:
        backend.check(graph)
        self._name, self._graph, self._backend = name, graph, backend
        self._said: set[str] = set()
        self._tails: Recent[tuple[str, ...], _Tail] = Recent(capacity)
        self.profile: dict[str, Any] | None = None
        self.measuring = False
        self._closed = False
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
            found = self._tails.get(names)
            if found is None or found.built.part.segment is not tail:
                part = Part.of_tail(self._graph, names, tail)
                found = _Tail(BuiltPart(part, self._backend, self._said))
                self._tails.put(names, found)
        kept = found

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            if not kept.asked:
                self._ask(kept, tensors)
            return kept.built(*tensors)

        return run

    def built(self) -> list[BuiltPart]:
        """Return the tails that are kept, whether they have been built or not."""
        return [tail.built for tail in self._tails.values()]

    def close(self) -> None:
        """End the thread after what it builds now."""
        self._closed = True
        self._jobs.put(None)

    def measure(self, eager: LayerProfile) -> None:
        """Begin to measure what heads and tails take, unless that has begun already.

        Args:
            eager: what the layers take in eager PyTorch here.
        """
        if self.measuring:
            return
        self.measuring = True

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
                self.measuring = False

        self._put(job)

    def _ask(self, tail: _Tail, tensors: Sequence[Tensor]) -> None:
        """Have a tail built for tensors like these, unless that has been asked for, or too many wait."""
        with self._lock:
            if tail.asked or self._jobs.qsize() >= _MOST_WAITING:
                return
            tail.asked = True
        # The tensors lie in a buffer that the next request overwrites.
        copies = [tensor.clone() for tensor in tensors]

        def job() -> None:
            try:
                tail.built.build(*copies)
            finally:
                # What the model raises for these tensors was told to whoever sent them. It is built for others later.
                tail.asked = tail.built.tried

        self._put(job)

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
        while (job := self._jobs.get()) is not None and not self._closed:
            with torch.no_grad(), contextlib.suppress(Exception):
                job()
