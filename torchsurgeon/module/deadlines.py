"""The deadlines that hold for a block of a program, in one thread or task only."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from torchsurgeon.adapting import check_deadline

# By the id() of who keeps them. One SplitModule may call another, so each has deadlines of its own.
_seconds: contextvars.ContextVar[Mapping[int, float | None]] = contextvars.ContextVar("deadlines")


class Deadlines:
    """The deadlines of one SplitModule's calls."""

    @contextlib.contextmanager
    def within(self, deadline_s: float | None) -> Iterator[None]:
        """Give the calls within this context, in this thread or task, a deadline.

        Raises:
            DeadlineError: ``deadline_s`` is not a positive number.
        """
        if deadline_s is not None:
            check_deadline(deadline_s, 0.0, "")
        outside = _seconds.get({})
        try:
            _seconds.set({**outside, id(self): deadline_s})
            yield
        finally:
            # Not by a token, which a signal handler that raises may keep from being assigned.
            _seconds.set(outside)

    def now(self, otherwise_s: float | None) -> float | None:
        """Return the deadline that holds here; ``otherwise_s`` outside of all contexts."""
        within = _seconds.get(None)
        return otherwise_s if within is None else within.get(id(self), otherwise_s)
