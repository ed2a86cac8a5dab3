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
        """Since when it has waited for a whole request, by the event loop's clock.

        None while one is answered, and until its client has taken all of the answer.
        """

    @property
    def answered(self) -> bool:
        """Whether a request has ever been answered on it."""

    def close(self) -> None:
        """Close it once what was written is sent, and over TLS once the client has said goodbye."""

    def abort(self) -> None:
        """Close it at once."""

    def drain(self) -> None:
        """Close it after the next answer."""


class Arrival(Protocol):
    """What has to be known of a connection whose TLS handshake is not complete.

    Attributes:
        address: the client's address.
    """

    address: str

    def fileno(self) -> int:
        """Return its descriptor."""

    def settle(self) -> None:
        """Let it be open for longer than a handshake may take."""

    def cut_off(self) -> None:
        """Close it at once."""


class Connections:
    """The open connections. Used by the event loop's thread only.

    A new connection is always taken. Where there are too many, one that waits for a request is closed for it: first
    those on which no request was ever answered, and of these the one that has waited the longest. So connections that
    say nothing are closed, and not those of clients that are served. Where all are busy, the new one is a spare:
    nothing but health is answered on it. Connections whose TLS handshake is not complete count by themselves: where
    there are too many of them, the one that has been at it the longest is cut off.

    Attributes:
        draining: whether the server is about to stop.

    Args:
        limit: the most connections, without spare ones.
        limit_per_address: the most connections from one address; None for half of ``limit``, where those from this
            machine do not count, because a proxy may stand there.
    """

    def __init__(self, limit: int = MAX_CONNECTIONS, limit_per_address: int | None = None) -> None:
        self.limit = limit
        self.limit_per_address = limit_per_address
        self.draining = False
        self._open: dict[Connection, None] = {}
        self._per_address: dict[str, dict[Connection, None]] = {}
        self._arriving: dict[int, Arrival] = {}

    @property
    def most_per_address(self) -> int:
        """The most connections from one address of another machine."""
        return self.limit_per_address or max(1, self.limit // 2)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> None:
        """Take a new connection, close others for it, and mark it as spare if none could be closed."""
        peers = self._per_address.get(connection.address, {})
        crowded = len(peers) >= self._limit_of(connection.address) and not self._close_one(peers)
        full = len(self._open) >= self.limit and not self._close_one(one for one in self._open if not one.spare)
        connection.spare = crowded or full or self.draining
        if connection.spare:
            spare = [one for one in self._open if one.spare]
            if len(spare) >= SPARE_CONNECTIONS and not self._close_one(spare):
                self._close(spare[0])
        self._open[connection] = self._per_address.setdefault(connection.address, {})[connection] = None

    def arrive(self, arrival: Arrival) -> bool:
        """Take a connection whose handshake begins, and return whether another one was cut off for it."""
        own = [one for one in self._arriving.values() if one.address == arrival.address]
        most = max(0, self.limit - len(self._open)) + SPARE_CONNECTIONS
        crowded = own if len(own) >= self._limit_of(arrival.address) else []
        full = list(self._arriving.values()) if len(self._arriving) >= most else []
        late = bool(crowded or full) and self.cut_off_arrival((crowded or full)[0])
        self._arriving[arrival.fileno()] = arrival
        return late

    def cut_off_arrival(self, arrival: Arrival | None = None) -> bool:
        """Cut off a connection whose handshake is not complete; by default the oldest. Return whether there was one."""
        arrival = arrival or next(iter(self._arriving.values()), None)
        if arrival is None:
            return False
        self.arrived(arrival.fileno())
        arrival.cut_off()
        return True

    def arrived(self, fileno: int) -> None:
        """Count a connection no more as one whose handshake is not complete."""
        arrival = self._arriving.pop(fileno, None)
        if arrival is not None:
            arrival.settle()

    def drain(self) -> int:
        """Close every connection after its next answer, and take new ones as spare ones only.

        Returns:
            How many connections have a request under way.
        """
        self.draining = True
        for connection in self._open:
            connection.drain()
        return sum(one.idle_since_s is None for one in self._open)

    def close_idle(self, since_s: float) -> None:
        """Close every connection that has waited for a request since ``since_s`` or longer."""
        for connection in list(self._open):
            idle_since_s = connection.idle_since_s
            if idle_since_s is not None and idle_since_s <= since_s:
                self._close(connection)

    def abort(self) -> int:
        """Close every connection at once, and return how many had a request under way."""
        cut_off = [one for one in self._open if one.idle_since_s is None]
        for connection in list(self._open):
            connection.abort()
        for arrival in list(self._arriving.values()):
            arrival.cut_off()
        return len(cut_off)

    def why_spare(self) -> str:
        """Return why a spare connection is refused, in a sentence."""
        if self.draining:
            return "the server is stopping; ask another one, or try again in a moment"
        return (
            f"the server has as many connections as it takes ({self.limit}, of which {self.most_per_address} from one "
            "other machine), and all are busy; try again in a moment"
        )

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._open.pop(connection, None)
        peers = self._per_address.get(connection.address, {})
        peers.pop(connection, None)
        if not peers:
            self._per_address.pop(connection.address, None)

    def _limit_of(self, address: str) -> int:
        is_unlimited = self.limit_per_address is None and _is_here(address)
        return self.limit if is_unlimited else self.most_per_address

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
        # It counts no more from now on, and not only once the event loop has said that it is closed. So it must not be
        # open for as long as its client likes: over TLS, the client is told, but its own goodbye is not waited for.
        self.remove(connection)
        connection.close()
        connection.abort()


def _is_here(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return True
