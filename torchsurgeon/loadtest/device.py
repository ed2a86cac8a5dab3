"""One emulated device: a kept-alive connection that never blocks, and the requests that are due on it.

The answers of a server under load must not be slowed down by what measures them, so a device costs a few microseconds
for each request: it writes bytes that were made beforehand, and of an answer it reads only how it ended.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import httptools

from torchsurgeon.errors import short
from torchsurgeon.loadtest.target import Target

_READ = select.EPOLLIN
_BOTH = select.EPOLLIN | select.EPOLLOUT
_CHUNK_BYTES = 1 << 18
# The beginning of an answer that is kept: the durations that it tells, or the reason why the request was refused.
_KEPT_BYTES = 4096
_LATE = "no answer in time"
_TOLD = re.compile(rb'"queue_s":([0-9.e+-]+).*?"compute_s":([0-9.e+-]+)', re.DOTALL)


class Ended(NamedTuple):
    """How a request ended.

    Attributes:
        due_s: when it was due; None where no request was under way, and the connection could not be opened.
        end_s: when its last byte had arrived, or it had failed.
        error: the kind of error; empty for an answer with status 200.
        reason: what the server said of the error, or the system; may be empty.
        queue_s: how long the server says that it waited there; None where it does not say.
        compute_s: how long the server says that it ran; None where it does not say.
    """

    due_s: float | None
    end_s: float
    error: str = ""
    reason: str = ""
    queue_s: float | None = None
    compute_s: float | None = None


class Device:
    """One emulated device. Its requests are sent one after the other, each once the one before is answered.

    Args:
        target: the server.
        data: the request, which is always the same.
        poller: tells when the socket is ready.
        ended: called with the device and how its request ended. It must not call the device, which may still be at
            work; another request is begun by ``begin()`` later.

    Attributes:
        waiting: when those requests were due that have not been begun.
        ready: whether the connection is open.
        fd: the socket's file descriptor; -1 without a connection.
    """

    def __init__(
        self, target: Target, data: bytes, poller: select.epoll, ended: Callable[[Device, Ended], None]
    ) -> None:
        self._target, self._data, self._poller, self._ended = target, memoryview(data), poller, ended
        self.waiting: deque[float] = deque()
        self.ready = False
        self.fd = -1
        self._link: socket.socket | None = None
        self._connected = False
        self._mask = 0
        self._parser: Any = None
        self._due_s: float | None = None
        self._unsent = self._data[:0]
        self._kept = b""

    @property
    def busy(self) -> bool:
        """Whether a request is under way or waits."""
        return self._due_s is not None or bool(self.waiting)

    def begin(self) -> None:
        """Begin the next request, if one waits and none is under way. Open the connection if there is none."""
        if self._due_s is not None or not self.waiting:
            return
        self._due_s, self._kept, self._unsent = self.waiting.popleft(), b"", self._data
        if self._link is None:
            self.open()
        elif self.ready:
            self._guarded(self._write)

    def open(self) -> None:
        """Begin to open the connection."""
        self._guarded(self._connect)

    def event(self, mask: int) -> None:
        """Go on after the poller has told that the socket is ready.

        Args:
            mask: what the poller told.
        """
        self._guarded(self._go_on, mask)

    def give_up(self, before_s: float) -> None:
        """Fail the requests that were due before a moment, since their answers come too late.

        Args:
            before_s: the moment.
        """
        if self._due_s is not None and self._due_s < before_s:
            # An answer that still comes would be taken for that of the next request.
            self._fail(_LATE, "")
        while self.waiting and self.waiting[0] < before_s:
            self._ended(self, Ended(self.waiting.popleft(), time.perf_counter(), _LATE))

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._link is not None:
            if self.fd >= 0:
                self._poller.unregister(self.fd)
            self._link.close()
        self._link, self.fd = None, -1
        self._connected = self.ready = False

    def on_body(self, data: bytes) -> None:
        """Keep the beginning of an answer; called by the parser."""
        if len(self._kept) < _KEPT_BYTES:
            self._kept += data[: _KEPT_BYTES - len(self._kept)]

    def on_message_complete(self) -> None:
        """End the request; called by the parser."""
        status = self._parser.get_status_code()
        if status < 200 or self._due_s is None:
            return
        due_s, self._due_s, now_s = self._due_s, None, time.perf_counter()
        if self._unsent or not self._parser.should_keep_alive():
            # A server that refuses a request may answer before it has read all of it.
            self._unsent = self._data[:0]
            self.close()
        if status != 200:
            self._ended(self, Ended(due_s, now_s, f"HTTP {status}", self._kept.decode("utf-8", "replace")))
            return
        told = _TOLD.search(self._kept)
        queue_s, compute_s = (None, None) if told is None else (float(told[1]), float(told[2]))
        self._ended(self, Ended(due_s, now_s, queue_s=queue_s, compute_s=compute_s))

    def _guarded(self, step: Callable[..., None], *arguments: int) -> None:
        try:
            step(*arguments)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass  # a later event goes on
        except OSError as error:
            self._fail(_kind(error), short(error))
        except httptools.HttpParserError as error:
            self._fail("no valid HTTP", short(error))

    def _connect(self) -> None:
        link = self._link = socket.socket(self._target.family, socket.SOCK_STREAM)
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = link.connect_ex(self._target.address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        self._parser = httptools.HttpResponseParser(self)
        self._poller.register(link, _BOTH)
        self.fd, self._mask = link.fileno(), _BOTH

    def _go_on(self, mask: int) -> None:
        if not self.ready:
            self._open_further()
            self._write()
            return
        # Reading comes first: a server that refuses a request may answer and close before it has read all of it.
        if mask & ~select.EPOLLOUT:
            self._read()
        if mask & select.EPOLLOUT and self._unsent:
            self._write()

    def _open_further(self) -> None:
        link = self._link
        assert link is not None
        if not self._connected:
            code = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self._connected = True
            if self._target.context is not None:
                # It takes the descriptor over, so the poller goes on watching it.
                self._link = self._target.context.wrap_socket(
                    link, server_hostname=self._target.host, do_handshake_on_connect=False
                )
        if isinstance(self._link, ssl.SSLSocket):
            try:
                self._link.do_handshake()
            except ssl.SSLWantReadError:
                self._watch(_READ)
                raise
            except ssl.SSLWantWriteError:
                self._watch(_BOTH)
                raise
        self.ready = True
        self._watch(_READ)

    def _write(self) -> None:
        assert self._link is not None
        while self._unsent:
            try:
                self._unsent = self._unsent[self._link.send(self._unsent) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._watch(_BOTH)
                raise
        self._watch(_READ)

    def _read(self) -> None:
        while self._link is not None:
            data = self._link.recv(_CHUNK_BYTES)
            if not data:
                if self._due_s is None:
                    # The server has closed an idle connection, as it may at any time.
                    self.close()
                    return
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection before an answer")
            self._parser.feed_data(data)
            # A second read that finds nothing costs a system call. What was encrypted may lie here, decrypted already.
            if not (isinstance(self._link, ssl.SSLSocket) and self._link.pending()):
                return

    def _watch(self, mask: int) -> None:
        if mask != self._mask:
            self._mask = mask
            self._poller.modify(self.fd, mask)

    def _fail(self, error: str, reason: str) -> None:
        due_s, self._due_s, self._unsent = self._due_s, None, self._data[:0]
        idle = self.ready and due_s is None
        self.close()
        if not idle:
            self._ended(self, Ended(due_s, time.perf_counter(), error, reason))


def _kind(error: OSError) -> str:
    """Return in a few words what kind of error it is."""
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "connection broken"
    return error.strerror or type(error).__name__
