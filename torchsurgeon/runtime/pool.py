"""A few threads for requests, so that whoever waits for an answer can do better things meanwhile."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from torchsurgeon.errors import ServerUnavailableError

T = TypeVar("T")

# As many as connections are kept; more requests at a time wait for one of these to end or be given up.
MOST_THREADS = 16
# A thread may be stuck in the resolver, which nothing interrupts; it is a daemon and is left behind.
_JOIN_S = 1.0


class Call(Generic[T]):
    """A function that runs in another thread, and how it ended."""

    __slots__ = ("_cancel", "_pending", "_work", "ended", "error", "value")

    def __init__(self, work: Callable[[], T], cancel: Callable[[], object] | None) -> None:
        self.ended = False
        self.value: T | None = None
        self.error: Exception | None = None
        self._work: Callable[[], T] | None = work
        self._cancel = cancel
        # A bare lock, which unlike an Event costs no Python code to wait for.
        self._pending = threading.Lock()
        self._pending.acquire()

    def run(self, before_end: Callable[[Call[T]], object] | None = None) -> None:
        """Call the function here; ``before_end`` is told before anybody who waits."""
        work, self._work = self._work, None
        try:
            if work is None:
                raise ServerUnavailableError("the request was given up before it began")
            self.value = work()
        except Exception as error:
            self.error = error
        if before_end is not None:
            before_end(self)
        self.ended = True
        self._pending.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; False if it has not come by then."""
        if not self.ended:
            if not self._pending.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)):
                return False
            self._pending.release()
        return True

    def answered(self) -> bool:
        """Whether it has ended well."""
        return self.ended and self.error is None

    def give_up(self) -> None:
        """Nobody waits for it any more: interrupt it, or do not begin."""
        self._work = None
        if self._cancel is not None:
            self._cancel()

    def result(self) -> T:
        """Return what the function returned, or raise what it raised; call it after the end."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Pool:
    """Daemon threads, made when they are needed and kept until :meth:`close`."""

    def __init__(self, name: str, most: int = MOST_THREADS) -> None:
        self._name, self._most = name, most
        # A garbage collection while it is held may find a module that nobody has, and close this pool.
        self._lock = threading.RLock()
        self._calls: queue.SimpleQueue[Call[Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: set[Call[Any]] = set()
        self._free = 0
        self._closed = False

    def submit(self, work: Callable[[], T], cancel: Callable[[], object] | None = None) -> Call[T]:
        """Run ``work`` in one of the threads; ``cancel`` interrupts it. Raises ServerUnavailableError once closed."""
        call = Call(work, cancel)
        with self._lock:
            if self._closed:
                raise ServerUnavailableError("the SplitModule has been closed")
            self._free -= 1
            if self._free < 0 and len(self._threads) < self._most:
                self._free += 1
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._running.add(call)
            self._calls.put(call)
            if self._closed:
                # By a collection just now; the thread is to end all the same.
                self.end()  # type: ignore[unreachable]
        return call

    def end(self, *, drain: bool = False) -> None:
        """Interrupt what runs, or to ``drain`` let it and what has been submitted run, and have the threads end."""
        with self._lock:
            self._closed = True
            running = () if drain else tuple(self._running)
            for _ in self._threads:
                self._calls.put(None)
        for call in running:
            call.give_up()

    def close(self, join_s: float = _JOIN_S) -> None:
        """Interrupt what runs, and end the threads, for which it waits so long. Closing twice is harmless."""
        self.end()
        self.join(join_s)

    @property
    def here(self) -> bool:
        """Whether this is one of the threads."""
        return threading.current_thread() in self._threads

    def join(self, join_s: float) -> None:
        """Wait for threads that are to end; one of them waits for none, or two might for each other."""
        if self.here:
            return
        end_s = time.monotonic() + join_s
        for thread in tuple(self._threads):
            # An interrupt may have come before it was started.
            if thread.ident is not None:
                thread.join(min(max(0.0, end_s - time.monotonic()), join_s))

    def _freed(self, call: Call[Any]) -> None:
        # Before the call ends, or who waited for it would be given another thread for the next one.
        with self._lock:
            self._running.discard(call)
            self._free += 1

    def _run(self) -> None:
        with torch.no_grad():
            while (call := self._calls.get()) is not None:
                call.run(self._freed)
                # The thread must not keep the last call's tensors while it waits for the next.
                del call
