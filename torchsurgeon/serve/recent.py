"""A table with a bound: what was not used for the longest time makes room, and nothing else is forgotten with it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values that were used last, by their keys. Thread-safe.

    Clients decide what a server has to remember. One that never sends the same twice must not have it forget what it
    knows of the others, as it would if a full table were emptied.

    Args:
        most: how many values are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Return a value, which counts as used; None where there is none."""
        # Every request asks, so no lock is taken: each of these operations is one by itself.
        try:
            self._values.move_to_end(key)
        except KeyError:
            return None
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value, in the place of the one that was not used for the longest time where there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)

    def values(self) -> list[V]:
        """Return all values, those that were used last behind the others."""
        with self._lock:
            return list(self._values.values())
