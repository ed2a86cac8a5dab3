"""What strikes a call from outside: an exception that a signal handler raises in it, or a thread that cannot start."""

from __future__ import annotations

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable

from torchsurgeon.errors import ServerUnavailableError, short

# Threads that have ended. Python runs code of its own when it frees one, and drops what a signal handler raises in that
# code. So the main thread leaves it to threads that start later, when it refers to these no more.
_ended: deque[threading.Thread] = deque()
_KEPT = 64
_STARTING_S = 1e-3


class NoThreadError(ServerUnavailableError):
    """A thread could not be started, so a server could not be asked, and none is at fault."""


class Condition(threading.Condition):
    """A condition that cannot stay locked where a signal handler raises in the thread that has just locked it.

    Python's own calls the lock from methods that are written in Python, and between two lines of these a handler may
    raise. Here ``with`` finds the lock's own methods, and runs no Python code between locking and its block.
    """

    __enter__ = property(lambda self: self._lock.__enter__)
    __exit__ = property(lambda self: self._lock.__exit__)


def by_signal_handler(error: BaseException) -> bool:
    """Return whether a signal handler raised ``error``.

    Python runs a handler between any two instructions of the main thread, as if the code there had called it. What the
    handler raises, such as the exception of a time limit, is meant for the program, whatever its type is, and says
    nothing of the code that it strikes. So whoever catches errors of a kind that others may raise, too, asks this
    first. A handler is known by its arguments: one of them is the frame that it interrupted.
    """
    cause: BaseException | None = error
    # Python's codecs wrap what is raised in them.
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None and trace.tb_next is not None:
            interrupted, trace = trace.tb_frame, trace.tb_next
            for value in tuple(trace.tb_frame.f_locals.values()):
                if value is interrupted or (type(value) is tuple and any(one is interrupted for one in value)):
                    return True
        cause = cause.__cause__
    return False


def start_thread(function: Callable[[], object], name: str, started: list[threading.Thread] | None = None) -> None:
    """Run ``function`` in a new daemon thread.

    Starting a thread as usual can leave the new thread waiting for ever if a signal handler raises in it. So the
    main thread, which is the one that handlers run in, has another thread call it.

    Args:
        function: what the thread runs.
        name: the thread's name.
        started: takes the thread before it runs, even if a signal handler raises meanwhile.

    Raises:
        NoThreadError: the system does not give this process another thread, or the interpreter is about to exit.
    """

    def run() -> None:
        while len(_ended) > _KEPT:
            _ended.popleft()
        function()

    thread = threading.Thread(target=run, name=name, daemon=True)
    refused: list[Exception] = []
    ended = threading.Lock()

    def start() -> None:
        if started is not None:
            started.append(thread)
        try:
            thread.start()
        except Exception as error:
            refused.append(error)
            if started is not None:
                started.remove(thread)
        finally:
            ended.release()

    ended.acquire()
    if threading.current_thread() is not threading.main_thread():
        start()
    else:
        try:
            _thread.start_new_thread(start, ())
        except RuntimeError as error:
            if by_signal_handler(error):
                raise
            refused.append(error)
        else:
            ended.acquire()
    if refused:
        raise NoThreadError(
            f"no thread could be started to ask a server ({short(refused[0])}); this process has as many threads as "
            "the system allows it (ulimit -u, a container's limit of processes), or is about to exit"
        ) from refused[0]


def join_threads(threads: list[threading.Thread], timeout_s: float) -> None:
    """Wait until threads have ended, together at most ``timeout_s``. The calling thread is not waited for."""
    end_s = time.monotonic() + timeout_s
    for thread in tuple(threads):
        _ended.append(thread)
        while thread is not threading.current_thread():
            left_s = min(max(0.0, end_s - time.monotonic()), timeout_s)
            try:
                thread.join(left_s)
                break
            except RuntimeError as error:
                if by_signal_handler(error) or not left_s:
                    raise
                # Another thread is about to start it.
                time.sleep(_STARTING_S)
