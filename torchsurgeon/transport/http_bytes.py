"""Bytes to a server and back, over HTTP and HTTPS; no tensor library is needed."""

from __future__ import annotations

import contextlib
import functools
import http.client
import math
import os
import re
import ssl
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import ProtocolError, ServerUnavailableError, short
from torchsurgeon.transport.base import ByteTransport, RawAnswer, check_status
from torchsurgeon.transport.connection import Connection, ProxyRefusedError, StaleError
from torchsurgeon.transport.control import ControlSession, get
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.route import route_to
from torchsurgeon.transport.steps import Steps, complete
from torchsurgeon.transport.trace_context import TRACEPARENT, traceparent
from torchsurgeon.transport.unreachable import in_words, unreachable
from torchsurgeon.wire.header import DEADLINE, HEADER_LENGTH, Buffer, parse_json

_MAX_IDLE = 32
# Statuses by which a proxy says that it has not got an answer from the server.
_PROXYS_OWN = (407, 502, 503, 504)
_ADVICE = {
    407: "it wants a user and a password; put them into the URL in the environment, http://USER:PASSWORD@HOST:PORT",
    502: "it cannot reach the server, or got no valid answer; is the server running?",
    503: "it cannot reach the server, or is busy; is the server running?",
    504: "the server gave it no answer in time; is the server running?",
}
# How urllib3 says that a proxy did not connect to the server.
_TUNNEL_FAILED = re.compile(r"Tunnel connection failed: (\d{3}) ?([^'\")]*)")


class HttpBytes(ByteTransport):
    """The way of bytes to a tail server over HTTP or HTTPS; ``HttpTransport`` is that of tensors.

    Args:
        url: as ``HttpTransport`` takes it, like all that follow.
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
        headers: sent with every request.
        ssl_context: how the inference path checks certificates.
        verify: how certificates are checked.
        token: sent with every request.
        cert: this side's certificate.

    Raises:
        ServerUnavailableError: ``url`` is not the URL of a server, or a certificate's file cannot be used.
        ProtocolError: ``token`` or a header holds a line break.

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
        token: str | None = None,
        cert: str | tuple[str, str] | None = None,
    ) -> None:
        super().__init__(timeout_s)
        if token is not None:
            # A file's last line break is no part of the token in it. The token itself is never quoted.
            token = token.strip() if isinstance(token, str) else ""
            if not token or not token.isascii() or not token.isprintable():
                raise ProtocolError("token= must be printable ASCII characters without a line break; correct it")
            headers = {**(headers or {}), "Authorization": f"Bearer {token}"}
        if verify is True:
            # What the environment names for requests holds for inference, too.
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._route = route = route_to(url)
        self.url = url.strip().rstrip("/")
        self._context = route.context(ssl_context or context_for(verify, cert))
        fixed = {"Host": route.netloc, "Content-Type": "application/octet-stream", **(headers or {})}
        if any("\r" in text or "\n" in text for pair in fixed.items() for text in pair):
            # A header may hold a secret, so its value is not quoted.
            raise ProtocolError("a header must not hold a line break; remove it from headers or url")
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed.items()) + route.headers
        self._new_session = functools.partial(ControlSession, headers or {}, verify, route.proxy_url, cert)
        # Reentrant: a signal handler may close this while the calling thread holds it.
        self._lock = threading.RLock()
        self._idle: list[Connection] = []
        self._controls: set[Deadline] = set()
        self._closed = False
        # The sockets of a transport that the program drops without closing it.
        self._end = weakref.finalize(self, _close_all, self._idle)
        _open.add(self)

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        """Return the JSON value at a path of the server; see ``ByteTransport.get_json()``."""
        self._check_open()
        self._route.check()
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        try:
            self._controls.add(deadline)
            status, body = get(self._new_session, self._route.url + path, deadline)
        except (TimeoutError, requests.RequestException) as error:
            if by_signal_handler(error):
                raise
            self._check_open()
            if isinstance(error, TimeoutError | requests.Timeout):
                raise self._late(deadline) from None
            refused = _TUNNEL_FAILED.search(str(error))
            if refused is not None:
                raise self._refused(int(refused[1]), refused[2]) from None
            raise self._gone(error) from error
        finally:
            self._controls.discard(deadline)
        self._check_proxy(status, memoryview(body))
        check_status(status, memoryview(body), path)
        return parse_json(body, f"the answer of {(self.url + path)[:300]}")

    def close(self) -> None:
        """Close every connection and end every control call that is under way. Closing twice is harmless."""
        with self._lock:
            self._closed = True
        _close_all(self._idle)
        for deadline in self._controls.copy():
            deadline.cancel()
        self._end.detach()

    def _post(
        self, path: str, header_bytes: int | None, buffers: list[Buffer], limit_bytes: int, deadline: Deadline
    ) -> RawAnswer:
        return complete(self._posting(path, header_bytes, buffers, limit_bytes, deadline), deadline)

    def _posting(
        self, path: str, header_bytes: int | None, buffers: list[Buffer], limit_bytes: int, deadline: Deadline
    ) -> Steps[RawAnswer]:
        self._route.check()
        size = sum(map(len, buffers))
        head = f"POST {self._route.target}{path} HTTP/1.1\r\n{self._fixed}Content-Length: {size}\r\n"
        if deadline.timeout_s < self.timeout_s:
            # Rounded up, so that the heads of similar requests are mostly the same, and the server parses fewer.
            head += f"{DEADLINE}: {_rounded_up(self._left_s(deadline))}\r\n"
        span = traceparent()
        if span is not None:
            head += f"{TRACEPARENT}: {span}\r\n"
        head += "\r\n" if header_bytes is None else f"{HEADER_LENGTH}: {header_bytes}\r\n\r\n"
        parts = [head.encode("latin-1") + buffers[0], *buffers[1:]]
        # What a signal handler raises may leave any of these lines, so the list holds each connection at every moment.
        used: list[Connection] = []
        try:
            reused = self._take(used)
            try:
                answer = yield from used[-1].exchange(parts, size, limit_bytes, deadline)
            except StaleError as error:
                if not reused or deadline.sent_bytes + size > deadline.most_bytes:
                    raise self._gone(error.__cause__) from error
                # A server may close a kept-alive connection at any moment, also while a request is on its way to it.
                # Nothing of an answer had arrived, so the request is sent once more, over a new connection.
                used.append(self._connection())
                answer = yield from used[-1].exchange(parts, size, limit_bytes, deadline)
            self._check_proxy(answer.status, answer.body)
            self._give_back(used)
            _close_all(used)
            return answer
        except BaseException as error:
            with self._lock:
                self._idle[:] = [one for one in self._idle if one not in used]
            _close_all(used)
            if by_signal_handler(error):
                raise
            if isinstance(error, ServerUnavailableError):
                raise
            if isinstance(error, TimeoutError):
                raise self._late(deadline) from None
            if isinstance(error, StaleError):
                raise self._gone(error.__cause__) from error
            if isinstance(error, ProxyRefusedError):
                raise self._refused(error.status, error.reason) from None
            if isinstance(error, http.client.IncompleteRead | OSError):
                raise self._gone(error) from error
            if isinstance(error, http.client.HTTPException):
                raise ProtocolError(
                    f"{self.url[:300]} does not answer{self._route.through} with valid HTTP: "
                    f"{type(error).__name__} {short(error)}"
                ) from error
            raise

    def _left_s(self, deadline: Deadline) -> float:
        try:
            return deadline.left_s()
        except TimeoutError as error:
            if by_signal_handler(error):
                raise
            raise self._late(deadline) from None

    def _reset_after_fork(self) -> None:
        """Replace all connections in a forked process: one shared with the parent would get the parent's answers.

        The lock is replaced too, since a thread of the parent may have held it during the fork.
        """
        self._lock = threading.RLock()
        _close_all(self._idle)

    def _connection(self) -> Connection:
        return Connection(self._route, self._context)

    def _take(self, used: list[Connection]) -> bool:
        """Add a connection to ``used``, and return whether it has been used before."""
        while True:
            with self._lock:
                self._check_open()
                if self._idle:
                    used.append(self._idle[-1])
                    del self._idle[-1:]
            if not used:
                used.append(self._connection())
                return False
            # Checked outside the lock: no other thread has this connection any more, and checking is a system call.
            if used[-1].usable():
                return True
            used.pop().close()

    def _give_back(self, used: list[Connection]) -> None:
        """Keep the last of the connections for the next request, if it is open."""
        with self._lock:
            if used[-1].open and len(self._idle) < _MAX_IDLE:
                self._idle.append(used[-1])
                del used[-1:]
            # Last, since a signal handler may close this at any moment.
            if self._closed:
                _close_all(self._idle)

    def _check_open(self) -> None:
        if self._closed:
            raise ServerUnavailableError(f"the transport to {self.url[:300]} has been closed; make a new one")

    def _check_proxy(self, status: int, body: memoryview) -> None:
        """Check that an answer is not the proxy's own, which says that it has not asked the server.

        A server of this protocol explains its errors in JSON, and a proxy in a page for people.
        """
        if self._route.proxy is None or status not in _PROXYS_OWN:
            return
        text = bytes(body[:2000]).lstrip()
        if status == 407 or not text.startswith(b'{"error"'):
            raise self._refused(status, http.client.responses.get(status, ""))

    def _refused(self, status: int, reason: str) -> ServerUnavailableError:
        advice = _ADVICE.get(status, "it does not let this connection pass")
        return ServerUnavailableError(
            f"the proxy {self._route.proxy} answered {status} {short(reason, 100, quote=False)} when asked for "
            f"{self.url[:300]}: {advice}"
        )

    def _late(self, deadline: Deadline) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"{self.url[:300]} gave no complete answer{self._route.through} within {deadline.timeout_s:g} s; the "
            "server may be down or busy, or the link too slow for this boundary: raise timeout_s"
        )

    def _gone(self, error: BaseException | None) -> ServerUnavailableError:
        return ServerUnavailableError(unreachable(error, self._route, self.url[:300]))


def context_for(verify: bool | str, cert: str | tuple[str, str] | None) -> ssl.SSLContext | None:
    """Return how certificates are checked; None for as the system does, without a certificate of this side.

    Args:
        verify: as ``HttpTransport`` takes it.
        cert: as ``HttpTransport`` takes it.

    Raises:
        ServerUnavailableError: a file cannot be used.
    """
    if verify is True and cert is None:
        return None
    trusted = verify if isinstance(verify, str) else None
    folder = trusted is not None and os.path.isdir(trusted)
    try:
        context = ssl.create_default_context(cafile=None if folder else trusted, capath=trusted if folder else None)
    except (OSError, ssl.SSLError) as error:
        raise ServerUnavailableError(
            f"the certificates to trust in {short(trusted)} cannot be used: {in_words(error)}; give a file in PEM "
            "format as ca= of SplitModule, verify= of HttpTransport, or --ca on the command line"
        ) from error
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if cert is not None:
        files = (cert,) if isinstance(cert, str) else tuple(cert)
        try:
            context.load_cert_chain(*files)
        except (OSError, ssl.SSLError) as error:
            named = " and ".join(short(file) for file in files)
            raise ServerUnavailableError(
                f"this side's certificate in {named} cannot be used: {_why_unusable(files, error)}"
            ) from error
    return context


def _why_unusable(files: Sequence[str], error: OSError) -> str:
    """Return what is wrong with a certificate's files, and what to do; OpenSSL does not say which file it is."""
    missing = next((file for file in files if not os.path.exists(file)), None)
    if missing is not None:
        return f"there is no file {short(missing)}; correct its name in cert="
    with contextlib.suppress(OSError):
        if b"PRIVATE KEY-----" not in Path(files[-1]).read_bytes():
            return f"{short(files[-1])} holds no key in PEM format; give both files as cert=(certificate, key)"
    return f"{in_words(error)}; give files in PEM format, of a certificate and of its own key"


def _rounded_up(seconds: float) -> str:
    """Return seconds with two digits, at least a millisecond; more only above a minute."""
    step = 10.0 ** max(-3, math.floor(math.log10(seconds)) - 1)
    return f"{math.ceil(seconds / step) * step:.3f}".rstrip("0").rstrip(".")


def _close_all(connections: list[Connection]) -> None:
    while connections:
        connections.pop().close()


# Every transport that exists, for a fork.
_open: weakref.WeakSet[HttpBytes] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_open):
        transport._reset_after_fork()


os.register_at_fork(after_in_child=_after_fork)
