"""Who follows the calls of this thread, if anyone does: what a recorder has to offer to the rest of this room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torchsurgeon.tracing.step import Ref


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

    def number_step(self, target: Any, args: tuple[Any, ...]) -> Ref:
        """Make the step that computes a number."""

    def decided(self, found: Any, test: Callable[[Any, Any], Any], other: Any) -> Any:
        """Return what a comparison of a number gives, and note that the model's path depends on it."""


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


def is_following(follower: Follower) -> bool:
    """Return whether ``follower`` follows this thread now, whoever's the call is."""
    return bool(_current) and _current[0] is follower and follower.thread == threading.get_ident()
