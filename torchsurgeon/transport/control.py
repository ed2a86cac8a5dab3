"""The control plane: ``requests``, but for no longer than a deadline and no more bytes than a limit, whatever a server
does. ``requests`` itself bounds every wait, and so neither a trickle nor what an answer unpacks to."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from torchsurgeon.errors import BodyTooLargeError, ProtocolError
from torchsurgeon.transport.base import CONTROL_LIMIT_BYTES, Deadline
from torchsurgeon.transport.connection import CheckedResponse, shut_down

T = TypeVar("T")

_here = threading.local()


def get(session: requests.Session, url: str, deadline: Deadline) -> tuple[int, bytes]:
    """Return status and body of the answer.

    Raises TimeoutError once the deadline has passed, BodyTooLargeError, ProtocolError for a compressed answer, and what
    ``requests`` raises.
    """

    def run() -> tuple[int, bytes]:
        _here.deadline = deadline
        with session.get(url, timeout=deadline.left_s(), stream=True, allow_redirects=False) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ProtocolError(f"{url} compressed an answer that did not ask for it")
            received = bytearray()
            for piece in response.iter_content(1 << 16):
                received += piece
                if len(received) > CONTROL_LIMIT_BYTES:
                    raise BodyTooLargeError(f"{url} answered more than {CONTROL_LIMIT_BYTES} bytes")
            return response.status_code, bytes(received)

    return _within(deadline, run)


def _within(deadline: Deadline, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread, since ``requests`` knows no deadline; TimeoutError once it has passed."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failure.append(error)
        finally:
            deadline.interrupted_by(None)

    thread = threading.Thread(target=run, name="torchsurgeon-control", daemon=True)
    thread.start()
    try:
        thread.join(deadline.left_s())
    finally:
        if not (failure or result):
            # The thread would read on for as long as the server trickles.
            deadline.cancel()
    if deadline.cancelled:
        raise TimeoutError
    if failure:
        raise failure[0]
    return result[0]


class ControlSession(requests.Session):
    """A session whose connections are ended with the deadline of the call that uses them."""

    def __init__(self, headers: Mapping[str, str], verify: bool | str, *, direct: bool) -> None:
        super().__init__()
        self.headers.update({**headers, "Accept-Encoding": "identity"})
        self.verify = verify
        self.trust_env = not direct
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: to find out where a redirect leads, ``requests`` would first read all of its body."""


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        if not str(args[0] if args else kwargs["proxy"]).startswith("socks"):
            manager.pool_classes_by_scheme = _POOLS
        return manager


class _Interruptible:
    """A connection of urllib3 that the deadline of this thread's call ends."""

    sock: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._interrupted()

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            self._interrupted()
        super().request(*args, **kwargs)  # type: ignore[misc]

    def _interrupted(self) -> None:
        deadline: Deadline = _here.deadline
        deadline.interrupted_by(functools.partial(shut_down, self.sock))


class _Plain(_Interruptible, HTTPConnection):
    response_class = CheckedResponse


class _Secure(_Interruptible, HTTPSConnection):
    response_class = CheckedResponse


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _Secure


_POOLS = {"http": _PlainPool, "https": _SecurePool}
