"""A connection through the link emulator: its two sockets, and the bytes on their way in each direction."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
from collections import deque
from collections.abc import Iterator

from torchsurgeon.emulate.bottleneck import Bottleneck

_DRAIN_BYTES = 1 << 19


class Side:
    """One socket of a connection, and the events that the emulator's loop waits for on it.

    Args:
        sock: the socket.
        selector: the loop's selector.
        owner: the connection.
    """

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, owner: ProxiedConnection) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._selector = selector
        self._owner = owner
        self._mask = 0

    def wait_for(self, event: int, wanted: bool = True) -> None:
        """Wait for an event of the socket from now on, or stop to, where it is not ``wanted``."""
        mask = self._mask | event if wanted else self._mask & ~event
        if mask == self._mask:
            return
        if not mask:
            self._selector.unregister(self.sock)
        elif self._mask:
            self._selector.modify(self.sock, mask, (self._owner, self))
        else:
            self._selector.register(self.sock, mask, (self._owner, self))
        self._mask = mask

    def close(self, *, reset: bool = False) -> None:
        """Close the socket, in order or by a reset."""
        self.wait_for(self._mask, False)
        with contextlib.suppress(OSError):
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                # Closing a socket with unread bytes resets the connection, and the peer may lose what it was sent.
                self.sock.recv(_DRAIN_BYTES)
        self.sock.close()


class Direction:
    """One direction of one connection: bytes are read from ``source``, pass the link, and are written to ``sink``.

    Args:
        connection: the connection.
        path: the direction of the link that the bytes pass.

    Attributes:
        source: where bytes are read; None until it is connected.
        sink: where bytes are written; None until it is connected.
        unsent: bytes that have arrived and could not be written yet.
        unsent_bytes: how many these are.
        readable_since_s: since when the source has had bytes to read.
        parked: whether reading has stopped because the sink's receiver does not read.
        ended: whether the source has no more bytes.
        end_arrived: whether the end has passed the link.
        done: whether the end was written to the sink, or never will be.
    """

    def __init__(self, connection: ProxiedConnection, path: Bottleneck[Direction]) -> None:
        self.connection = connection
        self.path = path
        self.source: Side | None = None
        self.sink: Side | None = None
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.readable_since_s = 0.0
        self.parked = False
        self.ended = False
        self.end_arrived = False
        self.done = False

    def wait_for_room(self, now_s: float) -> None:
        """Let the path read the source as soon as its queue has room."""
        self.parked = False
        self.readable_since_s = now_s
        self.path.readable.append(self)


class ProxiedConnection:
    """A client's connection to the emulator, and the emulator's connection to the target for it.

    Args:
        uplink: the link's direction to the target.
        downlink: the link's direction to the client.

    Attributes:
        up: the bytes to the target.
        down: the bytes to the client.
        connecting: whether the target has not accepted yet.
        closed: whether the connection is closed.
    """

    def __init__(self, uplink: Bottleneck[Direction], downlink: Bottleneck[Direction]) -> None:
        self.up = Direction(self, uplink)
        self.down = Direction(self, downlink)
        self.connecting = False
        self.closed = False

    def sides(self) -> Iterator[Side]:
        """Return the sockets that are there."""
        return (side for side in (self.up.source, self.down.source) if side is not None)

    def close(self, *, reset: bool = False) -> None:
        """Close both sockets, in order or by a reset."""
        self.closed = True
        for side in self.sides():
            side.close(reset=reset)
