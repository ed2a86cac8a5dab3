"""A link to one tail server that breaks in the ways links and servers do: passes HTTP messages on until it is told
not to.

While ``fault`` names one, it befalls every message, probes and trials included. A fault in the middle of a request
calls ``strike``, once, when half of the body has gone out.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

_PATIENCE_S = 30.0
_REFUSALS = {
    "500": b'HTTP/1.1 500 Internal Server Error\r\ncontent-length: 19\r\n\r\n{"error": "broken"}',
    "503": b'HTTP/1.1 503 Service Unavailable\r\ncontent-length: 17\r\n\r\n{"error": "busy"}',
}


class FaultyLink:
    """Listens at ``port`` for a device, and connects each connection to 127.0.0.1:``target_port``."""

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self._target_port = target_port
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.fault: str | None = None
        self.struck = 0
        """Inferences that met a fault."""
        self._strike: Callable[[], None] | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def begin(self, fault: str, strike: Callable[[], None] | None = None) -> None:
        self._over = threading.Event()
        self._strike = strike
        self.fault = fault

    def end(self) -> None:
        """From now on messages pass; what a fault still held is given up."""
        with self._lock:
            # A strike that is under way is over by now; one that came later would hit the server started again.
            self.fault = self._strike = None
        self._over.set()

    def drop(self) -> None:
        """Close every connection."""
        with self._lock:
            for link in self._open:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.end()
        self.drop()

    def __enter__(self) -> FaultyLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attend, args=(device,), daemon=True).start()

    def _attend(self, device: socket.socket) -> None:
        with contextlib.suppress(OSError), self._kept(device):
            server = socket.create_connection(("127.0.0.1", self._target_port), timeout=_PATIENCE_S)
            with self._kept(server):
                while (request := _message(device)) and self._exchange(device, server, *request):
                    pass

    @contextlib.contextmanager
    def _kept(self, link: socket.socket) -> Iterator[None]:
        link.settimeout(_PATIENCE_S)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(link)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(link)
            link.close()

    def _exchange(self, device: socket.socket, server: socket.socket, head: bytes, body: bytes) -> bool:
        """Pass a request and its answer on; False when the connection is over."""
        fault, over = self.fault, self._over
        self.struck += fault is not None and b"/infer " in head
        if fault == "black hole":
            over.wait(_PATIENCE_S)
            return False
        if fault == "reset":
            device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault == "flipped request" and body:
            body = self._flipped(body)
        server.sendall(head + body[: len(body) // 2])
        self._strike_once()
        server.sendall(body[len(body) // 2 :])
        answer = _message(server)
        if answer is None:
            return False
        if fault in _REFUSALS:
            device.sendall(_REFUSALS[fault])
            return True
        if fault == "flipped answer" and answer[1]:
            answer = answer[0], self._flipped(answer[1])
        data = b"".join(answer)
        if fault == "cut short":
            device.sendall(data[: self._random.randrange(1, len(data))])
            return False
        if fault == "a byte a second":
            for at in range(len(data)):
                device.sendall(data[at : at + 1])
                if over.wait(1.0):
                    return False
        device.sendall(data)
        return True

    def _strike_once(self) -> None:
        with self._lock:
            strike, self._strike = self._strike, None
            if strike is not None:
                strike()

    def _flipped(self, body: bytes) -> bytes:
        at = self._random.randrange(len(body))
        return body[:at] + bytes([body[at] ^ self._random.randrange(1, 256)]) + body[at + 1 :]


def _message(link: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of one message with a content length; None when the connection ends."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = link.recv(1 << 16)
        if not piece:
            return None
        data += piece
    end = data.index(b"\r\n\r\n") + 4
    lines = data[:end].lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
    while len(data) < end + length:
        piece = link.recv(1 << 16)
        if not piece:
            return None
        data += piece
    return data[:end], data[end:]
