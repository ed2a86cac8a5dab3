"""The control plane over HTTP: ``requests``, with one deadline for each call and a limit on the size of an answer.

``requests`` bounds every single wait only, so it would follow a server that sends byte by byte for ever, and it would
unpack a small compressed answer to any size.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from torchsurgeon._interrupts import start_thread
from torchsurgeon.errors import BodyTooLargeError, ProtocolError
from torchsurgeon.transport.base import CONTROL_LIMIT_BYTES
from torchsurgeon.transport.connection import CheckedResponse, shut_down
from torchsurgeon.transport.deadline import Deadline

T = TypeVar("T")

# The deadline of the call that each thread makes, where the connections below requests find it.
_calls = threading.local()


def get(new_session: Callable[[], requests.Session], url: str, deadline: Deadline) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a GET request.

    Args:
        new_session: makes the session. It is closed and freed in the thread that makes the call, since Python drops
            what a signal handler raises while some of its parts are freed.
        url: what to get.
        deadline: when the call has to be over.

    Raises:
        TimeoutError: the deadline passed, or was cancelled.
        requests.RequestException: the server did not answer, or not with HTTP.
        ProtocolError: the answer is compressed.
        BodyTooLargeError: the answer is larger than ``CONTROL_LIMIT_BYTES``.
    """

    def run() -> tuple[int, bytes]:
        _calls.deadline = deadline
        with (
            new_session() as session,
            session.get(url, timeout=deadline.left_s(), stream=True, allow_redirects=False) as response,
        ):
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ProtocolError(
                    f"{url[:300]} compressed its answer, though the request asked for none; turn that off"
                )
            received = bytearray()
            for piece in response.iter_content(1 << 16):
                received += piece
                if len(received) > CONTROL_LIMIT_BYTES:
                    raise BodyTooLargeError(
                        f"an answer may have at most {CONTROL_LIMIT_BYTES} bytes; {url[:300]} sent more"
                    )
            return response.status_code, bytes(received)

    return _within(deadline, run)


def _within(deadline: Deadline, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread of its own, since ``requests`` has no deadline; raise TimeoutError after it."""
    result: list[T] = []
    failure: list[BaseException] = []
    ended = threading.Lock()
    ended.acquire()

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failure.append(error)
        finally:
            deadline.interrupted_by(None)
            ended.release()

    start_thread(run, "torchsurgeon-control")
    try:
        ended.acquire(timeout=deadline.left_s())
    finally:
        if not (failure or result):
            # The thread would go on reading for as long as the server sends anything.
            deadline.cancel()
    if deadline.cancelled:
        raise TimeoutError
    if failure:
        raise failure[0]
    return result[0]


class ControlSession(requests.Session):
    """A session of ``requests`` whose connections end with the deadline of the call that uses them.

    Args:
        headers: sent with every request.
        verify: how certificates are checked, as ``requests`` takes it; True for the authorities that the system trusts.
        proxy: the URL of the proxy that is used; None to connect directly.
        cert: this side's certificate, as ``requests`` takes it; None for none.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        verify: bool | str,
        proxy: str | None,
        cert: str | tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.cert = cert
        self.headers.update({**headers, "Accept-Encoding": "identity"})
        # The environment is not asked again: what it named when the transport was made holds for inference, too.
        self.trust_env = False
        self.verify = verify
        if proxy is not None:
            self.proxies = {"http": proxy, "https": proxy}
        for scheme in ("http://", "https://"):
            self.mount(scheme, _DeadlineAdapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None, so no redirect is followed: ``requests`` would first read all of its body, without a limit."""


class _DeadlineAdapter(HTTPAdapter):
    """Makes ``requests`` open connections that a deadline can interrupt, directly and through HTTP proxies."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        super().cert_verify(conn, url, verify, cert)
        if verify is True:
            # The system's authorities, as for inference, in place of those that come with requests.
            conn.ca_certs = conn.ca_cert_dir = None

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        if not str(args[0] if args else kwargs["proxy"]).startswith("socks"):
            manager.pool_classes_by_scheme = _POOLS
        return manager


class _Interruptible:
    """A connection of urllib3 that is shut down once the deadline of its thread's call is cancelled."""

    sock: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._register()

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            self._register()
        super().request(*args, **kwargs)  # type: ignore[misc]

    def _register(self) -> None:
        deadline: Deadline = _calls.deadline
        deadline.interrupted_by(functools.partial(shut_down, self.sock))


class _InterruptibleHttp(_Interruptible, HTTPConnection):
    response_class = CheckedResponse


class _InterruptibleHttps(_Interruptible, HTTPSConnection):
    response_class = CheckedResponse


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _InterruptibleHttp


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _InterruptibleHttps


_POOLS = {"http": _HttpPool, "https": _HttpsPool}
