"""The thread that runs a model's requests, one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from torchsurgeon.models.threads import ThreadSettings, process_threads

T = TypeVar("T")


class Worker:
    """One thread that runs jobs in order and without gradients.

    A model has one worker, so its layers never compete with each other for the processor. ``_running`` is held while a
    job runs, so that ``now()`` runs a job in another thread only while this one is idle.

    Args:
        name: the thread's name.

    Attributes:
        settings: with how many CPU threads jobs run, and whether they flush denormal numbers: as the thread does that
            makes the worker. ``follow()`` takes a number over that the process has set since.
    """

    def __init__(self, name: str) -> None:
        self.settings = ThreadSettings.here()
        self.follow()
        self._running = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def follow(self) -> None:
        """Run later jobs with as many CPU threads as the process is set to now."""
        self.settings = self.settings._replace(threads=process_threads())

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job, and return the future of its result."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def now(self, job: Callable[[], T]) -> T | None:
        """Run a job in the calling thread and return its result; None where another job runs or waits.

        It is also None where the calling thread records gradients: to turn that off and on again would take a tenth of
        a small request's time.
        """
        if torch.is_grad_enabled() or not self._jobs.empty() or not self._running.acquire(blocking=False):
            return None
        try:
            self.settings.adopt()
            return job()
        finally:
            self._running.release()

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._running, torch.no_grad():
                    self.settings.adopt()
                    result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # While it waits for the next job, the thread must not keep the buffers of the last one alive.
            del item, future, job
            result = None
