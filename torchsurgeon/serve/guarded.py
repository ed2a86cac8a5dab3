"""uvicorn's HTTP protocol, guarded against what a client may do to it.

* A request's head has to arrive within ``HEAD_TIMEOUT_S``, and ``heads`` limits its size.
* A client has ``ANSWER_TIMEOUT_S`` to read an answer, and the time of what is left then at 16 KiB/s.
* While requests wait for earlier ones on their connection, nothing is read; and only ``MAX_WAITING`` may wait.
* ``connections`` decides which connection is closed where there are too many.
* What is no request is answered in JSON, and an upgrade that a client offers is ignored.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.serve.body import LINGER_BYTES, LINGER_S, timeout_for
from torchsurgeon.serve.connections import Connections
from torchsurgeon.serve.direct import Job, reply_head, with_id
from torchsurgeon.serve.failure import (
    HeadTooLargeError,
    LateError,
    TransferCodingError,
    VersionError,
    complain,
    error_body,
    status_of,
)
from torchsurgeon.serve.heads import HeadMeter, check_head
from torchsurgeon.serve.outcome import Listener, Outcome
from torchsurgeon.serve.received import REQUEST_ID, address_text, given_id, new_id
from torchsurgeon.serve.replies import only_health

HEAD_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
# So many requests of one connection may wait for the answers to earlier ones. One piece of data can hold very many.
MAX_WAITING = 100
_UPGRADE = (b"upgrade", b"http2-settings")
_REFUSED = (HeadTooLargeError, ProtocolError, TransferCodingError, VersionError)


@dataclass
class Fed:
    """What the parser found in one piece of data: requests that began, and bytes of bodies."""

    begun: int = 0
    body_bytes: int = 0


class TooManyWaitingError(Exception):
    """A client has sent more requests than may wait for the answers to earlier ones."""


class _Flow(FlowControl):
    """Reads nothing while requests wait for the answers to earlier ones on their connection.

    uvicorn pauses reading when a request has to wait, but goes on after every answer, and whenever the application asks
    for a body. A client that sends faster than it is answered could then have any number of requests kept.

    Args:
        transport: the connection's transport.
        waiting: the requests that wait.
        clock: the event loop's clock.

    Attributes:
        resumed_s: when it last began to read again.
    """

    def __init__(self, transport: asyncio.Transport, waiting: Sized, clock: Callable[[], float]) -> None:
        super().__init__(transport)
        self._waiting = waiting
        self._clock = clock
        self.resumed_s = -math.inf

    def resume_reading(self) -> None:
        """Read on, unless requests wait."""
        if self.read_paused and not self._waiting:
            self.resumed_s = self._clock()
            super().resume_reading()


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A subclass hands every piece of data to ``feed()``, or to ``_drop()`` after an error.

    Args:
        connections: all connections of the server.
        listeners: who is told what became of each request.
        *args: passed on to uvicorn's protocol.
        **kwargs: passed on to uvicorn's protocol.

    Attributes:
        address: the client's address; empty where it has none.
        peer: the client's address and port.
        spare: whether it is above the limit, so that nothing but health is answered.
        answered: whether a request was ever answered.
    """

    def __init__(self, connections: Connections, listeners: list[Listener], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._all = connections
        self._listeners = listeners
        self.address = self.peer = ""
        self.spare = self.answered = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._idle_since_s = 0.0
        self._in_head = self._in_message = self._draining = False
        # Whether the head of the last request that began has come.
        self._head_known = False
        self._fed = Fed()
        self._head = HeadMeter()
        # Bytes that are still read and dropped after an error, before the connection is closed; None before an error.
        self._dropping: int | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the connection; called by asyncio."""
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport, self.pipeline, self.loop.time)
        # What writes to the socket. Over TLS that is another transport below, by which alone one sees what is not sent.
        self._wire: asyncio.Transport = getattr(getattr(transport, "_ssl_protocol", None), "_transport", transport)
        self._idle_since_s = self.loop.time()
        if self.client:
            self.address, self.peer = self.client[0], address_text(self.client)
        self._all.arrived(transport.get_extra_info("socket").fileno())
        self._all.add(self)
        if self.spare:
            self.app = only_health(self.app, self._all.why_spare)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release timers; called by asyncio."""
        super().connection_lost(exc)
        self._all.remove(self)
        self._stop_timers()

    @property
    def idle_since_s(self) -> float | None:
        """Since when the connection waits for a whole head.

        None while a body arrives, while a request is answered, and until its client has taken all of the answer.
        """
        answering = self.unsent_bytes > 0 or (self.cycle is not None and not self.cycle.response_complete)
        return None if answering else self._idle_since_s

    @property
    def unsent_bytes(self) -> int:
        """How many bytes of answers wait until the client takes more."""
        return self._wire.get_write_buffer_size()

    def close(self) -> None:
        """Close the connection once what was written is sent, or once its client has had its time to take that."""
        if not self.transport.is_closing():
            self.transport.close()
        if self.unsent_bytes:
            self._expect_reader()

    def abort(self) -> None:
        """Close the connection at once."""
        self._wire.abort()

    def drain(self) -> None:
        """Close the connection after its next answer, which says so."""
        self._draining = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """Note that a request was answered; called by uvicorn."""
        self.answered = True
        self._idle_since_s = self.loop.time()
        last = self._dropping is not None and not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            self.close()
        elif last:
            self._linger()

    def pause_writing(self) -> None:
        """Note that the client takes less than is written; called by asyncio."""
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        """Note that the client has taken nearly all; called by asyncio."""
        super().resume_writing()
        # Only now can the client send its next request.
        self._idle_since_s = self.loop.time()
        if self._reader_timer is not None and not self.transport.is_closing():
            self._reader_timer.cancel()
            self._reader_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing has come for the keep-alive time; called by uvicorn."""
        self.close()

    def _expect_reader(self) -> None:
        """Cut the connection off if its client does not read: what is kept for it, and its place, are others' too."""
        if self._reader_timer is None:
            self._reader_timer = self.loop.call_later(ANSWER_TIMEOUT_S, self._reader_slow)

    def _reader_slow(self) -> None:
        self._reader_timer = self.loop.call_later(timeout_for(0.0, self.unsent_bytes), self._reader_late)

    def _reader_late(self) -> None:
        self._reader_timer = None
        about = {"client": self.peer}
        complain("slow reader", "cutting off a client that does not read its answer", about, None, logging.WARNING)
        self.abort()

    def feed(self, data: memoryview) -> bool:
        """Parse a piece of data, and return whether the connection goes on."""
        self._fed = Fed()
        self.data_received(data)  # type: ignore[arg-type]
        if self._dropping is not None or self.transport.is_closing():
            return False
        if self._in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._late)
        return True

    def data_received(self, data: bytes) -> None:
        """Parse a piece of data, and refuse what is no request, or has too large a head."""
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
            if self._fed.body_bytes:
                self._head.body()
            elif self._in_message and not self._fed.begun:
                self._head.piece(len(data))
        except _REFUSED as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _REFUSED):
                self._refuse(error.__context__)
            elif isinstance(error.__context__, TooManyWaitingError):
                self._end_after_answers(error.__context__)
            elif "HTTP version" in str(error):
                self._refuse(VersionError("the version must be HTTP/1.1 or HTTP/1.0"))
            else:
                self._refuse(ProtocolError(f"the request is not valid HTTP/1.1: {short(error)}"))

    def _parse(self, data: bytes) -> None:
        """Parse a piece of data. A server may ignore an upgrade that its client offers (RFC 9110, section 7.8)."""
        rest = self._parse_to_upgrade(data)
        # One piece can hold a thousand such requests, so this must be no recursion, and must not copy what follows.
        while rest is not None:
            self._parse_without_upgrade()
            rest = self._parse_to_upgrade(rest)

    def _parse_to_upgrade(self, data: bytes) -> bytes | None:
        """Parse data up to the end of a head that offers an upgrade, and return what follows; None without an offer."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return data[upgrade.args[0] :]
        return None

    def _parse_without_upgrade(self) -> None:
        """Parse the head again at which the parser has stopped, without the upgrade that it offers.

        Raises:
            ProtocolError: the request is for a tunnel.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise ProtocolError("the method must be GET or POST; got CONNECT, and this server is no proxy")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name not in _UPGRADE]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _refuse(self, error: Exception, job: Job | None = None) -> None:
        """Answer with an error, and close the connection.

        Args:
            error: the error.
            job: the request; None for one that is not answered without ASGI.
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._in_head or self.pipeline or getattr(cycle, "response_started", True):
                # An answer to an earlier request is due, which this one must not be taken for.
                self._end_after_answers(error)
                return
            cycle.disconnected = True
            cycle.message_event.set()
        status = status_of(error)
        about = self._about() if job is None else job.about()
        request_id = about["request_id"]
        body = error_body(error, about)
        complain(f"refused {status}", f"closing a connection: {short(error)}", about, None, logging.WARNING)
        self.transport.write(with_id(reply_head(status, None, len(body), False), request_id) + body)
        kind = type(error).__name__
        outcome = Outcome(self.peer, request_id, about["asked"], "", "", status, 0.0, 0, len(body), kind)
        for listener in self._listeners:
            listener(outcome if job is None else job.outcome(status, len(body), kind))
        self._linger()

    def _about(self) -> dict[str, str]:
        """Return what is said of the last request that began, as far as that is known."""
        about = {"client": self.peer, "request_id": new_id(), "asked": "", "model": ""}
        if self._head_known:
            about["request_id"] = given_id(dict(self.headers).get(REQUEST_ID)) or about["request_id"]
            method, path = self.parser.get_method(), self.url.partition(b"?")[0]
            about["asked"] = f"{method.decode()} {path.decode('latin-1')}"
        return about

    def _end_after_answers(self, error: Exception) -> None:
        """Answer the requests that came whole, take no more, and then close the connection.

        Args:
            error: why no more is taken. It is not answered, since earlier requests are to be answered before it.
        """
        about = {"client": self.peer}
        complain("ended early", f"closing a connection after its answers: {short(error)}", about, None, logging.WARNING)
        self._stop_head_timer()
        self._dropping = LINGER_BYTES
        if self._in_message and not self._in_head:
            # What is wrong is in the body of the last one, so that one did not come whole.
            if self.pipeline:
                self.pipeline.popleft()
            else:
                self.close()

    def _linger(self) -> None:
        """Close the connection after the last answer.

        The client may still be sending. If the connection were closed at once, the client's system would drop the
        answer. So what arrives is read on for a while, and dropped.
        """
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._stop_timers()
        self._dropping = LINGER_BYTES
        self._head_timer = self.loop.call_later(LINGER_S, self._late)
        self.flow.resume_reading()

    def _drop(self, count: int) -> None:
        self._dropping = (self._dropping or 0) - count
        if self._dropping <= 0:
            self.close()

    def on_message_begin(self) -> None:
        """Note that a request begins; called by the parser."""
        super().on_message_begin()
        self._head.begin()
        self._in_head = self._in_message = True
        self._head_known = False
        self._fed.begun += 1
        self._idle_since_s = self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target; called by the parser."""
        self._head.target(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header line, or count a line of the trailer; called by the parser."""
        self._head.line(name, value)
        # A proxy checks headers before the trailer has come, so what stands there is none of them (RFC 9110, 6.5.1).
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer a request; called by the parser."""
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= MAX_WAITING:
            raise TooManyWaitingError(f"at most {MAX_WAITING} requests may wait for the answers to earlier ones")
        self._head_known = True
        check_head(self.parser.get_http_version(), self.headers)
        self._in_head = False
        self._stop_head_timer()
        self._begin_request()

    def _begin_request(self) -> None:
        """Leave a request to the ASGI application. Subclasses may answer it otherwise."""
        super().on_headers_complete()
        if self._draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body; called by the parser."""
        self._fed.body_bytes += len(body)
        self._take_body(body)

    def _take_body(self, body: bytes) -> None:
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a request is complete; called by the parser."""
        if not self.parser.should_upgrade():
            self._in_message = False
            self._end_request()

    def _end_request(self) -> None:
        super().on_message_complete()

    def _late(self) -> None:
        """Close the connection: a head did not arrive in time, or not all that is dropped after an error."""
        self._head_timer = None
        # While the server itself does not read, a client cannot send the rest of a head.
        begun_s = self.loop.time() if self.flow.read_paused else self.flow.resumed_s
        left_s = begun_s + HEAD_TIMEOUT_S - self.loop.time()
        if self._in_head and self._dropping is None and left_s > 0:
            self._head_timer = self.loop.call_later(left_s, self._late)
        elif self._in_head and self._dropping is None:
            self._refuse(LateError(f"the head of a request must arrive within {HEAD_TIMEOUT_S:g} s; it did not"))
        else:
            self.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_timers(self) -> None:
        self._stop_head_timer()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None
