"""The transport over HTTP and HTTPS."""

from __future__ import annotations

import functools
import http.client
import os
import ssl
import threading
import weakref
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from torchsurgeon import wire
from torchsurgeon.errors import ProtocolError, ServerUnavailableError
from torchsurgeon.transport.base import Deadline, RawAnswer, Transport, check_status
from torchsurgeon.transport.connection import Connection, StaleError
from torchsurgeon.transport.control import ControlSession, get

_MAX_IDLE = 16


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
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._new_session = functools.partial(ControlSession, headers or {}, verify, direct=local)
        self._session = self._new_session()
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._controls: weakref.WeakSet[Deadline] = weakref.WeakSet()
        self._closed = False
        _open.add(self)

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        self._check_open()
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        self._controls.add(deadline)
        try:
            status, body = get(self._session, self.url + path, deadline)
        except (TimeoutError, requests.Timeout):
            self._check_open()
            raise self._late(deadline) from None
        except requests.RequestException as error:
            raise ServerUnavailableError(f"{self.url} cannot be reached: {error}; is the server running?") from error
        check_status(status, memoryview(body), path)
        return wire.parse_json(body, f"the answer of {self.url}{path}")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        for deadline in list(self._controls):
            deadline.cancel()
        self._session.close()

    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: Deadline
    ) -> RawAnswer:
        size = sum(map(len, buffers))
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._fixed}Content-Length: {size}\r\n"
        head += "\r\n" if header_bytes is None else f"{wire.HEADER_LENGTH}: {header_bytes}\r\n\r\n"
        parts = [head.encode("latin-1") + buffers[0], *buffers[1:]]
        connection, reused = self._take()
        while True:
            try:
                answer = connection.exchange(parts, size, limit_bytes, deadline)
            except StaleError as error:
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

    def _start_anew(self) -> None:
        """Leave the connections to the process this one was forked from; who shares one gets the other's answers."""
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._session = self._new_session()

    def _connection(self) -> Connection:
        return Connection(self._address, self._context)

    def _take(self) -> tuple[Connection, bool]:
        while True:
            with self._lock:
                self._check_open()
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connection(), False
            if connection.usable():
                return connection, True
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if connection.open and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerUnavailableError(f"the transport to {self.url} has been closed")

    def _late(self, deadline: Deadline) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"{self.url} gave no complete answer within {deadline.timeout_s:g} s; it may be down or busy, or the link "
            "too slow for this boundary (raise timeout_s)"
        )

    def _gone(self, error: BaseException | None) -> ServerUnavailableError:
        return ServerUnavailableError(f"{self.url} cannot be reached or broke off: {error!r}; is the server running?")


_open: weakref.WeakSet[HttpTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_open):
        transport._start_anew()


os.register_at_fork(after_in_child=_after_fork)
