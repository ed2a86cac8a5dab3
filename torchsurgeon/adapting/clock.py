"""Time since something happened, by a clock that may jump."""

from __future__ import annotations

from collections.abc import Callable

NowS = Callable[[], float]
"""A monotonic clock in seconds. Should it step back all the same, no time has passed; a step ahead is time passed."""


class Since:
    """Seconds since the last :meth:`mark`; never negative, and never stuck after the clock stepped back."""

    __slots__ = ("_last_s", "_now_s", "_passed_s")

    def __init__(self, now_s: NowS) -> None:
        self._now_s = now_s
        self.mark()

    def mark(self) -> None:
        """Start at 0 again."""
        self._last_s = self._now_s()
        self._passed_s = 0.0

    def passed_s(self) -> float:
        """Seconds since the mark."""
        now_s = self._now_s()
        if now_s > self._last_s:
            self._passed_s += now_s - self._last_s
        self._last_s = now_s
        return self._passed_s
