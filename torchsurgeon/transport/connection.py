"""One kept-alive HTTP connection: tensors out from their own memory, the answer straight into its buffer, one deadline.

Answers as servers usually frame them are parsed here; every other way (chunked, interim, until closed) is left to
``http.client``.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from torchsurgeon import wire
from torchsurgeon.errors import ProtocolError
from torchsurgeon.transport.base import ERROR_LIMIT_BYTES, Deadline, RawAnswer, Timing, check_size
from torchsurgeon.wire.buffers import aligned_buffer

_IOV_MAX = 512
_SCRATCH_BYTES = 16 << 10
# A connection used this recently is taken to be open; the check costs a system call.
_FRESH_S = 1.0
_HEADER_LENGTH = wire.HEADER_LENGTH.lower().encode()


class StaleError(Exception):
    """The connection broke before any byte of the answer."""


class Connection:
    """One kept-alive connection, opened at the first exchange. Not thread-safe."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
        self._address = address
        self._context = context
        self._socket: socket.socket | None = None
        self._incoming: select.poll | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._used_s = 0.0
        self._first_byte_s = 0.0

    @property
    def open(self) -> bool:
        return self._socket is not None

    def usable(self) -> bool:
        """False when the server has closed a connection that was idle for a while."""
        if time.monotonic() - self._used_s < _FRESH_S:
            return self.open
        poller = select.poll()
        poller.register(self._socket or -1, select.POLLIN)
        return not poller.poll(0)

    def exchange(self, parts: list[wire.Buffer], size: int, limit_bytes: int, deadline: Deadline) -> RawAnswer:
        link = self._socket or self._connect(deadline)
        start = time.perf_counter()
        self._first_byte_s = 0.0
        broken: OSError | None = None
        try:
            complete = self._send(link, parts, deadline)
        except (ConnectionError, ssl.SSLError) as error:
            # A server that refuses a body may answer and close before it has read all of it.
            complete, broken = False, error
        sent = time.perf_counter()
        try:
            head, rest = self._read_head(link, deadline)
        except (ConnectionError, ssl.SSLError) as error:
            if not self._first_byte_s:
                raise StaleError from (broken or error)
            raise
        status, headers = _simple_head(head)
        length = headers.get(b"content-length", b"")
        if status and length.isdigit() and len(length) < 16:
            check_size(int(length), limit_bytes if status < 300 else ERROR_LIMIT_BYTES, "the server")
            body = aligned_buffer(int(length))
            _fill(body, rest, lambda view: self._receive(link, view, deadline))
            header_bytes = headers.get(_HEADER_LENGTH, b"").decode("latin-1") or None
            closing = headers.get(b"connection", b"").lower() != b"keep-alive" and b"connection" in headers
            closing = closing or len(rest) > len(body)
        else:
            source = _Replay(bytes(head) + bytes(rest), lambda view: self._receive(link, view, deadline))
            response = http.client.HTTPResponse(source, method="POST")  # type: ignore[arg-type]
            response.begin()
            body = _read_body(response, limit_bytes if response.status < 300 else ERROR_LIMIT_BYTES)
            status, header_bytes = response.status, response.headers.get(wire.HEADER_LENGTH)
            # What the fallback has read ahead is lost with it.
            closing = True
        end = time.perf_counter()
        if closing or not complete:
            self.close()
        self._used_s = time.monotonic()
        return RawAnswer(status, header_bytes, body, Timing(size, len(body), start, sent, self._first_byte_s, end))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, deadline: Deadline) -> socket.socket:
        link = _open_socket(self._address, deadline)
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                link.settimeout(deadline.left_s())
                link = self._context.wrap_socket(link, server_hostname=self._address[0])
            else:
                link.setblocking(False)
                self._incoming = select.poll()
                self._incoming.register(link, select.POLLIN)
        except BaseException:
            link.close()
            raise
        self._socket = link
        return link

    def _send(self, link: socket.socket, parts: list[wire.Buffer], deadline: Deadline) -> bool:
        """Write all parts; False when the server began to answer before it had read them."""
        if self._context is not None:
            for part in parts:
                link.settimeout(deadline.left_s())
                link.sendall(part)
            return True
        pending = [memoryview(part) for part in parts]
        while True:
            try:
                done = link.sendmsg(pending[:_IOV_MAX])
            except BlockingIOError:
                done = 0
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if not pending:
                return True
            pending[0] = pending[0][done:]
            if _wait_writable(link, deadline):
                return False

    def _receive(self, link: socket.socket, view: memoryview, deadline: Deadline) -> int:
        """Read what there is, at least a byte, before the deadline; 0 at the end of the stream."""
        if self._context is not None:
            link.settimeout(deadline.left_s())
        elif self._incoming is not None and not self._incoming.poll(deadline.left_s() * 1000):
            raise TimeoutError
        count = link.recv_into(view)
        if not self._first_byte_s and count:
            self._first_byte_s = time.perf_counter()
        return count

    def _read_head(self, link: socket.socket, deadline: Deadline) -> tuple[memoryview, memoryview]:
        """The status line and headers, and what came with them of the body."""
        filled = 0
        while filled < _SCRATCH_BYTES:
            count = self._receive(link, self._scratch[filled:], deadline)
            if not count:
                if not filled:
                    raise ConnectionResetError("the server closed the connection without an answer")
                raise http.client.IncompleteRead(bytes(self._scratch[:filled]))
            filled += count
            end = bytes(self._scratch[:filled]).find(b"\r\n\r\n")
            if end >= 0:
                return self._scratch[: end + 4], self._scratch[end + 4 : filled]
        raise http.client.LineTooLong("headers")


class _Replay(io.RawIOBase):
    """What ``http.client`` reads an answer from: bytes that have come already, then the connection."""

    def __init__(self, already: bytes, receive: Callable[[memoryview], int]) -> None:
        self._already = already
        self._receive = receive

    def makefile(self, mode: str) -> io.BufferedReader:
        """What ``http.client`` asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._already:
            return self._receive(memoryview(buffer))
        piece, self._already = self._already[: len(buffer)], self._already[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _simple_head(head: memoryview) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers (names in lower case) of a plain answer; status 0 for one that ``http.client`` must read."""
    first, *lines = bytes(head).split(b"\r\n")[:-2]
    version, _, rest = first.partition(b" ")
    if version != b"HTTP/1.1" or not rest[:3].isdigit() or rest[:1] == b"1" or rest[3:4] not in (b" ", b""):
        return 0, {}
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or name in headers or line[:1] in b" \t" or name in (b"transfer-encoding", b"content-encoding"):
            return 0, {}
        headers[name] = value.strip()
    return int(rest[:3]), headers


def _fill(body: memoryview, already: memoryview, receive: Callable[[memoryview], int]) -> None:
    filled = min(len(already), len(body))
    body[:filled] = already[:filled]
    while filled < len(body):
        count = receive(body[filled:])
        if not count:
            raise http.client.IncompleteRead(b"", len(body) - filled)
        filled += count


def _open_socket(address: tuple[str, int], deadline: Deadline) -> socket.socket:
    """``socket.create_connection``, but with one deadline for all addresses of the host."""
    failure: OSError | None = None
    for family, kind, protocol, _, resolved in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        link = socket.socket(family, kind, protocol)
        try:
            link.settimeout(deadline.left_s())
            link.connect(resolved)
            return link
        except OSError as error:
            link.close()
            failure = error
    raise failure or OSError(f"{address[0]} has no address")


def _read_body(response: http.client.HTTPResponse, limit_bytes: int) -> memoryview:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ProtocolError("the server compressed an answer that did not ask for it")
    if response.length is not None:
        check_size(response.length, limit_bytes, "the server")
    received = bytearray()
    while piece := response.read(min(1 << 16, limit_bytes + 1 - len(received))):
        received += piece
        check_size(len(received), limit_bytes, "the server")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    body = aligned_buffer(len(received))
    body[:] = received
    return body


def _wait_writable(link: socket.socket, deadline: Deadline) -> bool:
    """Wait until more can be written; True when there is something to read first."""
    poller = select.poll()
    poller.register(link, select.POLLIN | select.POLLOUT)
    while True:
        events = poller.poll(deadline.left_s() * 1000)
        if events:
            return bool(events[0][1] & (select.POLLIN | select.POLLHUP | select.POLLERR))
