"""Calls in a stream: the head of one runs while those before it are on the uplink or in their tails."""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, Protocol, TypeVar

import torch

from torchsurgeon.errors import AdaptError, ServerUnavailableError
from torchsurgeon.runtime.pool import MOST_THREADS, Pool

T = TypeVar("T")

# Each call in flight has a request of its own, and there are no more threads for requests.
MOST_IN_FLIGHT = MOST_THREADS
# A head or a tail that runs on the device is not interrupted, so closing waits this long for it.
_JOIN_S = 60.0


class Begun(Protocol):
    """A call whose head has run."""

    def result(self) -> Any:
        """Wait for the model's result."""

    def cancel(self) -> None:
        """Make ``result()`` raise soon."""


class Stream:
    """Runs calls side by side: their heads one after the other in one thread, what follows in others. Thread-safe.

    At most ``depth`` calls are between the beginning of their head and their answer; the next waits for one of them.
    The threads are started when they are needed.
    """

    def __init__(self, depth: int) -> None:
        self._room = threading.Semaphore(depth)
        self._heads, self._answers = Pool("torchsurgeon-heads", 1), Pool("torchsurgeon-answers", depth)
        self._unanswered: set[Future[Any]] = set()
        self._process = os.getpid()

    def submit(self, begin: Callable[[], Begun]) -> Future[Any]:
        """Return the future answer of the call that ``begin`` begins. It can be cancelled until its head begins.

        Raises:
            ServerUnavailableError: the stream has been closed.
        """
        future: Future[Any] = Future()
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        try:
            self._heads.submit(functools.partial(self._head, future, begin, _Surroundings()))
        except ServerUnavailableError:
            self._unanswered.discard(future)
            raise
        return future

    def close(self) -> None:
        """Cancel calls that have not begun, give up the others, and end the threads. Closing twice is harmless."""
        if not self.is_owner_process:
            return
        for future in self._unanswered.copy():
            future.cancel()
        # All threads are asked to end before any is waited for, since an interrupt may end the waiting. The heads'
        # thread passes over cancelled futures, and so wakes whoever waits for them.
        self._heads.end(drain=True)
        self._answers.end()
        if self._heads.is_worker or self._answers.is_worker:
            # Called from a head or from a future's callback, in a thread that the others below would wait for.
            return
        self._answers.join(_JOIN_S)
        self._heads.join(_JOIN_S)
        for future in self._unanswered.copy():
            with suppress(InvalidStateError):
                future.set_exception(ServerUnavailableError("the SplitModule has been closed"))

    @property
    def is_owner_process(self) -> bool:
        """Whether this is the process whose threads these are, and not one forked from it."""
        return os.getpid() == self._process

    def _head(self, future: Future[Any], begin: Callable[[], Begun], around: _Surroundings) -> None:
        self._room.acquire()
        begun: Begun | None = None
        try:
            if future.set_running_or_notify_cancel():
                begun = around.run(begin)
                self._answers.submit(functools.partial(self._answer, future, begun, around), begun.cancel)
        except BaseException as error:
            if begun is not None:
                begun.cancel()
                begun = None
            future.set_exception(error)
        finally:
            if begun is None:
                self._room.release()

    def _answer(self, future: Future[Any], begun: Begun, around: _Surroundings) -> None:
        try:
            answer = around.run(begun.result)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(answer)
        finally:
            self._room.release()


def in_order(begins: Iterable[Callable[[], Begun]], depth: int) -> Iterator[Any]:
    """Yield the answers of the calls that ``begins`` begin, in their order.

    The next call is begun, in the thread that asks for answers, while fewer than ``depth`` are in flight and the next
    answer has not come. An error ends the iterator after the answers before it. Closing the iterator gives up the calls
    in flight.

    Args:
        begins: functions that each run the head of one call.
        depth: how many calls may be in flight, 1 to 16.

    Raises:
        AdaptError: the depth is not within 1 to 16.
    """
    if not (isinstance(depth, int) and 1 <= depth <= MOST_IN_FLIGHT):
        raise AdaptError(f"depth is how many calls may be in flight, 1 to {MOST_IN_FLIGHT}; got {depth!r}")
    return _in_order(iter(begins), depth)


def _in_order(begins: Iterator[Callable[[], Begun]], depth: int) -> Iterator[Any]:
    flying: deque[Future[Any]] = deque()
    ended: Exception | None = None
    stream = Stream(depth)
    try:
        while ended is None or flying:
            if not stream.is_owner_process:
                raise ServerUnavailableError(
                    "another process began this map, and this one was forked off: begin another"
                )
            while ended is None and len(flying) < depth and not (flying and flying[0].done()):
                try:
                    flying.append(stream.submit(next(begins)))
                except Exception as error:
                    ended = error
            if flying:
                yield flying.popleft().result()
        if not isinstance(ended, StopIteration):
            raise ended
    finally:
        stream.close()


class _Surroundings:
    """What an answer depends on in the thread that makes the call.

    These are autocast, the CUDA stream that computes the inputs, and the context, in which spans have their parents.
    """

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._entered: list[Callable[[], AbstractContextManager[Any]]] = [
            functools.partial(torch.autocast, kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]
        if torch.cuda.is_initialized():
            self._entered.append(functools.partial(torch.cuda.stream, torch.cuda.current_stream()))

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function`` with these surroundings."""
        with ExitStack() as stack:
            for entered in self._entered:
                stack.enter_context(entered())
            return self._context.run(function)
