"""The end of the time that a call may take."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

# Sockets and locks accept neither an infinite timeout nor one that is much longer than this.
_MOST_WAIT_S = 1e6


class Deadline:
    """The end of the time that one call as a whole may take. Any thread may ``cancel()`` it, which ends the call.

    The thread that makes the call registers with ``interrupted_by()`` how to end what it is about to wait for. The lock
    makes sure that a cancellation is never lost between two waits: it either runs the registered interrupt, or comes
    first, and then registering runs the interrupt at once.

    Args:
        timeout_s: seconds from now on.

    Attributes:
        timeout_s: as given.
        cancelled: whether it was cancelled.
        sent_bytes: bytes that have been handed to the network for the call, whether it was answered or not. A transport
            of a program's own may leave it at 0.
        most_bytes: a request is not sent a second time if ``sent_bytes`` would exceed this; may be assigned.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.cancelled = False
        self.sent_bytes = 0
        self.most_bytes = math.inf
        self._end_s = time.monotonic() + timeout_s
        # Reentrant: a signal handler may cancel it while the calling thread holds it.
        self._lock = threading.RLock()
        self._interrupt: Callable[[], object] | None = None

    def left_s(self) -> float:
        """Return the seconds that are left, always above 0: as a socket's timeout, 0 would mean not to wait at all.

        Raises:
            TimeoutError: no time is left, or the deadline was cancelled.
        """
        left = self.remaining_s()
        # Written so that nan counts as over.
        if not left > 0:
            raise TimeoutError
        return left

    def remaining_s(self) -> float:
        """Return the seconds that are left; 0 or less once it has passed or was cancelled."""
        if self.cancelled:
            return 0.0
        # At most timeout_s, in case the clock has stepped back.
        return min(self._end_s - time.monotonic(), self.timeout_s, _MOST_WAIT_S)

    def cancel(self) -> None:
        """End the call now: interrupt what it waits for, and let no other wait begin."""
        with self._lock:
            self.cancelled = True
            if self._interrupt is not None:
                self._interrupt()

    def interrupted_by(self, interrupt: Callable[[], object] | None) -> None:
        """Register what ends the wait that follows.

        Args:
            interrupt: called from another thread on cancellation, with the deadline's lock held: it must be quick, and
                must not raise. None once there is nothing to interrupt any more.
        """
        with self._lock:
            self._interrupt = interrupt
            if self.cancelled and interrupt is not None:
                interrupt()
