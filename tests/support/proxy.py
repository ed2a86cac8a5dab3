"""A small HTTP proxy on 127.0.0.1, for tests of what goes through one.

``proxying``  runs one; what it yields records the first line and the headers of every request
"""

from __future__ import annotations

import re
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tcp import listening

_LONGEST_S = 30.0


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        port: where it listens.
        seen: first line and headers of each request, as text.
        connections: how many connections were made to it.
        hosts: where a host that a request names is really found.
        answers: answered to every request in place of asking the server; empty to ask.
    """

    port: int = 0
    seen: list[str] = field(default_factory=list)
    connections: int = 0
    hosts: Mapping[str, int] = field(default_factory=dict)
    answers: bytes = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def handle(self, client: socket.socket) -> None:
        """Serve one connection: forward requests to an absolute URL, or open one tunnel."""
        self.connections += 1
        client.settimeout(_LONGEST_S)
        server: socket.socket | None = None
        try:
            while (head := _head(client)) is not None:
                text = head.decode("latin-1")
                self.seen.append(text)
                if self.answers:
                    client.sendall(self.answers)
                    return
                method, target, _ = text.split(" ", 2)
                host, path = (target, "") if method == "CONNECT" else _split(target)
                if server is None:
                    server = socket.create_connection(self._place(host), timeout=_LONGEST_S)
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    _relay(client, server, None)
                    return
                server.sendall(head.replace(target.encode("latin-1"), path.encode("latin-1"), 1))
                if not _relay(client, server, head):
                    return
        finally:
            if server is not None:
                server.close()

    def _place(self, host: str) -> tuple[str, int]:
        name, _, port = host.rpartition(":")
        return ("127.0.0.1", self.hosts[name]) if name in self.hosts else (name.strip("[]"), int(port))


@contextmanager
def proxying(**options: object) -> Iterator[Proxy]:
    proxy = Proxy(**options)  # type: ignore[arg-type]
    with listening(proxy.handle) as proxy.port:
        yield proxy


def _split(target: str) -> tuple[str, str]:
    found = re.fullmatch(r"http://([^/]+)(/.*)", target)
    assert found is not None, f"a proxy is asked for absolute URLs, not for {target}"
    return found[1] if ":" in found[1].rpartition("]")[2] else f"{found[1]}:80", found[2]


def _head(link: socket.socket) -> bytes | None:
    """The head of the next request, read byte by byte, so that nothing of its body is read."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = link.recv(1)
        if not piece:
            return None
        head += piece
    return head


def _relay(client: socket.socket, server: socket.socket, head: bytes | None) -> bool:
    """Carry bytes both ways: for a request with ``head`` until its answer has passed, else until one side ends."""
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head or b"")
    left = int(length[1]) if length else 0
    while left:
        piece = client.recv(min(left, 1 << 16))
        if not piece:
            return False
        server.sendall(piece)
        left -= len(piece)
    if head is not None:
        answer = _head(server)
        if answer is None:
            return False
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", answer)
        assert length is not None
        client.sendall(answer)
        left = int(length[1])
        while left:
            piece = server.recv(min(left, 1 << 16))
            client.sendall(piece)
            left -= len(piece)
        return True
    while True:
        for link in select.select([client, server], [], [], _LONGEST_S)[0]:
            piece = link.recv(1 << 16)
            if not piece:
                return False
            (server if link is client else client).sendall(piece)
