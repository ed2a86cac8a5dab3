"""Inferences in a stream: the head of one runs while those before it are on the uplink or in their tails."""

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

# Each has a request of its own under way, and these have no more threads.
MOST_IN_FLIGHT = MOST_THREADS
# A head or a tail that has begun here is not interrupted.
_JOIN_S = 60.0


class Begun(Protocol):
    """An inference whose head has run."""

    def result(self) -> Any:
        """Wait for the model's result."""

    def cancel(self) -> None:
        """Make :meth:`result` raise soon."""


class Stream:
    """Runs inferences side by side: heads one after the other, in one thread, and in others what comes after them.

    At most ``depth`` are between the beginning of their head and their answer; the next waits for one of them. The
    threads are made when they are needed. Thread-safe.
    """

    def __init__(self, depth: int) -> None:
        self._room = threading.Semaphore(depth)
        self._heads, self._answers = Pool("torchsurgeon-heads", 1), Pool("torchsurgeon-answers", depth)
        self._unanswered: set[Future[Any]] = set()
        self._process = os.getpid()

    def submit(self, begin: Callable[[], Begun]) -> Future[Any]:
        """Return the future answer of what ``begin`` begins; it can be cancelled until then.

        Raises :class:`~torchsurgeon.errors.ServerUnavailableError` after :meth:`close`.
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
        """Cancel what has not begun, give up the rest, and end the threads. Closing twice is harmless."""
        if not self.here:
            return
        for future in self._unanswered.copy():
            future.cancel()
        # All are told before any is waited for, since an interrupt may end the waiting. Futures that were cancelled are
        # passed over by the heads' thread, which tells whoever waits for them.
        self._heads.end(drain=True)
        self._answers.end()
        if self._heads.here or self._answers.here:
            # A head, or what a future calls: nobody waits in the threads that are waited for.
            return
        self._answers.join(_JOIN_S)
        self._heads.join(_JOIN_S)
        for future in self._unanswered.copy():
            with suppress(InvalidStateError):
                future.set_exception(ServerUnavailableError("the SplitModule has been closed"))

    @property
    def here(self) -> bool:
        """Whether this is the process whose threads these are, and not one that was forked off."""
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
    """Return the answers of what each of ``begins`` begins, in their order; what raises ends them, after the answers
    before it.

    The next is taken, in the thread that asks for answers, when less than ``depth`` are in flight and the next answer
    is not there yet. Closing the iterator gives up what is in flight.

    Raises :class:`~torchsurgeon.errors.AdaptError` for a depth that cannot be.
    """
    if not (isinstance(depth, int) and 1 <= depth <= MOST_IN_FLIGHT):
        raise AdaptError(f"a depth of {depth!r} cannot be: give how many may be in flight, 1 to {MOST_IN_FLIGHT}")
    return _in_order(iter(begins), depth)


def _in_order(begins: Iterator[Callable[[], Begun]], depth: int) -> Iterator[Any]:
    flying: deque[Future[Any]] = deque()
    ended: Exception | None = None
    stream = Stream(depth)
    try:
        while ended is None or flying:
            if not stream.here:
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
    """What a call finds in the thread that makes it, and an answer depends on: autocast, CUDA's stream with the inputs,
    and its context, in which spans have their parents."""

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
        """Call ``function`` as if there."""
        with ExitStack() as stack:
            for entered in self._entered:
                stack.enter_context(entered())
            return self._context.run(function)
