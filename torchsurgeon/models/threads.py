"""The settings that PyTorch keeps for each thread and that change the last bits of what the thread computes.

``torch.set_num_threads()`` counts for the thread that calls it. Another thread takes the number over only when an
operator of PyTorch's own asks for it, so a thread whose first operator is one of MKL's computes with as many threads as
MKL likes. ``torch.set_flush_denormal()`` counts for one thread, too. Here a thread takes over both from another one, so
that a part of a model gives the same bits in every thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")

# The smallest positive float. Where denormal numbers are flushed, Python's own comparison takes it for zero, too, and
# that costs less than a tensor would.
_DENORMAL = 5e-324
_adopting = threading.Lock()
# What every call needs, looked up once.
_enabled, _enable = torch.is_grad_enabled, torch._C._set_grad_enabled


class ThreadSettings(NamedTuple):
    """The settings of one thread.

    Attributes:
        threads: on how many CPU threads an operator that this thread calls runs.
        flush_denormal: whether numbers too small for a full mantissa are taken for zero.
    """

    threads: int
    flush_denormal: bool

    @staticmethod
    def here() -> ThreadSettings:
        """Return the calling thread's settings. From now on they hold for every operator that it calls."""
        return ThreadSettings(torch.get_num_threads(), flushes_denormal())

    def adopt(self) -> None:
        """Give the calling thread these settings. It is called before every task, so it is quick where it has them."""
        if torch.get_num_threads() != self.threads:
            with _adopting:
                # PyTorch also keeps the number for threads that have not computed yet. It is not this thread's to set.
                others = process_threads()
                torch.set_num_threads(self.threads)
                if others != self.threads:
                    _in_new_thread(lambda: torch.set_num_threads(others))
        if flushes_denormal() != self.flush_denormal:
            torch.set_flush_denormal(self.flush_denormal)


def flushes_denormal() -> bool:
    """Return whether the calling thread takes numbers too small for a full mantissa for zero."""
    return _DENORMAL == 0.0


def without_gradients(function: Callable[..., T], *args: Any) -> T:
    """Call ``function`` with positional arguments, without gradients.

    ``torch.no_grad()`` leaves them off for good where a signal handler raises just as it begins, and takes ten times as
    long as what it calls.
    """
    gradients = _enabled()
    try:
        _enable(False)
        return function(*args)
    finally:
        _enable(gradients)


def process_threads() -> int:
    """Return the number of CPU threads with which a thread of this process computes unless it sets another."""
    return _in_new_thread(torch.get_num_threads)


def _in_new_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), name="torchsurgeon-settings", daemon=True)
    thread.start()
    thread.join()
    return results[0]


def _reset_after_fork() -> None:
    global _adopting
    _adopting = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
