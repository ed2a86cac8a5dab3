"""Connections whose TLS handshake is not complete: how many there may be, and for how long."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import suppress
from typing import Any

from torchsurgeon.serve.connections import Connections

HANDSHAKE_TIMEOUT_S = 10.0


class Entrance(socket.socket):
    """The listening socket of a server that speaks TLS, which counts connections from when they are accepted.

    asyncio tells a protocol of a connection only once the handshake is complete. But it takes a connection by the
    ``accept()`` of the listening socket, and closes it where its socket comes to an end.

    Args:
        bound: the listening socket, in whose place this one is used.
        connections: the open connections.
    """

    def __init__(self, bound: socket.socket, connections: Connections) -> None:
        super().__init__(fileno=bound.detach())
        self._connections = connections
        self._is_full = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Take a connection; called by asyncio, many times in a row."""
        if self._is_full:
            # As if nobody else waited, so that the event loop first closes the connection that was cut off.
            self._is_full = False
            raise BlockingIOError
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._connections.cut_off_arrival():
                raise BlockingIOError from error
            raise
        arrival = _Arrival(accepted.detach(), str(address[0]), self._connections)
        self._is_full = self._connections.arrive(arrival)
        return arrival, address


class _Arrival(socket.socket):
    """The socket of a connection that was accepted.

    Args:
        fileno: the socket.
        address: the client's address.
        connections: the open connections, which are told when the socket is closed.

    Attributes:
        address: as given.
    """

    def __init__(self, fileno: int, address: str, connections: Connections) -> None:
        super().__init__(fileno=fileno)
        self.address = address
        self._connections = connections
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._late)

    def settle(self) -> None:
        """Let it be open for longer than a handshake may take."""
        self._timer.cancel()

    def cut_off(self) -> None:
        """End the connection. The event loop finds that out by itself, and closes the socket."""
        # The client may have left.
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; called by asyncio."""
        self._connections.arrived(self.fileno())
        super().close()

    def _late(self) -> None:
        self._connections.arrived(self.fileno())
        self.cut_off()
