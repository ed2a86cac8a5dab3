"""The threads that run a model's requests."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from torchsurgeon.models.threads import ThreadSettings, process_threads
from torchsurgeon.serve.failure import OncePerPeriod
from torchsurgeon.serve.fairness import FairQueue, Place

T = TypeVar("T")

_logger = logging.getLogger(__name__)
_logger.addFilter(OncePerPeriod())

# Where the server's own jobs belong.
_OWN = Place()
# How long now() waits for a quick job in the worker's thread, which ends long before that.
_WAIT_S = 5e-3
# So many kinds run together at most. Each is compared with all others, while nothing can be queued.
_MOST_KINDS = 8


class ClosedError(Exception):
    """A job was handed to a worker that is closed."""


class Group(Protocol):
    """Runs jobs together that are of one kind, or of kinds that belong together."""

    def limit(self, kind: object) -> int:
        """Return how many waiting jobs of a kind to run together at most."""

    def limit_of_several(self) -> int:
        """Return how many waiting jobs of several kinds to run together at most."""

    def joins(self, kind: object, other: object) -> bool:
        """Return whether jobs of two kinds may run together."""

    def answer_together(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Return the result of each job, or the exception that it raises."""

    def weights(self, requests: Sequence[Any]) -> Sequence[float]:
        """Return in which ratio jobs share the time that they took together; the weights are positive."""


class _Item(NamedTuple):
    """A job that waits.

    Attributes:
        place: where it belongs among those that wait.
        pauses: what the other threads have to run while it runs.
    """

    future: Future[Any]
    job: Callable[[], Any]
    quick: bool
    kind: object = None
    load: Any = None
    place: Place = _OWN
    pauses: Sequence[_Item] = ()

    @property
    def own(self) -> bool:
        """Whether it is one of the server's own jobs."""
        return self.place.client is None


class Worker:
    """Threads that run jobs in the order of a ``FairQueue``, without gradients.

    With one thread, which is the default, jobs never run at the same time: ``_running`` is held while a job runs, and
    ``now()`` takes it too.

    Args:
        name: the threads' name.
        concurrency: how many threads there are.
        group: runs jobs of one kind together; None to run each alone.

    Attributes:
        settings: with how many CPU threads jobs run, and whether they flush denormal numbers: as the thread does that
            makes the worker. ``follow()`` takes a number over that the process has set since.
        concurrency: as given.
    """

    def __init__(self, name: str, concurrency: int = 1, group: Group | None = None) -> None:
        self.settings = ThreadSettings.here()
        self.follow()
        self.concurrency = concurrency
        self._running = threading.Lock() if concurrency == 1 else None
        self._turn: AbstractContextManager[object] = self._running or nullcontext()
        self._group = group
        # What waits, and a token for each of them: True, or None for a thread that is to end. Of several that are taken
        # at once, the tokens stay and are found to be used. How many of them are the server's own jobs.
        self._waiting: FairQueue[_Item] = FairQueue()
        self._own = 0
        # What threads take before anything that waits.
        self._pauses: deque[_Item] = deque()
        self._tokens: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._slow = 0
        self._closed = False
        names = [name] if concurrency == 1 else [f"{name}-{i}" for i in range(concurrency)]
        self._threads = [threading.Thread(target=self._run, name=one, daemon=True) for one in names]
        for thread in self._threads:
            thread.start()

    def follow(self) -> None:
        """Run later jobs with as many CPU threads as the process is set to now."""
        self.settings = self.settings._replace(threads=process_threads())

    def submit(
        self,
        job: Callable[[], T],
        *,
        quick: bool = False,
        kind: object = None,
        load: object = None,
        place: Place = _OWN,
    ) -> Future[T]:
        """Queue a job, and return the future of its result.

        Args:
            job: the job.
            quick: whether it is expected to be quick, so that ``now()`` may wait for it.
            kind: what it has in common with jobs that it may run together with; None to run alone.
            load: what the group needs for it.
            place: where it belongs among those that wait.

        Raises:
            ClosedError: the worker is closed.
        """
        future: Future[T] = Future()
        with self._counting:
            self._check_open()
            self._slow += not quick
            self._put(_Item(future, job, quick, kind, load, place))
            self._tokens.put(True)
        return future

    def submit_alone(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job that measures, during which no other job runs."""
        if self.concurrency == 1:
            return self.submit(job)
        future: Future[T] = Future()
        together = threading.Barrier(self.concurrency)
        over = threading.Event()

        def measure() -> None:
            together.wait()
            try:
                _fulfil(future, job)
            finally:
                over.set()

        def pause() -> None:
            together.wait()
            over.wait()

        # Each has a future of its own, since all would wait for ever for one that a caller has cancelled. Once the job
        # is taken, its pauses come before anything else. Otherwise its thread would wait for others that go on running
        # requests, or that wait for the threads of another such job.
        pauses = [_Item(Future(), pause, False) for _ in range(self.concurrency - 1)]
        with self._counting:
            self._check_open()
            self._slow += self.concurrency
            self._put(_Item(Future(), measure, False, pauses=pauses))
            for _ in range(self.concurrency):
                self._tokens.put(True)
        return future

    @property
    def waiting(self) -> int:
        """How many jobs wait, without the server's own."""
        return len(self._waiting) - self._own

    def ahead_of(self, place: Place) -> int:
        """Return how many of the jobs that wait would run before one of this place."""
        with self._counting:
            return self._waiting.ahead_of(place)

    def evict_for(self, place: Place, error: Exception) -> bool:
        """Have the job that has to make room for one of this place raise ``error``; False where none has to."""
        with self._counting:
            item = self._waiting.evict_for(place)
            if item is None:
                return False
            self._slow -= not item.quick
        if item.future.set_running_or_notify_cancel():
            item.future.set_exception(error)
        return True

    def who_waits(self) -> tuple[int, dict[str, int]]:
        """Return how many clients have jobs waiting, and how many jobs of each priority wait."""
        with self._counting:
            return self._waiting.clients(), self._waiting.by_priority()

    def now(self, job: Callable[[], T]) -> T | None:
        """Run a quick job in the calling thread and return its result; None where a slow job runs or waits.

        Quick jobs that run or wait are no reason to queue this one too. Under load the queue would never be empty, and
        every job would be handed to a thread, which doubles the processor time of a small request.

        It is also None where the calling thread records gradients: to turn that off and on again would take a tenth of
        a small request's time.
        """
        if torch.is_grad_enabled() or self._slow:
            return None
        if self._running is None:
            self.settings.adopt()
            return job()
        if not self._running.acquire(timeout=_WAIT_S):
            return None
        try:
            self.settings.adopt()
            return job()
        finally:
            self._running.release()

    def close(self) -> None:
        """End the threads after the jobs that are queued, and take no more of them."""
        with self._counting:
            self._closed = True
            for _ in self._threads:
                self._tokens.put(None)

    def _put(self, item: _Item) -> None:
        self._own += item.own
        self._waiting.put(item, item.place)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError

    def _ended(self, item: _Item, ran_s: float) -> None:
        """Take notice that a job has ended, and charge its client for how long it ran, however it ended."""
        with self._counting:
            self._slow -= not item.quick
            if not item.own:
                self._waiting.charge(item.place, ran_s)

    def _run(self) -> None:
        while self._tokens.get() is not None:
            items = self._take()
            if len(items) == 1:
                _fulfil(items[0].future, partial(self._in_turn, items[0].job), partial(self._ended, items[0]))
            elif items and self._group is not None:
                self._run_together(items, self._group)
            # While it waits for the next job, the thread must not keep the buffers of the last one alive.
            del items

    def _take(self) -> list[_Item]:
        """Return the job whose turn it is, with those that are to run together with it."""
        with self._counting:
            if self._pauses:
                return [self._pauses.popleft()]
            if not self._waiting:
                return []
            first = self._waiting.take_first()
            self._own -= first.own
            self._pauses.extend(first.pauses)
            if first.kind is None or self._group is None:
                return [first]
            try:
                taken = self._mates(first, self._group)
            except Exception:
                # Otherwise the thread would end, and the request would never be answered.
                _logger.exception("what could run together with a request was not found out, so it runs alone")
                return [first]
            if taken:
                self._waiting.take(taken)
                self._own -= sum(item.own for item in taken)
            return [first, *taken]

    def _mates(self, first: _Item, group: Group) -> list[_Item]:
        """Return the jobs that are to run together with the first one."""
        mates = [item for item in self._waiting if item.kind == first.kind]
        taken = mates[: self._share(mates, group.limit(first.kind))]
        if len(taken) == len(mates):
            # Others fill the batch that these leave room in.
            others = self._others(first, group)
            if others:
                both = [*mates, *others]
                taken = max(taken, both[: self._share(both, group.limit_of_several())], key=len)
        return taken

    def _share(self, mates: Sequence[_Item], limit: int) -> int:
        """Return how many of the jobs that wait run together with the first one; other threads get their share."""
        return min(-(-(len(mates) + 1) // self.concurrency), limit) - 1

    def _others(self, first: _Item, group: Group) -> list[_Item]:
        """Return the jobs of other kinds that may all run together with the first one."""
        joined, known = [first.kind], {first.kind}
        for item in self._waiting:
            if item.kind is None or item.kind in known or len(joined) == _MOST_KINDS:
                continue
            known.add(item.kind)
            if all(group.joins(kind, item.kind) for kind in joined):
                joined.append(item.kind)
        others = joined[1:]
        return [item for item in self._waiting if item.kind in others]

    def _run_together(self, items: Sequence[_Item], group: Group) -> None:
        live = [item for item in items if item.future.set_running_or_notify_cancel()]
        error: BaseException | None = None
        results: Sequence[Any] = ()
        begun_s = time.perf_counter()
        try:
            if live:
                results = self._in_turn(partial(group.answer_together, [item.load for item in live]))
        except BaseException as raised:
            error = raised
        ran_s = time.perf_counter() - begun_s
        weights = group.weights([item.load for item in live])
        shares_s = {id(item): ran_s * weight / sum(weights) for item, weight in zip(live, weights, strict=True)}
        for item in items:
            self._ended(item, shares_s.get(id(item), 0.0))
        for item, result in zip(live, results or [error] * len(live), strict=True):
            if isinstance(result, BaseException):
                item.future.set_exception(result)
            else:
                item.future.set_result(result)

    def _in_turn(self, job: Callable[[], T]) -> T:
        with self._turn, torch.no_grad():
            self.settings.adopt()
            return job()


def _fulfil(future: Future[T], job: Callable[[], T], ended: Callable[[float], None] = lambda ran_s: None) -> None:
    """Run a job unless its future is cancelled, and give the future its result.

    Args:
        future: the future.
        job: the job.
        ended: called before that with the seconds that the job ran.
    """
    if not future.set_running_or_notify_cancel():
        ended(0.0)
        return
    begun_s = time.perf_counter()
    try:
        result = job()
    except BaseException as error:
        ended(time.perf_counter() - begun_s)
        future.set_exception(error)
    else:
        ended(time.perf_counter() - begun_s)
        future.set_result(result)
