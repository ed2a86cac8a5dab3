"""A few threads for requests, so that the calling thread can run the tail itself when an answer is late."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from torchsurgeon._interrupts import NoThreadError, by_signal_handler, join_threads, start_thread
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.models.threads import ThreadSettings

T = TypeVar("T")

# Further tasks wait for one of these threads.
MOST_THREADS = 16
# A thread may be stuck in the name resolver, which nothing interrupts; it is a daemon and is left behind.
_JOIN_S = 1.0


class Task(Generic[T]):
    """A function that runs in another thread, and how it ended.

    Args:
        work: the function.
        cancel: called to interrupt it; None where nothing can.

    Attributes:
        settings: those of the thread that it runs for, which another thread takes over; None where it runs in the
            thread that makes the task.
        ended: whether it has returned or raised.
        value: what it returned.
        error: what it raised.
    """

    __slots__ = ("_cancel", "_pending", "_untaken", "_work", "ended", "error", "settings", "value")

    def __init__(self, work: Callable[[], T] | None, cancel: Callable[[], object] | None) -> None:
        self.settings: ThreadSettings | None = None
        self.ended = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self._work = work
        self._cancel = cancel
        self._untaken = [True]
        # A bare lock, which unlike an Event costs no Python code to wait for.
        self._pending = threading.Lock()
        self._pending.acquire()

    def run(self, before_end: Callable[[Task[T]], object]) -> None:
        """Call the function in this thread of a pool; ``before_end`` is called before whoever waits goes on.

        A task that another thread runs, or has run, is left alone.
        """
        try:
            self._untaken.pop()
        except IndexError:
            return
        try:
            self._call()
        except BaseException as error:
            self.error = error
        before_end(self)
        self.end()

    def fail(self, error: Exception) -> None:
        """End it with ``error``, without having run it."""
        self._work, self.error = None, error
        self.end()

    def _call(self) -> None:
        work, self._work = self._work, None
        if work is None:
            raise ServerUnavailableError("the request was given up before it began")
        if self.settings is not None:
            self.settings.adopt()
        self.value = work()

    def end(self) -> None:
        """Let whoever waits go on."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        """Let the next thread that waits go on, once this has ended."""
        if not self.ended:
            return
        try:
            self._pending.release()
        except RuntimeError as error:
            # Another thread that waits has released it just before.
            if by_signal_handler(error):
                raise

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end, and return whether it came within ``timeout_s``."""
        if not self.ended:
            try:
                self._pending.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))
            finally:
                # Whether acquired or not, and also where a signal handler raises: another thread may wait, too.
                self._wake()
        return self.ended

    @property
    def here(self) -> bool:
        """Whether it goes on only while the thread that made it waits for it."""
        return False

    def hand_over(self) -> None:
        """Let it go on while the thread that made it does something else, as it does anyway."""

    def answered(self) -> bool:
        """Return whether it has ended without an error."""
        return self.ended and self.error is None

    def interrupt(self) -> None:
        """Interrupt it, or keep it from beginning. Any thread may call this, whatever it has just been doing."""
        self._work = None
        if self._cancel is not None:
            self._cancel()

    def give_up(self) -> None:
        """Interrupt it, or keep it from beginning: nobody waits for it any more."""
        self.interrupt()

    def result(self) -> T:
        """Return what the function returned, or raise what it raised; to be called after the end."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Ended(Generic[T]):
    """What has ended, or has not even begun, in the thread that asks for its end. It has the methods of a ``Task``.

    Args:
        value: what it returned.
        error: what it raised, or why it was not begun.
    """

    __slots__ = ("error", "value")
    ended, here = True, False

    def __init__(self, value: T | None = None, error: BaseException | None = None) -> None:
        self.value, self.error = value, error

    def wait(self, timeout_s: float) -> bool:
        """Return True at once."""
        return True

    def answered(self) -> bool:
        """Return whether it has ended without an error."""
        return self.error is None

    def hand_over(self) -> None:
        """Do nothing: nothing is under way."""

    def give_up(self) -> None:
        """Do nothing: nothing is under way."""

    def result(self) -> T:
        """Return what it returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Pool:
    """Daemon threads, started when they are needed and kept until ``close()``. Thread-safe.

    Args:
        name: the name of each thread.
        most: how many threads there may be.
    """

    def __init__(self, name: str, most: int = MOST_THREADS) -> None:
        self._name, self._most = name, most
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Begin without threads; those of the parent do not exist in a forked child."""
        # Reentrant: a garbage collection while it is held may finalize a dropped module, which closes this pool.
        self._lock = threading.RLock()
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Sets rather than counts: what a signal handler raises in the middle of a change leaves no wrong number behind.
        self._given: set[Task[Any]] = set()
        self._watched: set[Callable[[], object]] = set()
        self._closed = False

    def submit(self, work: Callable[[], T], cancel: Callable[[], object] | None = None) -> Task[T]:
        """Run ``work`` in one of the threads.

        Args:
            work: called without gradients, with the settings that PyTorch keeps for the calling thread.
            cancel: called, if given, to interrupt the work.

        Raises:
            NoThreadError: the pool has no thread, and none could be started.
            ServerUnavailableError: the pool has been closed.
        """
        task = Task(work, cancel)
        self.take(task)
        return task

    def take(self, task: Task[Any]) -> None:
        """Run a task in one of the threads, with the settings that PyTorch keeps for the calling thread.

        Raises:
            NoThreadError: the pool has no thread, and none could be started.
            ServerUnavailableError: the pool has been closed.
        """
        task.settings = ThreadSettings.here()
        try:
            with self._lock:
                if self._closed:
                    raise ServerUnavailableError("the SplitModule has been closed; make a new one")
                self._given.add(task)
                self._watched.discard(task.interrupt)
                if len(self._threads) < min(len(self._given), self._most):
                    self._start()
                self._tasks.put(task)
                if self._closed:
                    # A garbage collection in this very method has closed the pool.
                    raise ServerUnavailableError("the SplitModule has been closed; make a new one")
        except BaseException as error:
            if isinstance(error, NoThreadError):
                self._given.discard(task)
            else:
                # A signal handler may have raised at any moment, perhaps after a thread has taken the task. Only the
                # thread that runs it knows when it is free again, so one has to run it, and does so once.
                task.give_up()
                self._tasks.put(task)
            raise

    def run_here(self, work: Callable[[], T], cancel: Callable[[], object]) -> Ended[T]:
        """Run ``work`` in the calling thread, and return how it ended. What a signal handler raises is raised.

        Args:
            work: the function.
            cancel: interrupts it; called by whoever ends the pool.

        Raises:
            ServerUnavailableError: the pool has been closed.
        """
        try:
            self.watch(cancel)
            try:
                return Ended(work())
            except Exception as error:
                if by_signal_handler(error):
                    raise
                return Ended(error=error)
        finally:
            self.forget(cancel)

    def watch(self, cancel: Callable[[], object]) -> None:
        """Have whoever ends the pool interrupt what the calling thread runs itself, until ``forget()``.

        Args:
            cancel: interrupts it.

        Raises:
            ServerUnavailableError: the pool has been closed.
        """
        with self._lock:
            if self._closed:
                raise ServerUnavailableError("the SplitModule has been closed; make a new one")
            self._watched.add(cancel)

    def forget(self, cancel: Callable[[], object]) -> None:
        """Undo ``watch()``. Undoing it twice is harmless."""
        self._watched.discard(cancel)

    @property
    def crowded(self) -> bool:
        """Whether as many tasks are under way as there may be threads."""
        return len(self._given) + len(self._watched) >= self._most

    @property
    def idle(self) -> bool:
        """Whether no task is under way."""
        return not self._given and not self._watched

    @property
    def closed(self) -> bool:
        """Whether it has been closed, so that nothing can be asked any more."""
        return self._closed

    def _start(self) -> None:
        try:
            start_thread(self._run, self._name, self._threads)
        except NoThreadError:
            if not self._threads:
                raise
            # The task waits for a thread that is there already.

    def end(self, *, drain: bool = False) -> None:
        """Have the threads end: now, interrupting what runs, or with ``drain`` once all that was submitted has run."""
        with self._lock:
            self._closed = True
            # Copied in one step, since tasks that end meanwhile leave the set.
            given = () if drain else tuple(self._given)
            running = () if drain else (*(task.interrupt for task in given), *self._watched)
            self._tasks.put(None)
        for interrupt in running:
            interrupt()

    def close(self, join_s: float = _JOIN_S) -> None:
        """Interrupt what runs, end the threads, and wait up to ``join_s`` for them. Closing twice is harmless."""
        self.end()
        self.join(join_s)

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is one of the pool's."""
        return threading.current_thread() in self._threads

    def join(self, join_s: float) -> list[threading.Thread]:
        """Wait up to ``join_s`` for the threads to end, and return those that have not.

        A thread of the pool returns at once, or two might wait for each other.
        """
        if not self.is_worker:
            join_threads(self._threads, join_s)
        return [thread for thread in self._threads if thread.is_alive()]

    def _freed(self, task: Task[Any]) -> None:
        # Called before the task ends: whoever waits for it and submits the next one then gets this thread again.
        self._given.discard(task)
        self._watched.discard(task.interrupt)

    def _run(self) -> None:
        with torch.no_grad():
            while (task := self._tasks.get()) is not None:
                task.run(self._freed)
                # The thread must not keep the last task's tensors while it waits for the next.
                del task
        # For the next thread to end.
        self._tasks.put(None)
