"""TCP servers of a few lines, for what a well-behaved server never does.

``listening``      runs a function for every connection to a port of this machine
``read_message``   reads one HTTP message off a connection
``reserved_port``  is a port on which nobody listens before a test does
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_ENDS_S = 20.0


@contextmanager
def listening(handle: Callable[[socket.socket], object], *, backlog: int = 128) -> Iterator[int]:
    """The port of a server that runs ``handle`` in a thread for every connection, and closes the connection after it.

    Leaving the block waits for the threads, so ``handle`` has to end once the other side has closed.
    """
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handle(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=serve, args=(connection,), daemon=True)
            threads.append(thread)
            thread.start()

    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
    for thread in threads:
        thread.join(_ENDS_S)
    assert not any(thread.is_alive() for thread in threads), "a connection was left open, or its handler never ends"


def read_message(link: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of one HTTP message, without the empty line between them; None when the connection ends."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = link.recv(1 << 16)
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    while len(body) < int(found[1] if found else 0):
        piece = link.recv(1 << 16)
        if not piece:
            return None
        body += piece
    return head, body


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port on which nobody listens but a server that is started there, again and again if need be.

    It stays bound, without listening, so that no other process on this machine is given it in between.
    """
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])
