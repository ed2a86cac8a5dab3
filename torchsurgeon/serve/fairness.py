"""The order in which what waits is run: by priority, and among clients of the same priority by fair shares.

The shares are those of start-time fair queueing (Goyal, Vin and Cheng, 1996). Each client has an account of the seconds
that its requests take. A request gets a place by its client's account, or by how far the server has come in these
accounts if that is more, so that nobody saves up for later. So clients that always have requests waiting get equal
shares of the seconds, however many requests each of them has there. The request of a client that seldom asks is next.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Generic, Literal, NamedTuple, TypeVar

from torchsurgeon.wire.header import PRIORITIES

T = TypeVar("T")

Priority = Literal["high", "normal", "low"]
NORMAL = PRIORITIES.index("normal")

# What a job counts for whose duration is not known at all. Only its ratio to others matters.
ANY_S = 1e-3
# Accounts of so many clients are kept. Beyond that, those go whose clients have nothing waiting.
_MOST_ACCOUNTS = 1024


class Place(NamedTuple):
    """Where a job belongs.

    Attributes:
        client: whose share it counts for; None for the server's own, which never makes room for another.
        level: its priority, as an index of ``wire.PRIORITIES``.
        cost_s: how long it is expected to take.
    """

    client: str | None = None
    level: int = NORMAL
    cost_s: float = ANY_S


class _Entry(NamedTuple, Generic[T]):
    # In this order they are sorted. No two have the same number, so what follows it is never compared.
    level: int
    start_s: float
    number: int
    place: Place
    item: T


class FairQueue(Generic[T]):
    """What waits, in the order in which it is to be run. Its owner holds a lock around every call."""

    def __init__(self) -> None:
        self._entries: list[_Entry[T]] = []
        # When the account of each client would be used up, in seconds of all accounts, and how far these have come.
        self._finish_s: dict[str | None, float] = {}
        self._now_s = 0.0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (entry.item for entry in self._entries)

    def put(self, item: T, place: Place) -> None:
        """Add an item, and charge its client for it."""
        start_s = self._start_s(place.client)
        if place.client not in self._finish_s and len(self._finish_s) >= _MOST_ACCOUNTS:
            waiting = {entry.place.client for entry in self._entries}
            self._finish_s = {client: end_s for client, end_s in self._finish_s.items() if client in waiting}
        self._finish_s[place.client] = start_s + max(place.cost_s, 0.0)
        bisect.insort(self._entries, _Entry(place.level, start_s, next(self._numbers), place, item))

    def take_first(self) -> T:
        """Take the first item out."""
        entry = self._entries.pop(0)
        self._now_s = max(self._now_s, entry.start_s)
        self._settle()
        return entry.item

    def take(self, items: Collection[T]) -> None:
        """Take items out that run together with the first."""
        chosen = set(map(id, items))
        self._entries = [entry for entry in self._entries if id(entry.item) not in chosen]
        self._settle()

    def ahead_of(self, place: Place) -> int:
        """Return how many items an item of this place would have before it."""
        behind = (place.level, self._start_s(place.client))
        return bisect.bisect_right(self._entries, behind, key=lambda entry: entry[:2])

    def evict_for(self, place: Place) -> T | None:
        """Take out the item that has to make room for one of this place; None where none has to.

        It is the last one of the client that has the most items waiting, where these are more than the client of this
        place would have. Otherwise it is the last one of all, where its priority is lower.
        """
        counts = Counter(entry.place.client for entry in self._entries)
        # The server's own jobs are nobody's share.
        del counts[None]
        most = max(counts.values(), default=0)
        if most > counts[place.client] + 1:
            found = (entry for entry in reversed(self._entries) if counts[entry.place.client] == most)
        else:
            lower = (entry for entry in reversed(self._entries) if entry.level > place.level)
            found = (entry for entry in lower if entry.place.client is not None)
        evicted = next(found, None)
        if evicted is None:
            return None
        self._entries.remove(evicted)
        self.charge(evicted.place, 0.0)
        return evicted.item

    def charge(self, place: Place, ran_s: float) -> None:
        """Charge a client for how long an item ran, of which it has been charged what was expected.

        Where that was far too little, its other items that wait were put too far ahead, and are put back.
        """
        client, more_s = place.client, ran_s - place.cost_s
        if client not in self._finish_s:
            return
        self._finish_s[client] += more_s
        if more_s > place.cost_s:
            self._entries = sorted(
                entry._replace(start_s=entry.start_s + more_s) if entry.place.client == client else entry
                for entry in self._entries
            )

    def clients(self) -> int:
        """Return how many clients have something waiting; the server itself is none."""
        return len({entry.place.client for entry in self._entries if entry.place.client is not None})

    def by_priority(self) -> dict[str, int]:
        """Return how many items of each priority wait, without the server's own."""
        counts = Counter(entry.level for entry in self._entries if entry.place.client is not None)
        return {name: counts[level] for level, name in enumerate(PRIORITIES)}

    def _start_s(self, client: str | None) -> float:
        return max(self._now_s, self._finish_s.get(client, 0.0))

    def _settle(self) -> None:
        """Begin anew where nothing waits: then nobody has been kept from anything."""
        if not self._entries:
            self._finish_s.clear()
            self._now_s = 0.0
