"""The thread that runs a model's requests, one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Worker:
    """One thread that runs what it is given, in order and without gradients.

    A model has one, so its layers never run concurrently.
    """

    def __init__(self, name: str) -> None:
        self._running = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def now(self, job: Callable[[], T]) -> T | None:
        """Run ``job`` in the calling thread if nothing else runs or waits; None if something does.

        None also where gradients are recorded: to turn that off and on again is a tenth of a small request.
        """
        if torch.is_grad_enabled() or not self._jobs.empty() or not self._running.acquire(blocking=False):
            return None
        try:
            return job()
        finally:
            self._running.release()

    def close(self) -> None:
        """Let what is queued finish, then end the thread."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._running, torch.no_grad():
                    result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # The thread must not keep the last request's buffers while it waits for the next.
            del item, future, job
            result = None
