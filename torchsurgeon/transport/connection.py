"""One kept-alive HTTP connection for inference, with one deadline for each exchange.

Tensors are written from their own memory, and the answer is read straight into the buffer that the returned tensors are
views of. For that, the buffer is laid out before the answer arrives, on the guess that its head is as long as the last
answer's, as it is in a stream of similar inferences: head and body then arrive in one read, the body already in its
place. Where the guess is wrong, the part of the body that came with the head is copied. Answers with a Content-Length
are parsed by this module. Every other kind (chunked, or ended by closing the connection) is left to ``http.client``.

A server, or a proxy before it, may send interim answers at any moment before its answer (1xx, RFC 9110, section 15.2).
They are skipped.

An exchange runs in steps (``transport.steps``), each of which ends where the socket has to be waited for.
"""

from __future__ import annotations

import functools
import http.client
import io
import re
import select
import socket
import ssl
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.transport.base import ERROR_LIMIT_BYTES, RawAnswer, Timing, check_size
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.route import Route
from torchsurgeon.transport.steps import Steps, complete
from torchsurgeon.wire.buffers import Buffers, aligned_buffer
from torchsurgeon.wire.header import HEADER_LENGTH, Buffer

_IOV_MAX = 512
_MAX_HEAD_BYTES = 16 << 10
# A connection that was used this recently is assumed to be open, since checking costs a system call.
_FRESH_S = 1.0
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
# The head of an interim answer. 101 is none: it would be the answer to a request for another protocol.
_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)[0-9]{2}[ \r]")
# More of them than any server has a reason to send before one answer.
_MOST_INTERIM = 100


class StaleError(Exception):
    """The connection broke before any byte of the answer arrived."""


class ProxyRefusedError(Exception):
    """The proxy did not connect to the server.

    Args:
        status: the HTTP status of its answer.
        reason: the rest of the answer's first line.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status, self.reason = status, reason


class CheckedResponse(http.client.HTTPResponse):
    """Python's ``HTTPResponse``, but it skips all kinds of interim answers, of which Python's knows 100 only.

    It also refuses what Python's reads without end: interim answers of any number, and chunks of negative length.
    """

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(_MOST_INTERIM + 1):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == 101:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise _too_many_interim()

    def _safe_read(self, amt: int) -> bytes:
        if amt < 0:
            raise http.client.HTTPException(f"a chunk has 0 bytes or more; got one of {amt} bytes")
        return super()._safe_read(amt)  # type: ignore[misc,no-any-return]


class Connection:
    """One kept-alive connection, opened at the first exchange. Not thread-safe.

    Args:
        route: the way to the server.
        context: how to encrypt; None for plain HTTP.
    """

    def __init__(self, route: Route, context: ssl.SSLContext | None) -> None:
        self._route = route
        self._context = context
        self._socket: socket.socket | None = None
        self._incoming: select.poll | None = None
        self._buffers = Buffers(capacity=4)
        # Lengths in the last answer. Before the first answer, there is room for any head.
        self._head_bytes = 0
        self._body_bytes = _MAX_HEAD_BYTES
        self._used_s = 0.0
        self._first_byte_s = 0.0

    @property
    def open(self) -> bool:
        """Whether this side has the connection open."""
        return self._socket is not None

    def usable(self) -> bool:
        """Return whether the next request can be sent; False where the server has closed the idle connection."""
        if self._socket is None or time.monotonic() - self._used_s < _FRESH_S:
            return self.open
        # An idle connection has nothing to read, unless the server has closed it or sent what no request asked for.
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return not poller.poll(0)

    def exchange(self, parts: list[Buffer], size: int, limit_bytes: int, deadline: Deadline) -> Steps[RawAnswer]:
        """Send one request and return the answer, in steps.

        Args:
            parts: the request, head included, in buffers to be written one after the other.
            size: length of the request's body.
            limit_bytes: the most bytes of an answer's body.
            deadline: when the exchange has to be over.

        Raises:
            StaleError: the connection broke before any byte of the answer arrived.
            ProxyRefusedError: the proxy did not connect to the server.
            TimeoutError: the deadline passed, or was cancelled.
            OSError: the connection could not be opened, or broke during the answer.
            http.client.HTTPException: the answer is not valid HTTP, or is cut short.
            BodyTooLargeError: the answer is larger than ``limit_bytes``.
        """
        try:
            if self._socket is None or self._context is not None:
                # Neither connecting nor encryption says when it would wait.
                yield None
            link = self._socket or self._connect(deadline)
            deadline.interrupted_by(functools.partial(shut_down, link))
            answer = yield from self._exchange(link, parts, size, limit_bytes, deadline)
        except BaseException:
            self.close()
            raise
        finally:
            deadline.interrupted_by(None)
        if deadline.cancelled:
            # The cancellation may have shut the socket down after the answer was complete: it must not be used again.
            raise TimeoutError
        return answer

    def _exchange(
        self, link: socket.socket, parts: list[Buffer], size: int, limit_bytes: int, deadline: Deadline
    ) -> Steps[RawAnswer]:
        start = time.perf_counter()
        self._first_byte_s = 0.0
        broken: OSError | None = None
        try:
            whole = yield from self._send(link, parts, deadline)
        except (ConnectionError, ssl.SSLError) as error:
            if by_signal_handler(error):
                raise
            # A server that refuses a body may answer and close before it has read all of it, so an answer may be there.
            whole, broken = False, error
        sent = time.perf_counter()
        try:
            head, behind, arrived = yield from self._read_head(link, deadline)
        except (ConnectionError, ssl.SSLError) as error:
            if not (self._first_byte_s or by_signal_handler(error)):
                raise StaleError from (broken or error)
            raise
        broken = None  # whose traceback refers to this frame, and so to the request's tensors
        simple = _simple_head(head)
        if simple is not None:
            status, length, header_bytes, closing = simple
            check_size(length, limit_bytes if status < 300 else ERROR_LIMIT_BYTES, "the server")
            closing = closing or arrived > length
            if len(head) == self._head_bytes and length == self._body_bytes:
                # The guess was right: the body begins at an aligned address of a buffer of its own size.
                body = behind[:length]
            else:
                self._head_bytes, self._body_bytes = len(head), length
                body = self._buffers.take(length)
                arrived = min(arrived, length)
                body[:arrived] = behind[:arrived]
            while arrived < length:
                count = yield from self._receive(link, body[arrived:], deadline)
                if not count:
                    raise http.client.IncompleteRead(b"", length - arrived)
                arrived += count
        else:
            yield None  # http.client waits by itself

            def receive(view: memoryview) -> int:
                return complete(self._receive(link, view, deadline), deadline)

            source = _Replay(head + bytes(behind[:arrived]), receive)
            response = CheckedResponse(source, method="POST")  # type: ignore[arg-type]
            response.begin()
            body = _read_body(response, limit_bytes if response.status < 300 else ERROR_LIMIT_BYTES)
            status, header_bytes = response.status, response.headers.get(HEADER_LENGTH)
            # http.client may have read beyond the answer, and what it read is lost, so the connection is not reused.
            closing = True
        end = time.perf_counter()
        if closing or not whole:
            self.close()
        self._used_s = time.monotonic()
        return RawAnswer(status, header_bytes, body, Timing(size, len(body), start, sent, self._first_byte_s, end))

    def close(self) -> None:
        """Close the connection. Closing twice is harmless."""
        if self._socket is not None:
            # The method of the innermost class, which also closes a socket that a signal handler's exception has kept
            # from being initialized as a whole.
            super(socket.socket, self._socket).close()
            self._socket = None

    def _connect(self, deadline: Deadline) -> socket.socket:
        link = self._open_socket(deadline)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._route.tunnel:
            _open_tunnel(link, self._route.tunnel, deadline)
        if self._context is not None:
            name = self._route.encrypts_as
            link = self._socket = self._context.wrap_socket(link, server_hostname=name, do_handshake_on_connect=False)
            deadline.interrupted_by(functools.partial(shut_down, link))
            link.settimeout(deadline.left_s())
            link.do_handshake()
        else:
            link.setblocking(False)
            self._incoming = select.poll()
            self._incoming.register(link, select.POLLIN)
        return link

    def _open_socket(self, deadline: Deadline) -> socket.socket:
        """Connect like ``socket.create_connection``, but with one deadline for all addresses of the host."""
        failure: OSError | None = None
        name, port = self._route.connect_to
        # A text would be encoded by a codec that is written in Python, which takes longer.
        host = name.encode() if name.isascii() else name
        for family, kind, protocol, _, resolved in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            # In two steps, so that this has the socket to close wherever a signal handler raises.
            link = self._socket = socket.socket.__new__(socket.socket)
            try:
                socket.socket.__init__(link, family, kind, protocol)
                link.settimeout(deadline.left_s())
                deadline.interrupted_by(functools.partial(shut_down, link))
                link.connect(resolved)
                return link
            except OSError as error:
                self.close()
                if by_signal_handler(error):
                    raise
                failure = error
        raise failure or OSError(f"{short(name)} has no address")

    def _send(self, link: socket.socket, parts: list[Buffer], deadline: Deadline) -> Steps[bool]:
        """Write all parts; return False where the server began to answer before it had read them.

        An interim answer is none: with it the server says that it goes on reading.
        """
        if self._context is not None:
            for part in parts:
                link.settimeout(deadline.left_s())
                deadline.sent_bytes += len(part)
                link.sendall(part)
            return True
        pending: list[Buffer] = parts
        interim = 0
        while True:
            try:
                done = link.sendmsg(pending[:_IOV_MAX])
                deadline.sent_bytes += done
            except BlockingIOError as error:
                if by_signal_handler(error):
                    raise
                done = 0
            if pending is parts:
                if done == sum(map(len, parts)):
                    return True  # as most requests are: all of it in one call
                pending = [memoryview(part) for part in parts]
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if not pending:
                return True
            pending[0] = pending[0][done:]
            while (yield from _wait_writable(link)):
                if interim > _MOST_INTERIM or not _skip_interim(link):
                    return False
                interim += 1

    def _receive(self, link: socket.socket, view: memoryview, deadline: Deadline) -> Steps[int]:
        """Read at least one byte before the deadline; return how many were read, 0 at the end of the stream."""
        while True:
            if self._context is not None:
                link.settimeout(deadline.left_s())
            elif not (yield self._incoming):
                raise TimeoutError
            try:
                count = link.recv_into(view)
                break
            except BlockingIOError as error:
                # The system may wake a waiting process for nothing.
                if by_signal_handler(error):
                    raise
        if not self._first_byte_s and count:
            self._first_byte_s = time.perf_counter()
        return count

    def _read_head(self, link: socket.socket, deadline: Deadline) -> Steps[tuple[bytes, memoryview, int]]:
        """Read status line and headers; return them, the memory behind them, and how much of it is filled already."""
        # One byte more than is expected, to notice a server that sends more.
        memory = self._buffers.take(self._body_bytes + 1, before=self._head_bytes)
        filled = interim = 0
        while filled < len(memory):
            count = yield from self._receive(link, memory[filled:], deadline)
            if not count:
                if not filled:
                    raise ConnectionResetError("the server closed the connection without an answer")
                raise http.client.IncompleteRead(bytes(memory[:filled]))
            filled += count
            text = bytes(memory[: min(filled, _MAX_HEAD_BYTES)])
            end = text.find(b"\r\n\r\n") + 4
            while end >= 4:
                if not _INTERIM.match(text):
                    return text[:end], memory[end:], filled - end
                if interim >= _MOST_INTERIM:
                    raise _too_many_interim()
                interim += 1
                memory, filled = self._behind(memory, end, filled)
                text = bytes(memory[: min(filled, _MAX_HEAD_BYTES)])
                end = text.find(b"\r\n\r\n") + 4
            if filled == len(memory) < _MAX_HEAD_BYTES:
                # The head is longer than the whole last answer was.
                memory = self._buffers.take(_MAX_HEAD_BYTES)
                memory[:filled] = text
        raise http.client.LineTooLong("headers")

    def _behind(self, memory: memoryview, end: int, filled: int) -> tuple[memoryview, int]:
        """Return memory for an answer that begins with what was read behind an interim one, and how much that is."""
        rest = memory[end:filled]
        later = self._buffers.take(max(self._body_bytes + 1, len(rest)), before=self._head_bytes)
        later[: len(rest)] = rest
        if not rest:
            # The answer itself has not begun to arrive, and its arrival tells how quick the link is.
            self._first_byte_s = 0.0
        return later, len(rest)


class _Replay(io.RawIOBase):
    """The stream that ``http.client`` reads an answer from: bytes that were read already, then the connection's."""

    def __init__(self, already: bytes, receive: Callable[[memoryview], int]) -> None:
        self._already = already
        self._receive = receive

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream; ``http.client`` calls this method of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._already:
            return self._receive(memoryview(buffer))
        piece, self._already = self._already[: len(buffer)], self._already[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


class _AnswerHead(NamedTuple):
    """What the head of an answer with a Content-Length says."""

    status: int
    length: int
    header_bytes: str | None
    closing: bool


@lru_cache(maxsize=64)
def _simple_head(head: bytes) -> _AnswerHead | None:
    """Parse the head of an answer; None for one that is left to ``http.client``. Answers of one size repeat theirs."""
    first, *lines = head.split(b"\r\n")[:-2]
    version, _, rest = first.partition(b" ")
    if version != b"HTTP/1.1" or not rest[:3].isdigit() or rest[:1] == b"1" or rest[3:4] not in (b" ", b""):
        return None
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or name in headers or line[:1] in b" \t" or name in (b"transfer-encoding", b"content-encoding"):
            return None
        headers[name] = value.strip()
    length = headers.get(b"content-length", b"")
    if not length.isdigit() or len(length) >= 16:
        return None
    closing = headers.get(b"connection", b"keep-alive").lower() != b"keep-alive"
    return _AnswerHead(int(rest[:3]), int(length), headers.get(_HEADER_LENGTH, b"").decode("latin-1") or None, closing)


def _skip_interim(link: socket.socket) -> bool:
    """Read an interim answer that has arrived, and nothing behind it; return False where something else has."""
    try:
        text = link.recv(_MAX_HEAD_BYTES, socket.MSG_PEEK)
    except BlockingIOError as error:
        # The system may say for nothing that there is something to read.
        if by_signal_handler(error):
            raise
        return True
    except ConnectionError as error:
        if by_signal_handler(error):
            raise
        return False
    end = text.find(b"\r\n\r\n") + 4
    if end < 4 or not _INTERIM.match(text):
        return False
    link.recv(end)
    return True


def _too_many_interim() -> http.client.HTTPException:
    return http.client.HTTPException(f"more than {_MOST_INTERIM} interim answers (1xx) came before the answer")


def _open_tunnel(link: socket.socket, request: bytes, deadline: Deadline) -> None:
    """Have a proxy connect to the server. Its answer has no body, and the server says nothing before it is greeted."""
    link.settimeout(deadline.left_s())
    link.sendall(request)
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) > _MAX_HEAD_BYTES:
            raise http.client.LineTooLong("headers of the proxy")
        link.settimeout(deadline.left_s())
        piece = link.recv(4096)
        if not piece:
            raise ConnectionResetError("the proxy closed the connection without an answer")
        head += piece
    version, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or not status.isdigit():
        raise http.client.BadStatusLine(short(f"{version} {rest}", 100, quote=False))
    if not 200 <= int(status) < 300:
        raise ProxyRefusedError(int(status), reason[:100])


def shut_down(link: socket.socket) -> None:
    """End every wait for ``link``, in whichever thread that is.

    The socket is not closed, because the operating system could give its number to another socket while a thread still
    waits for this one.
    """
    try:
        # The plain socket's method: that of a TLS socket would first remove the encryption under the reading thread.
        socket.socket.shutdown(link, socket.SHUT_RDWR)
    except OSError as error:
        if by_signal_handler(error):
            raise


def _read_body(response: http.client.HTTPResponse, limit_bytes: int) -> memoryview:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ProtocolError("the server compressed its answer, though the request asked for none; turn that off")
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


def _wait_writable(link: socket.socket) -> Steps[bool]:
    """Wait until more can be written; return True where there is something to read first."""
    poller = select.poll()
    poller.register(link, select.POLLIN | select.POLLOUT)
    while True:
        if not (yield poller):
            raise TimeoutError
        events = poller.poll(0)
        if events:
            return bool(events[0][1] & (select.POLLIN | select.POLLHUP | select.POLLERR))
