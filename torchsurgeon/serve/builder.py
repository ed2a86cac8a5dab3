"""Tails that a backend runs on the server, built in a thread of their own while requests run in eager PyTorch."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchsurgeon.backends import Backend, BuiltPart, Part
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.tracing.graph import LayerGraph

_Wanted = tuple[BuiltPart, Sequence[Tensor], int]


class TailBuilder:
    """Has a backend build the tails for which requests ask. Thread-safe.

    Args:
        name: the model's name.
        graph: the traced model.
        backend: what runs its tails.
        capacity: how many built tails to keep.
    """

    def __init__(self, name: str, graph: LayerGraph, backend: Backend, capacity: int) -> None:
        self._name, self._graph, self._backend, self._capacity = name, graph, backend, capacity
        self._said: set[str] = set()
        self._built: dict[tuple[str, ...], BuiltPart] = {}
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
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
        self._wanted.put(None)

    def _ask(self, built: BuiltPart, tensors: Sequence[Tensor]) -> None:
        # The tensors lie in a buffer that the next request overwrites. The number of threads is that of this thread.
        self._wanted.put((built, [tensor.clone() for tensor in tensors], torch.get_num_threads()))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"torchsurgeon-{self._name}-build", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            built, tensors, threads = wanted
            torch.set_num_threads(threads)
            # What the model raises for these tensors was told to whoever sent them; it is built for others later.
            with torch.no_grad(), contextlib.suppress(Exception):
                built.build(*tensors)
