"""How many bytes may still be sent in this hour, over a link on which bytes cost money."""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.errors import AdaptError, is_finite, short

_HOUR_S, _SLOT_S = 3600.0, 60.0


class Allowance:
    """Counts bytes that are sent, and says whether more may be sent within any hour. Thread-safe.

    What a request under way is expected to send is reserved for it, so that others do not count on the same bytes.

    Bytes are counted by the minute, and are forgotten once their whole minute is more than an hour ago.

    Args:
        hourly_bytes: the most bytes in an hour; None for no bound.
        now_s: a monotonic clock in seconds.

    Raises:
        AdaptError: ``hourly_bytes`` is not a positive number.
    """

    def __init__(self, hourly_bytes: float | None, *, now_s: NowS = time.monotonic) -> None:
        if hourly_bytes is not None and not (is_finite(hourly_bytes) and hourly_bytes > 0):
            raise AdaptError(f"hourly_bytes must be a positive number of bytes, or None; got {short(hourly_bytes)}")
        self.hourly_bytes = hourly_bytes
        self.reset_after_fork()
        self._since = Since(now_s)
        self._passed_s = 0.0
        self._slots: deque[tuple[float, float]] = deque()
        self._reserved: dict[object, float] = {}

    def reset_after_fork(self) -> None:
        """Make a lock that no thread of the parent process holds. What has been sent still counts."""
        # Reentrant: a signal handler may give up a call while the thread that it interrupts holds the lock.
        self._lock = threading.RLock()
        self._reserved = {}

    def spent(self, size_bytes: float) -> None:
        """Count bytes that have been sent."""
        if self.hourly_bytes is None or size_bytes <= 0:
            return
        with self._lock:
            self._count(size_bytes)

    def spend(self, size_bytes: float) -> bool:
        """Count bytes that will be sent now, if they keep the bound; return whether they do."""
        if self.hourly_bytes is None:
            return True
        with self._lock:
            allowed = size_bytes <= self._left_bytes()
            if allowed and size_bytes > 0:
                self._count(size_bytes)
            return allowed

    def reserve(self, request: object, size_bytes: float) -> bool:
        """Keep bytes for a request until ``settle()``, if they keep the bound; return whether they do.

        They take the place of what was reserved for it before.
        """
        if self.hourly_bytes is None:
            return True
        with self._lock:
            allowed = size_bytes <= self._left_bytes() + self._reserved.get(request, 0.0)
            if allowed:
                self._reserved[request] = size_bytes
            return allowed

    def settle(self, request: object, sent_bytes: float) -> None:
        """Count what a request has sent, in place of what was reserved for it."""
        if self.hourly_bytes is None:
            return
        with self._lock:
            self._reserved.pop(request, None)
            if sent_bytes > 0:
                self._count(sent_bytes)

    def allows(self, size_bytes: float) -> bool:
        """Return whether so many bytes more would keep the bound."""
        return size_bytes <= self.left_bytes()

    def left_bytes(self, request: object = None) -> float:
        """Return how many bytes more may be sent now; infinite without a bound.

        Args:
            request: if given, what is reserved for it is among them.
        """
        if self.hourly_bytes is None:
            return math.inf
        with self._lock:
            return self._left_bytes() + self._reserved.get(request, 0.0)

    def _left_bytes(self) -> float:
        assert self.hourly_bytes is not None
        oldest_s = self._now() - _HOUR_S - _SLOT_S
        while self._slots and self._slots[0][0] <= oldest_s:
            self._slots.popleft()
        return self.hourly_bytes - sum(count for _, count in self._slots) - sum(self._reserved.values())

    def _count(self, size_bytes: float) -> None:
        begin_s = self._now() // _SLOT_S * _SLOT_S
        before = self._slots.pop()[1] if self._slots and self._slots[-1][0] == begin_s else 0.0
        self._slots.append((begin_s, before + size_bytes))

    def _now(self) -> float:
        # Adds up what has passed, since a clock may step back.
        self._passed_s += self._since.passed_s()
        self._since.mark()
        return self._passed_s
