"""Calls in a stream: the head of one runs while those before it are on the uplink or in their tails."""

from __future__ import annotations

import atexit
import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, Protocol, TypeVar

import torch

from torchsurgeon._interrupts import Condition, NoThreadError, by_signal_handler, join_threads
from torchsurgeon.errors import AdaptError, ServerUnavailableError
from torchsurgeon.runtime.pool import MOST_THREADS, Pool, Task

T = TypeVar("T")

# Each call in flight has a request of its own, and there are no more threads for requests.
MOST_IN_FLIGHT = MOST_THREADS
# A head or a tail that runs on the device is not interrupted, so closing waits this long for it.
_JOIN_S = 60.0
# What a backend runs cannot even be stopped between two layers. Closing waits for its thread no longer than this.
_BRIEF_S = 0.1
# Threads that were left behind so. The interpreter must not end while they are in a backend's code.
_left: list[threading.Thread] = []


class Begun(Protocol):
    """A call whose head has run."""

    def result(self) -> Any:
        """Wait for the model's result."""

    def cancel(self) -> None:
        """Make ``result()`` raise soon."""


class Answering(Future[Any]):
    """The future answer of a call. A signal handler may raise while it is waited for.

    Attributes:
        cancelled_because: why the runtime has cancelled it; None if it has not, or if the caller has.
    """

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()
        self.cancelled_because: str | None = None
        self._ended: Task[None] = Task(_nothing, None)
        self.add_done_callback(lambda _: self._ended.end())

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer, and wait for it first; see ``concurrent.futures.Future.result()``.

        Raises:
            CancelledError: it was cancelled; the message says why, if the runtime has done so.
        """
        return self._outcome(super().result, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; the rest is as for ``result()``."""
        return self._outcome(super().exception, timeout)

    def _outcome(self, outcome: Callable[[float], T], timeout: float | None) -> T:
        # Not by the method of the base class, which loses what a handler raises at some of its instructions.
        self._ended.wait(threading.TIMEOUT_MAX if timeout is None else timeout)
        try:
            return outcome(0)
        except CancelledError:
            if self.cancelled_because is None:
                raise
            raise CancelledError(self.cancelled_because) from None


def _nothing() -> None:
    pass


class Stream:
    """Runs calls side by side: their heads one after the other in one thread, what follows in others. Thread-safe.

    At most ``depth`` calls are between the beginning of their head and their answer; the next waits for one of them.
    The threads are started when they are needed.

    Args:
        depth: see above.
        stoppable: whether what runs on the device can be stopped midway. If not, closing does not wait for it.
    """

    def __init__(self, depth: int, *, stoppable: bool = True) -> None:
        self._stoppable = stoppable
        self._room = threading.Semaphore(depth)
        self._heads, self._answers = Pool("torchsurgeon-heads", 1), Pool("torchsurgeon-answers", depth)
        self._unanswered: set[Answering] = set()
        self._process = os.getpid()

    def submit(self, begin: Callable[[], Begun]) -> Answering:
        """Return the future answer of the call that ``begin`` begins. It can be cancelled until its head begins.

        Where no thread can be started, the call runs in this thread, before this returns.

        Raises:
            ServerUnavailableError: the stream has been closed.
        """
        future, around = Answering(), _Surroundings()
        head = functools.partial(self._head, future, begin, around)
        try:
            future.add_done_callback(self._unanswered.discard)
            self._unanswered.add(future)
            self._heads.submit(head)
        except NoThreadError:
            head()
        except BaseException:
            future.cancel()
            raise
        return future

    def close(self, why: str = "the iterator of its answers has ended") -> None:
        """Cancel calls that have not begun, give up the others, and end the threads. Closing twice is harmless.

        Args:
            why: what has ended, for the futures of calls that have not begun.
        """
        if not self.is_owner_process:
            return
        for future in self._unanswered.copy():
            _cancel(future, why)
        # All threads are asked to end before any is waited for, since an interrupt may end the waiting. The heads'
        # thread passes over cancelled futures, and so wakes whoever waits for them.
        self._heads.end(drain=True)
        self._answers.end()
        if self._heads.is_worker or self._answers.is_worker:
            # Called from a head or from a future's callback, in a thread that the others below would wait for.
            return
        for pool in (self._answers, self._heads):
            left = pool.join(_JOIN_S if self._stoppable else _BRIEF_S)
            if not self._stoppable:
                _left.extend(left)
        for future in self._unanswered.copy():
            _fail(future, ServerUnavailableError(f"this call has not ended, and {why}"))

    @property
    def is_owner_process(self) -> bool:
        """Whether this is the process whose threads these are, and not one forked from it."""
        return os.getpid() == self._process

    def _head(self, future: Answering, begin: Callable[[], Begun], around: _Surroundings) -> None:
        self._room.acquire()
        begun: Begun | None = None
        try:
            if future.set_running_or_notify_cancel():
                begun = around.run(begin)
                answer = functools.partial(self._answer, future, begun, around)
                try:
                    self._answers.submit(answer, begun.cancel)
                except NoThreadError:
                    answer()
        except BaseException as error:
            if begun is not None:
                begun.cancel()
                begun = None
            future.set_exception(error)
        finally:
            if begun is None:
                self._room.release()

    def _answer(self, future: Answering, begun: Begun, around: _Surroundings) -> None:
        try:
            answer = around.run(begun.result)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(answer)
        finally:
            self._room.release()


def _cancel(future: Answering, why: str) -> None:
    future.cancelled_because = None if future.cancelled() else why
    if not future.cancel():
        future.cancelled_because = None


def _fail(future: Answering, error: Exception) -> None:
    # Unless it has ended meanwhile.
    with suppress(InvalidStateError):
        future.set_exception(error)


def in_order(begins: Iterable[Callable[[], Begun]], depth: int, *, stoppable: bool = True) -> Iterator[Any]:
    """Yield the answers of the calls that ``begins`` begin, in their order.

    The next call is begun, in the thread that asks for answers, while fewer than ``depth`` are in flight and the next
    answer has not come. An error ends the iterator after the answers before it. Closing the iterator gives up the calls
    in flight.

    Args:
        begins: functions that each run the head of one call.
        depth: how many calls may be in flight, 1 to 16.
        stoppable: as ``Stream`` takes it.

    Raises:
        AdaptError: the depth is not within 1 to 16.
    """
    if not (isinstance(depth, int) and 1 <= depth <= MOST_IN_FLIGHT):
        raise AdaptError(f"depth is how many calls may be in flight, 1 to {MOST_IN_FLIGHT}; got {depth!r}")
    return _in_order(iter(begins), depth, stoppable)


def _in_order(begins: Iterator[Callable[[], Begun]], depth: int, stoppable: bool) -> Iterator[Any]:
    flying: deque[Answering] = deque()
    ended: Exception | None = None
    stream = Stream(depth, stoppable=stoppable)
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
                    if by_signal_handler(error):
                        raise
                    ended = error
            if flying:
                yield flying.popleft().result()
        if not isinstance(ended, StopIteration):
            raise ended
    finally:
        try:
            stream.close()
        except BaseException:
            # A signal handler has raised: without this, threads could be left that nobody ends.
            stream.close()
            raise


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


def _wait_for_left() -> None:
    join_threads(_left, _JOIN_S)


atexit.register(_wait_for_left)
os.register_at_fork(after_in_child=_left.clear)
