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

# How long now() waits for a quick job in the worker's thread, which ends long before that.
_WAIT_S = 5e-3


class Worker:
    """One thread that runs jobs in order and without gradients.

    A model has one worker, so its layers never compete with each other for the processor. ``_running`` is held while a
    job runs, so that ``now()`` never runs a job in another thread at the same time.

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
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any], bool] | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._slow = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def follow(self) -> None:
        """Run later jobs with as many CPU threads as the process is set to now."""
        self.settings = self.settings._replace(threads=process_threads())

    def submit(self, job: Callable[[], T], *, quick: bool = False) -> Future[T]:
        """Queue a job, and return the future of its result.

        Args:
            job: the job.
            quick: whether it is expected to be quick, so that ``now()`` may wait for it.
        """
        future: Future[T] = Future()
        if not quick:
            self._count_slow(1)
        self._jobs.put((future, job, quick))
        return future

    def _count_slow(self, change: int) -> None:
        with self._counting:
            self._slow += change

    def now(self, job: Callable[[], T]) -> T | None:
        """Run a quick job in the calling thread and return its result; None where a slow job runs or waits.

        Quick jobs that run or wait are no reason to queue this one too. Under load the queue would never be empty, and
        every job would be handed to the thread, which doubles the processor time of a small request.

        It is also None where the calling thread records gradients: to turn that off and on again would take a tenth of
        a small request's time.
        """
        if torch.is_grad_enabled() or self._slow or not self._running.acquire(timeout=_WAIT_S):
            return None
        try:
            self.settings.adopt()
            return job()
        finally:
            self._running.release()

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        self._jobs.put(None)

    def _ended(self, quick: bool) -> None:
        if not quick:
            self._count_slow(-1)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job, quick = item
            if not future.set_running_or_notify_cancel():
                self._ended(quick)
                continue
            try:
                with self._running, torch.no_grad():
                    self.settings.adopt()
                    result = job()
            except BaseException as error:
                self._ended(quick)
                future.set_exception(error)
            else:
                self._ended(quick)
                future.set_result(result)
            # While it waits for the next job, the thread must not keep the buffers of the last one alive.
            del item, future, job
            result = None
