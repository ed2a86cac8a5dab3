"""``cached_property`` for attributes that a process may need after it was forked off."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class cached_property(functools.cached_property[T]):
    """``functools.cached_property`` without its lock.

    Before Python 3.12, that class locks an attribute for all instances while it is computed. A process that is forked
    off meanwhile inherits the locked lock, and would wait for ever for a thread that it does not have. Without the lock
    two threads may both compute the attribute; the second result replaces the first, which is equal.
    """

    def __init__(self, func: Callable[[Any], T]) -> None:
        super().__init__(func)
        self.lock = contextlib.nullcontext()
