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
from torchsurgeon.errors import ProtocolError, ServerUnavailableError, short
from torchsurgeon.transport.base import Deadline, RawAnswer, Transport, check_status
from torchsurgeon.transport.connection import Connection, StaleError
from torchsurgeon.transport.control import ControlSession, get

_MAX_IDLE = 16


class HttpTransport(Transport):
    """The way to a tail server over HTTP or HTTPS. Inference connects directly, never through a proxy.

    Args:
        url: ``http://host:port`` or ``https://host:port``; a path may follow, which precedes every path of the server.
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
        headers: sent with every request, such as a token.
        ssl_context: how the inference path checks certificates; as the system does by default.
        verify: how the control plane checks certificates, as ``requests`` takes it.

    Raises:
        ServerUnavailableError: ``url`` is not the URL of a server.
        ProtocolError: a header holds a line break.

    Attributes:
        url: the URL, without a slash at its end.
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
            raise ServerUnavailableError(f"{short(url)} is not a server's URL; write it like http://127.0.0.1:8000")
        self._address = (parts.hostname, port or (443 if parts.scheme == "https" else 80))
        self._context = (ssl_context or ssl.create_default_context()) if parts.scheme == "https" else None
        self._prefix = parts.path
        fixed = {"Host": parts.netloc, "Content-Type": "application/octet-stream", **(headers or {})}
        if any("\r" in text or "\n" in text for pair in fixed.items() for text in pair):
            # A header may hold a secret, so its value is not quoted.
            raise ProtocolError("a header must not hold a line break; remove it from headers or url")
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
        """Return the JSON value at a path of the server; see ``Transport.get_json()``."""
        self._check_open()
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        self._controls.add(deadline)
        try:
            status, body = get(self._session, self.url + path, deadline)
        except (TimeoutError, requests.Timeout):
            self._check_open()
            raise self._late(deadline) from None
        except requests.RequestException as error:
            raise self._gone(error) from error
        check_status(status, memoryview(body), path)
        return wire.parse_json(body, f"the answer of {(self.url + path)[:300]}")

    def close(self) -> None:
        """Close every connection and end every control call that is under way. Closing twice is harmless."""
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
                # A server may close a kept-alive connection at any moment. Nothing of an answer had arrived, so the
                # request is sent once more, over a new connection.
                connection, reused = self._connection(), False
                continue
            except BaseException as error:
                connection.close()
                if isinstance(error, TimeoutError):
                    raise self._late(deadline) from None
                if isinstance(error, http.client.IncompleteRead | OSError):
                    raise self._gone(error) from error
                if isinstance(error, http.client.HTTPException):
                    raise ProtocolError(
                        f"{self.url[:300]} does not answer with valid HTTP: {type(error).__name__} {short(error)}"
                    ) from error
                raise
            self._give_back(connection)
            return answer

    def _reset_after_fork(self) -> None:
        """Replace all connections in a forked process: one shared with the parent would get the parent's answers.

        The lock is replaced too, since a thread of the parent may have held it during the fork.
        """
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
            # Checked outside the lock: no other thread has this connection any more, and checking is a system call.
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
            raise ServerUnavailableError(f"the transport to {self.url[:300]} has been closed; make a new one")

    def _late(self, deadline: Deadline) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"{self.url[:300]} gave no complete answer within {deadline.timeout_s:g} s; the server may be down or busy,"
            " or the link too slow for this boundary: raise timeout_s"
        )

    def _gone(self, error: BaseException | None) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"{self.url[:300]} does not answer, or broke off ({_reason(error)}); is the server running?"
        )


def _reason(error: BaseException | None) -> str:
    """Return what went wrong, in the words of the system where they are known.

    requests and urllib3 wrap the system's error in several of their own, whose texts name internal objects.
    """
    inner = error
    for _ in range(8):
        if inner is None or (isinstance(inner, OSError) and inner.strerror):
            break
        wrapped = [getattr(inner, "reason", None), *inner.args]
        inner = next((one for one in wrapped if isinstance(one, BaseException)), None) or inner.__cause__
    if isinstance(inner, OSError) and inner.strerror:
        return f"{type(inner).__name__}: {short(inner.strerror, quote=False)}"
    return f"{type(error).__name__}: {short(error)}"


# Every transport that exists, for a fork.
_open: weakref.WeakSet[HttpTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_open):
        transport._reset_after_fork()


os.register_at_fork(after_in_child=_after_fork)
