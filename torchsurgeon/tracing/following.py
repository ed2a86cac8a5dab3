"""Who follows the calls of this thread, if anyone does: what a recorder has to offer to the rest of this room."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class Follower(Protocol):
    """Follows a model's calls.

    Attributes:
        thread: the thread whose calls it follows.
        paused: not zero while the calls are its own and not the model's.
    """

    thread: int
    paused: int

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Make a call, record it, and return what it gives, followed."""


# One thread follows a model at a time.
_current: list[Follower] = []


def begin(follower: Follower) -> None:
    """Have ``follower`` follow its thread's calls until ``end()``."""
    _current.append(follower)


def end() -> None:
    """Stop following."""
    _current.clear()


def follower_here() -> Follower | None:
    """Return who follows this thread's calls; None where nobody does, or the calls are the follower's own."""
    found = _current[0] if _current else None
    return found if found is not None and found.thread == threading.get_ident() and not found.paused else None


def is_following(follower: object) -> bool:
    """Return whether ``follower`` follows this thread now, whoever's the call is."""
    return bool(_current) and _current[0] is follower and _current[0].thread == threading.get_ident()
