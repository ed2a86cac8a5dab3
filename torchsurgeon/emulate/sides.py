"""The two sides of an emulated connection, and the bytes on their way between them."""

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
    """One socket of a connection, and what the loop waits for on it."""

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, owner: Connection) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._selector = selector
        self._owner = owner
        self._mask = 0

    def wait_for(self, event: int, wanted: bool = True) -> None:
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
        self.wait_for(self._mask, False)
        with contextlib.suppress(OSError):
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                # Closing with bytes unread resets the connection, and the peer may lose what it was sent before.
                self.sock.recv(_DRAIN_BYTES)
        self.sock.close()


class Flow:
    """One direction of one connection: `source` is read, `sink` written once it is there."""

    def __init__(self, connection: Connection, path: Bottleneck[Flow]) -> None:
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
        """Have the path read the source as soon as its queue has room."""
        self.parked = False
        self.readable_since_s = now_s
        self.path.readable.append(self)


class Connection:
    """A client's connection and the one that the emulator made to the target for it, as two flows."""

    def __init__(self, uplink: Bottleneck[Flow], downlink: Bottleneck[Flow]) -> None:
        self.up = Flow(self, uplink)
        self.down = Flow(self, downlink)
        self.connecting = False
        self.closed = False

    def sides(self) -> Iterator[Side]:
        return (side for side in (self.up.source, self.down.source) if side is not None)

    def close(self, *, reset: bool = False) -> None:
        self.closed = True
        for side in self.sides():
            side.close(reset=reset)
