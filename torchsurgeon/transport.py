"""Transports carry named tensors to a tail server and its answer back.

:class:`HttpTransport` keeps two paths apart. The control plane (handshake, metadata, profiles) goes through
``requests``, with its proxies and certificates. Inference goes through kept-alive sockets of its own, one per thread
in use: tensors are written from their own memory with ``sendmsg`` and the answer is read straight into the buffer whose
views the caller gets. Every call has one deadline for all of it, so a server that trickles cannot extend it.

:class:`InProcessTransport` calls an ASGI application directly: client and server meet in one process, without sockets.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import io
import json
import os
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import requests
import torch
from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.errors import BodyTooLargeError, ProtocolError, RequestRefusedError, ServerUnavailableError

T = TypeVar("T")

_CONTROL_LIMIT_BYTES = 64 << 20
_ERROR_LIMIT_BYTES = 64 << 10
_MAX_IDLE = 16
_IOV_MAX = 512
_SCRATCH_BYTES = 16 << 10
# A connection used this recently is taken to be open; the check costs a system call.
_FRESH_S = 1.0
_HEADER_LENGTH = wire.HEADER_LENGTH.lower().encode()


@dataclass(frozen=True)
class Timing:
    """When one exchange happened (seconds of ``time.perf_counter``) and how many body bytes it moved."""

    sent_bytes: int
    received_bytes: int
    send_start_s: float
    send_end_s: float
    first_byte_s: float
    end_s: float


@dataclass(frozen=True)
class Answer:
    """The outputs of one inference by name, the server's parameters (``queue_s``, ``compute_s``, …), and the timing."""

    tensors: dict[str, Tensor]
    parameters: Mapping[str, Any]
    timing: Timing


@dataclass(frozen=True)
class RawAnswer:
    """One HTTP answer. ``body`` is writable memory of just its size; ``header_bytes`` is the v2 extension's header."""

    status: int
    header_bytes: str | None
    body: memoryview
    timing: Timing


class Transport(ABC):
    """What a device needs of a tail server. Thread-safe; closing twice is harmless; also a context manager."""

    def __init__(self, timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s

    @abstractmethod
    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON at ``path``. Raises ServerUnavailableError, RequestRefusedError or ProtocolError."""

    @abstractmethod
    def post_json(self, path: str, value: Any, *, timeout_s: float | None = None) -> Any:
        """Post ``value`` as JSON and return the JSON answer. Raises like :meth:`get_json`."""

    @abstractmethod
    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: _Deadline
    ) -> RawAnswer:
        """Post buffers as one binary body; an answer above ``limit_bytes`` is not read."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection. Calls after this raise ServerUnavailableError."""

    def infer(
        self,
        model: str,
        tensors: Mapping[str, Tensor],
        *,
        max_answer_bytes: int,
        version: str | None = None,
        outputs: Collection[str] = (),
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Send named tensors and return the outputs (all of them unless ``outputs`` names some).

        ``max_answer_bytes`` is what the outputs' tensors can have together; a longer answer is refused unread.
        Raises ServerUnavailableError when nothing complete came within ``timeout_s``, RequestRefusedError when the
        server answered with an error, ProtocolError when the answer is not one of this protocol.
        """
        deadline = _Deadline(self.timeout_s if timeout_s is None else timeout_s)
        message = wire.encode_request(tensors, outputs=outputs, request_id=request_id, parameters=parameters)
        path = _infer_path(model, version)
        raw = self._post(
            path, message.header_bytes, message.buffers, max_answer_bytes + wire.MAX_HEADER_BYTES, deadline
        )
        _check_status(raw.status, raw.body, path)
        length = None if raw.header_bytes is None else wire.header_length(raw.header_bytes, len(raw.body))
        response = wire.decode_response(raw.body, length)
        return Answer(response.tensors, response.parameters, raw.timing)

    def probe(self, up_bytes: int, down_bytes: int, *, timeout_s: float | None = None) -> Timing:
        """Move that many bytes each way and time it, to measure the link. The server bounds both."""
        deadline = _Deadline(self.timeout_s if timeout_s is None else timeout_s)
        path = f"/v2/probe?down={down_bytes}"
        raw = self._post(path, None, [os.urandom(up_bytes)], down_bytes + _ERROR_LIMIT_BYTES, deadline)
        _check_status(raw.status, raw.body, path)
        return raw.timing

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HttpTransport(Transport):
    """A tail server at ``url`` (``http://host:port`` or ``https://…``, a path prefix allowed).

    ``timeout_s`` bounds each call as a whole. ``headers`` (a token, say) are sent with every request. For https,
    ``ssl_context`` replaces the system's trust on the inference path, and ``verify`` is handed to ``requests`` for the
    control plane. The inference path connects directly, never through a proxy.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 30.0,
        *,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        verify: bool | str = True,
    ) -> None:
        super().__init__(timeout_s)
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.username:
            raise ServerUnavailableError(f"{url!r} is not a server's URL; write it like http://127.0.0.1:8000")
        self._address = (parts.hostname, port or (443 if parts.scheme == "https" else 80))
        self._context = (ssl_context or ssl.create_default_context()) if parts.scheme == "https" else None
        self._prefix = parts.path
        fixed = {"Host": parts.netloc, "Content-Type": "application/octet-stream", **(headers or {})}
        if any("\r" in text or "\n" in text for pair in fixed.items() for text in pair):
            raise ProtocolError("a header may not hold line breaks")
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        self._session = requests.Session()
        self._session.headers.update(headers or {})
        self._session.verify = verify
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):
            self._session.trust_env = False
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._closed = False

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self._control("GET", path, None, timeout_s)

    def post_json(self, path: str, value: Any, *, timeout_s: float | None = None) -> Any:
        return self._control("POST", path, value, timeout_s)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._session.close()

    def _control(self, method: str, path: str, value: Any, timeout_s: float | None) -> Any:
        self._check_open()
        deadline = _Deadline(self.timeout_s if timeout_s is None else timeout_s)

        def exchange() -> tuple[int, bytes]:
            body = None if value is None else json.dumps(value, allow_nan=False).encode()
            with self._session.request(
                method,
                self.url + path,
                data=body,
                headers={"Content-Type": "application/json"} if body is not None else None,
                timeout=deadline.left_s(),
                stream=True,
                allow_redirects=False,
            ) as response:
                received = bytearray()
                for piece in response.iter_content(1 << 16):
                    received += piece
                    if len(received) > _CONTROL_LIMIT_BYTES:
                        raise BodyTooLargeError(f"{self.url}{path} answered more than {_CONTROL_LIMIT_BYTES} bytes")
                return response.status_code, bytes(received)

        try:
            status, body = _within(deadline, exchange)
        except (TimeoutError, requests.Timeout):
            raise self._late(deadline) from None
        except requests.RequestException as error:
            raise ServerUnavailableError(f"{self.url} cannot be reached: {error}; is the server running?") from error
        _check_status(status, memoryview(body), path)
        return wire.parse_json(body, f"the answer of {self.url}{path}")

    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: _Deadline
    ) -> RawAnswer:
        size = sum(map(len, buffers))
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._fixed}Content-Length: {size}\r\n"
        head += "\r\n" if header_bytes is None else f"{wire.HEADER_LENGTH}: {header_bytes}\r\n\r\n"
        parts = [head.encode("latin-1") + buffers[0], *buffers[1:]]
        connection, reused = self._take()
        while True:
            try:
                answer = connection.exchange(parts, size, limit_bytes, deadline)
            except _StaleError as error:
                connection.close()
                if not reused:
                    raise self._gone(error.__cause__) from error
                # The server may close a kept-alive connection at any moment; that is no failure of this request.
                connection, reused = self._connection(), False
                continue
            except BaseException as error:
                connection.close()
                if isinstance(error, TimeoutError):
                    raise self._late(deadline) from None
                if isinstance(error, http.client.IncompleteRead | OSError):
                    raise self._gone(error) from error
                if isinstance(error, http.client.HTTPException):
                    raise ProtocolError(f"what answers at {self.url} does not speak HTTP: {error!r}") from error
                raise
            self._give_back(connection)
            return answer

    def _connection(self) -> _Connection:
        return _Connection(self._address, self._context)

    def _take(self) -> tuple[_Connection, bool]:
        while True:
            with self._lock:
                self._check_open()
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connection(), False
            if connection.usable():
                return connection, True
            connection.close()

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            if connection.open and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerUnavailableError(f"the transport to {self.url} has been closed")

    def _late(self, deadline: _Deadline) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"{self.url} gave no complete answer within {deadline.timeout_s:g} s; it may be down or busy, or the link "
            "too slow for this boundary (raise timeout_s)"
        )

    def _gone(self, error: BaseException | None) -> ServerUnavailableError:
        return ServerUnavailableError(f"{self.url} cannot be reached or broke off: {error!r}; is the server running?")


class InProcessTransport(Transport):
    """A tail server in the same process: an ASGI application, called on an event loop in a thread of its own."""

    def __init__(self, app: Callable[..., Any], timeout_s: float = 30.0) -> None:
        super().__init__(timeout_s)
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torchsurgeon-in-process", daemon=True)
        self._thread.start()

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self._json("GET", path, b"", timeout_s)

    def post_json(self, path: str, value: Any, *, timeout_s: float | None = None) -> Any:
        return self._json("POST", path, json.dumps(value, allow_nan=False).encode(), timeout_s)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _json(self, method: str, path: str, body: bytes, timeout_s: float | None) -> Any:
        deadline = _Deadline(self.timeout_s if timeout_s is None else timeout_s)
        raw = self._call(method, path, {"Content-Type": "application/json"}, [body], _CONTROL_LIMIT_BYTES, deadline)
        _check_status(raw.status, raw.body, path)
        return wire.parse_json(raw.body, f"the answer of {path}")

    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: _Deadline
    ) -> RawAnswer:
        headers = {"Content-Type": "application/octet-stream"}
        if header_bytes is not None:
            headers[wire.HEADER_LENGTH] = str(header_bytes)
        return self._call("POST", path, headers, buffers, limit_bytes, deadline)

    def _call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        buffers: list[wire.Buffer],
        limit_bytes: int,
        deadline: _Deadline,
    ) -> RawAnswer:
        if self._loop.is_closed():
            raise ServerUnavailableError("the in-process transport has been closed")
        future = asyncio.run_coroutine_threadsafe(self._drive(method, path, headers, buffers, limit_bytes), self._loop)
        try:
            return future.result(deadline.left_s())
        except (TimeoutError, concurrent.futures.TimeoutError):
            future.cancel()
            raise ServerUnavailableError(f"no complete answer within {deadline.timeout_s:g} s") from None

    async def _drive(
        self, method: str, path: str, headers: Mapping[str, str], buffers: list[wire.Buffer], limit_bytes: int
    ) -> RawAnswer:
        plain, _, query = path.partition("?")
        size = sum(len(buffer) for buffer in buffers)
        sent = {"host": "in-process", "content-length": str(size), **{k.lower(): v for k, v in headers.items()}}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": plain,
            "raw_path": plain.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": None,
            "server": None,
        }
        pending = [bytes(buffer) for buffer in buffers]
        start = time.perf_counter()
        first = 0.0
        status = 0
        answered: dict[bytes, bytes] = {}
        body = bytearray()

        async def receive() -> dict[str, Any]:
            if not pending:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": pending.pop(0), "more_body": bool(pending)}

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status, first, answered
            if message["type"] == "http.response.start":
                status, first = message["status"], time.perf_counter()
                answered = {name.lower(): value for name, value in message.get("headers", [])}
            else:
                body.extend(message.get("body", b""))
                _check_size(len(body), limit_bytes, "the in-process server")

        await self._app(scope, receive, send)
        length = answered.get(wire.HEADER_LENGTH.lower().encode())
        buffer = _aligned(len(body))
        buffer[:] = body
        timing = Timing(size, len(body), start, start, first, time.perf_counter())
        return RawAnswer(status, None if length is None else length.decode("latin-1"), buffer, timing)


@lru_cache(maxsize=256)
def _infer_path(model: str, version: str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}/infer" if version else f"{path}/infer"


class _StaleError(Exception):
    """The connection broke before any byte of the answer."""


class _Deadline:
    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left; raises TimeoutError when there are none, since a socket timeout of 0 means non-blocking."""
        left = self._end_s - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Connection:
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

    def exchange(self, parts: list[wire.Buffer], size: int, limit_bytes: int, deadline: _Deadline) -> RawAnswer:
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
                raise _StaleError from (broken or error)
            raise
        status, headers = _simple_head(head)
        length = headers.get(b"content-length", b"")
        if status and length.isdigit() and len(length) < 16:
            _check_size(int(length), limit_bytes if status < 300 else _ERROR_LIMIT_BYTES, "the server")
            body = _aligned(int(length))
            _fill(body, rest, lambda view: self._receive(link, view, deadline))
            header_bytes = headers.get(_HEADER_LENGTH, b"").decode("latin-1") or None
            closing = headers.get(b"connection", b"").lower() != b"keep-alive" and b"connection" in headers
            closing = closing or len(rest) > len(body)
        else:
            source = _Replay(bytes(head) + bytes(rest), lambda view: self._receive(link, view, deadline))
            response = http.client.HTTPResponse(source, method="POST")  # type: ignore[arg-type]
            response.begin()
            body = _read_body(response, limit_bytes if response.status < 300 else _ERROR_LIMIT_BYTES)
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

    def _connect(self, deadline: _Deadline) -> socket.socket:
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

    def _send(self, link: socket.socket, parts: list[wire.Buffer], deadline: _Deadline) -> bool:
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

    def _receive(self, link: socket.socket, view: memoryview, deadline: _Deadline) -> int:
        """Read what there is, at least a byte, before the deadline; 0 at the end of the stream."""
        if self._context is not None:
            link.settimeout(deadline.left_s())
        elif self._incoming is not None and not self._incoming.poll(deadline.left_s() * 1000):
            raise TimeoutError
        count = link.recv_into(view)
        if not self._first_byte_s and count:
            self._first_byte_s = time.perf_counter()
        return count

    def _read_head(self, link: socket.socket, deadline: _Deadline) -> tuple[memoryview, memoryview]:
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


def _open_socket(address: tuple[str, int], deadline: _Deadline) -> socket.socket:
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
        _check_size(response.length, limit_bytes, "the server")
    received = bytearray()
    while piece := response.read(min(1 << 16, limit_bytes + 1 - len(received))):
        received += piece
        _check_size(len(received), limit_bytes, "the server")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    body = _aligned(len(received))
    body[:] = received
    return body


def _aligned(size: int) -> memoryview:
    # torch aligns its memory to 64 bytes, so the tensors decoded from it are aligned too.
    return torch.empty(size, dtype=torch.uint8).numpy().data


def _check_size(size: int, limit_bytes: int, who: str) -> None:
    if size > limit_bytes:
        raise BodyTooLargeError(f"{who} answers with {size} bytes, but the outputs can have at most {limit_bytes}")


def _check_status(status: int, body: memoryview, path: str) -> None:
    if 200 <= status < 300:
        return
    text = bytes(body[:2000]).decode("utf-8", "replace").strip()
    try:
        parsed = json.loads(text)
        text = str(parsed["error"])
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise RequestRefusedError(f"the server answered {status} to {path}: {text or 'no reason given'}", status)


def _wait_writable(link: socket.socket, deadline: _Deadline) -> bool:
    """Wait until more can be written; True when there is something to read first."""
    poller = select.poll()
    poller.register(link, select.POLLIN | select.POLLOUT)
    while True:
        events = poller.poll(deadline.left_s() * 1000)
        if events:
            return bool(events[0][1] & (select.POLLIN | select.POLLHUP | select.POLLERR))


def _within(deadline: _Deadline, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread, since ``requests`` knows no deadline; TimeoutError once it has passed."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="torchsurgeon-control", daemon=True)
    thread.start()
    thread.join(deadline.left_s())
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError
    return result[0]
