"""Inferences in a stream: the head of one runs while those before it are on the uplink or in their tails."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from torchsurgeon.errors import AdaptError, ServerUnavailableError

MOST_IN_FLIGHT = 32

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Begin = Callable[[tuple[Any, ...], Mapping[str, Any]], Callable[[], Any]]
"""Runs the head of a call, and returns what waits for its answer."""


class Stream:
    """Runs calls side by side: heads one after the other, in one thread, and in others what comes after them.

    At most ``depth`` calls are between the beginning of their head and their answer; the next waits for one of them.
    Its threads are made when they are needed. Thread-safe.
    """

    def __init__(self, begin: Begin, depth: int) -> None:
        self._begin = begin
        self._room = threading.Semaphore(depth)
        self._heads = ThreadPoolExecutor(1, "torchsurgeon-heads")
        self._answers = ThreadPoolExecutor(depth, "torchsurgeon-answers")
        self._lock = threading.Lock()
        self._unanswered: set[Future[Any]] = set()
        self._closed = False

    def submit(self, call: Arguments) -> Future[Any]:
        """Return the future answer, which can be cancelled until its head begins.

        Raises :class:`~torchsurgeon.errors.ServerUnavailableError` after :meth:`close`.
        """
        future: Future[Any] = Future()
        # Deadlines belong to the caller's context, and what CUDA has queued so far to the caller's stream.
        context = contextvars.copy_context()
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        with self._lock:
            if self._closed:
                raise ServerUnavailableError("the SplitModule has been closed; make a new one")
            self._unanswered.add(future)
            self._heads.submit(self._head, future, call, context, stream)
        future.add_done_callback(self._unanswered.discard)
        return future

    def close(self) -> None:
        """Cancel what has not begun, and wait for the rest and the threads. Closing twice is harmless."""
        with self._lock:
            self._closed = True
            unanswered = list(self._unanswered)
        for future in unanswered:
            future.cancel()
        self._heads.shutdown()
        self._answers.shutdown()

    def _head(
        self, future: Future[Any], call: Arguments, context: contextvars.Context, stream: torch.cuda.Stream | None
    ) -> None:
        self._room.acquire()
        wait: Callable[[], Any] | None = None
        if future.set_running_or_notify_cancel():
            try:
                with torch.cuda.stream(stream):
                    wait = context.run(self._begin, *call)
            except BaseException as error:
                future.set_exception(error)
        if wait is None:
            self._room.release()
        else:
            self._answers.submit(self._answer, future, wait, context, stream)

    def _answer(
        self,
        future: Future[Any],
        wait: Callable[[], Any],
        context: contextvars.Context,
        stream: torch.cuda.Stream | None,
    ) -> None:
        try:
            with torch.cuda.stream(stream):
                answer = context.run(wait)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(answer)
        finally:
            self._room.release()


def in_order(begin: Begin, calls: Iterable[Arguments], depth: int) -> Iterator[Any]:
    """Return the answers of ``calls``, in their order; what raises ends them, after the answers before it.

    A call is taken from ``calls``, in the thread that asks for answers, when less than ``depth`` are in flight and the
    next answer is not there yet. Closing the iterator cancels what has not begun and waits for the rest.

    Raises :class:`~torchsurgeon.errors.AdaptError` for a depth that cannot be.
    """
    if not (isinstance(depth, int) and 1 <= depth <= MOST_IN_FLIGHT):
        raise AdaptError(f"a depth of {depth!r} cannot be: give how many may be in flight, 1 to {MOST_IN_FLIGHT}")
    return _in_order(begin, iter(calls), depth)


def _in_order(begin: Begin, calls: Iterator[Arguments], depth: int) -> Iterator[Any]:
    flying: deque[Future[Any]] = deque()
    ended: Exception | None = None
    stream = Stream(begin, depth)
    try:
        while ended is None or flying:
            while ended is None and len(flying) < depth and not (flying and flying[0].done()):
                try:
                    flying.append(stream.submit(next(calls)))
                except Exception as error:
                    ended = error
            if flying:
                yield flying.popleft().result()
        if not isinstance(ended, StopIteration):
            raise ended
    finally:
        stream.close()
