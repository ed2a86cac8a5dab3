"""The open connections of a server: how many there may be, and which is closed to make room for another."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Protocol

MAX_CONNECTIONS = 512
# Connections above the limit are there so that a health check is answered; not even of those may there be any number.
SPARE_CONNECTIONS = 64


class Connection(Protocol):
    """What has to be known of a connection.

    Attributes:
        address: the client's address; empty where it has none.
        spare: whether it is above the limit.
    """

    address: str
    spare: bool

    @property
    def idle_since_s(self) -> float | None:
        """Since when it has waited for a whole request, by the event loop's clock; None while one is answered."""

    @property
    def answered(self) -> bool:
        """Whether a request has ever been answered on it."""

    def close(self) -> None:
        """Close it."""


class Connections:
    """The open connections. Used by the event loop's thread only.

    A new connection is always taken. Where there are too many, one that waits for a request is closed for it: first
    those on which no request was ever answered, and of these the one that has waited the longest. So connections that
    say nothing are closed, and not those of clients that are served. Where all are busy, the new one is a spare:
    nothing but health is answered on it.

    Args:
        limit: the most connections, without spare ones.
        limit_per_address: the most connections from one address; None for half of ``limit``, where those from this
            machine do not count, because a proxy may stand there.
    """

    def __init__(self, limit: int = MAX_CONNECTIONS, limit_per_address: int | None = None) -> None:
        self.limit = limit
        self.limit_per_address = limit_per_address
        self._open: dict[Connection, None] = {}
        self._per_address: dict[str, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> None:
        """Take a new connection, close others for it, and mark it as spare if none could be closed."""
        peers = self._per_address.get(connection.address, {})
        crowded = len(peers) >= self._limit_of(connection.address) and not self._close_one(peers)
        full = len(self._open) >= self.limit and not self._close_one(one for one in self._open if not one.spare)
        connection.spare = crowded or full
        if connection.spare:
            spare = [one for one in self._open if one.spare]
            if len(spare) >= SPARE_CONNECTIONS and not self._close_one(spare):
                self._close(spare[0])
        self._open[connection] = self._per_address.setdefault(connection.address, {})[connection] = None

    def why_full(self) -> str:
        """Return why a spare connection is refused, in a sentence."""
        return (
            f"the server has as many connections as it takes ({self.limit}, of which {self._limit_of('')} from one "
            "address), and all are busy; try again in a moment"
        )

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._open.pop(connection, None)
        peers = self._per_address.get(connection.address, {})
        peers.pop(connection, None)
        if not peers:
            self._per_address.pop(connection.address, None)

    def _limit_of(self, address: str) -> int:
        if self.limit_per_address is not None:
            return self.limit_per_address
        return self.limit if _is_here(address) else max(1, self.limit // 2)

    def _close_one(self, connections: Iterable[Connection]) -> bool:
        """Close the connection that is missed the least, and return whether any of them waits for a request."""
        waiting = [
            (one.answered, since_s, index, one)
            for index, one in enumerate(connections)
            if (since_s := one.idle_since_s) is not None
        ]
        if waiting:
            self._close(min(waiting)[3])
        return bool(waiting)

    def _close(self, connection: Connection) -> None:
        # It counts no more from now on, and not only once the event loop has said that it is closed.
        self.remove(connection)
        connection.close()


def _is_here(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return True
