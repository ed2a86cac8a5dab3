"""Elapsed time, measured with a clock that may jump."""

from __future__ import annotations

from collections.abc import Callable

NowS = Callable[[], float]
"""Returns the time of a monotonic clock in seconds. Should the clock jump, a step back counts as no time passed."""


class Since:
    """A stopwatch: seconds since the last ``mark()``.

    The result is never negative, and goes on growing after the clock has stepped back.

    Args:
        now_s: the clock.
    """

    __slots__ = ("_begun_s", "_now_s", "_passed_s")

    def __init__(self, now_s: NowS) -> None:
        self._now_s = now_s
        self.mark()

    def mark(self) -> None:
        """Start again at 0."""
        self._begun_s = self._now_s()
        self._passed_s = 0.0

    def passed_s(self) -> float:
        """Return the seconds since the last mark."""
        passed_s = self._now_s() - self._begun_s
        if passed_s < self._passed_s:
            # The clock has stepped back. It goes on from where it was.
            self._begun_s -= self._passed_s - passed_s
            return self._passed_s
        self._passed_s = passed_s
        return passed_s

    def lap_s(self) -> float:
        """Return the seconds since the last mark, and start again at 0."""
        passed_s = self.passed_s()
        self._begun_s += passed_s
        self._passed_s = 0.0
        return passed_s
