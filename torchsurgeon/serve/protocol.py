"""uvicorn's HTTP protocol, with a shortcut for inference that bypasses ASGI.

A plain inference request is a POST to …/infer with a Content-Length, on a connection that is kept alive, for a model
that is ready. This protocol answers it without ASGI: the body is read from the socket straight into the buffer that it
is decoded from, and the answer goes out in one write.

A device repeats the head of its requests byte for byte while it cuts at one point. So after a plain request, the next
one is read into a buffer that is laid out for the same head followed by a body: if the head is the same, nothing is
parsed and nothing is copied. If not, the head is parsed, and the part of the body that came with it is copied.

Every other request, and every request that has to be refused, takes uvicorn's ordinary way to the ASGI application,
which gives the same answers.

A request's head has to arrive within ``HEAD_TIMEOUT_S``, and ``heads`` limits its size; uvicorn itself limits neither.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.serve.body import JOIN_BYTES, LINGER_BYTES, LINGER_S, timeout_for
from torchsurgeon.serve.connections import Connections
from torchsurgeon.serve.direct import Direct, Job, Plain, Reply, reply_head
from torchsurgeon.serve.failure import HeadTooLargeError, error_body, status_of
from torchsurgeon.serve.heads import HeadMeter
from torchsurgeon.serve.replies import only_health

HEAD_TIMEOUT_S = 10.0
_SCRATCH_BYTES = 16 << 10
_MAX_REPEATED_BYTES = 4096


class _Turn:
    """Stands for the request that is being answered, so that uvicorn queues pipelined requests behind it.

    It has the attributes of uvicorn's ``RequestResponseCycle`` that uvicorn's protocol reads.
    """

    def __init__(self) -> None:
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True
        self.message_event = asyncio.Event()


@dataclass(frozen=True)
class _Repeat:
    """A request's head as it arrived, byte for byte, and its content."""

    head: bytes
    plain: Plain

    def begins(self, data: memoryview) -> bool:
        """Return whether ``data`` begins with this head."""
        return data[: len(self.head)] == self.head


@dataclass
class _Fed:
    """What the parser found in one piece of data: requests that began, bytes of bodies, and a plain request."""

    begun: int = 0
    body_bytes: int = 0
    admitted: Plain | None = None


class ServeProtocol(HttpToolsProtocol, asyncio.BufferedProtocol):
    """One connection. asyncio asks ``get_buffer()`` where to put data, and then calls ``buffer_updated()``.

    Data goes to one of three places:

    * While a body is being read, to the part of the body's buffer that is still empty.
    * Where a request with the same head as the last is expected, to ``_ahead``, a buffer for that head and a body.
    * Otherwise to ``_scratch``, from where it is parsed.

    Args:
        direct: decides which requests are answered without ASGI; None to answer none that way.
        connections: all connections of the server.
        *args: passed on to uvicorn's protocol.
        **kwargs: passed on to uvicorn's protocol.
    """

    def __init__(self, direct: Direct | None, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._direct = direct
        self._all = connections
        self.address = ""
        self.spare = self.answered = False
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._job: Job | None = None
        self._turn = _Turn()
        self._repeat: _Repeat | None = None
        self._ahead: memoryview | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._idle_since_s = 0.0
        self._in_head = False
        self._in_message = False
        self._fed = _Fed()
        self._head = HeadMeter()
        # Bytes that are still read and dropped after an error, before the connection is closed; None before an error.
        self._dropping: int | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the connection; called by asyncio."""
        super().connection_made(transport)
        self._fd: int = transport.get_extra_info("socket").fileno()
        self._idle_since_s = self.loop.time()
        self.address = self.client[0] if self.client else ""
        self._all.add(self)
        if self.spare:
            self._direct = None
            self.app = only_health(self.app, self._all.why_full)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release timers and buffers; called by asyncio."""
        super().connection_lost(exc)
        self._all.remove(self)
        self._stop_timers()
        self._job = self._repeat = self._ahead = None
        # By this, asyncio's transport refers to itself. Without it, the transport is freed here, in the loop's thread,
        # and not by a garbage collection in any thread, where Python drops what a signal handler raises meanwhile.
        vars(self.transport).pop("_read_ready_cb", None)

    @property
    def idle_since_s(self) -> float | None:
        """Since when the connection waits for a whole head; None while a body arrives, or a request is answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        in_body = self._job is not None or (self._in_message and not self._in_head)
        return None if answering or in_body else self._idle_since_s

    def close(self) -> None:
        """Close the connection once what was written is sent."""
        self.transport.close()

    def on_response_complete(self) -> None:
        """Note that a request was answered; called by uvicorn."""
        self.answered = True
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for the data that arrives next; called by asyncio."""
        if self._job is not None:
            return self._job.missing
        if (
            self._dropping is not None
            or self._repeat is None
            or self._direct is None
            or self._in_message
            or not self._may_begin()
        ):
            return self._scratch
        # asyncio asks only once there is something to read, so an idle connection holds no buffer.
        self._ahead = self._direct.buffers.take(self._repeat.plain.size, before=len(self._repeat.head))
        return self._ahead

    def buffer_updated(self, nbytes: int) -> None:
        """Handle the data that arrived in the last buffer; called by asyncio."""
        if self._dropping is not None:
            self._drop(nbytes)
        elif self._job is not None:
            self._arrived(self._job, nbytes)
        elif self._ahead is None:
            self._feed(self._scratch[:nbytes])
        else:
            read, self._ahead = self._ahead, None
            repeat = self._repeat
            if repeat is not None and repeat.begins(read[:nbytes]) and repeat.plain.model.open:
                # The same head again: its content is known, and the body already lies where it is decoded.
                self._begin(Job(repeat.plain, read[len(repeat.head) :]), nbytes - len(repeat.head))
            else:
                self._feed(read[:nbytes])

    def _begin(self, job: Job, arrived: int) -> None:
        self._idle_since_s = self.loop.time()
        self._take_turn(job)
        self._arrived(job, arrived)
        if self._job is not None:
            self._read_on(self._job)

    def _feed(self, data: memoryview) -> None:
        """Parse ``data``. Where it holds the whole head of a plain request, remember the head for the next request."""
        from_start = not self._in_message
        self._fed = fed = _Fed()
        self.data_received(data)  # type: ignore[arg-type]
        if self._dropping is not None or self.transport.is_closing():
            return
        if self._in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._late)
        if fed.admitted is not None:
            self._repeat = None
            head = bytes(data[: len(data) - fed.body_bytes])
            # A head is remembered only if the parser and a plain search agree on where it begins and ends.
            whole = from_start and fed.begun == 1 and head.find(b"\r\n\r\n") == len(head) - 4
            if whole and len(head) <= _MAX_REPEATED_BYTES:
                self._repeat = _Repeat(head, fed.admitted)
        if self._job is not None:
            self._read_on(self._job)

    def _read_on(self, job: Job) -> None:
        """Read what has arrived of the body by now. That is cheaper than to wait for the event loop to say so."""
        if self.scheme == "http":
            # At the end of the stream this reads nothing, and the event loop finds that out by itself.
            with suppress(BlockingIOError, ConnectionError):
                self._arrived(job, os.readv(self._fd, [job.missing]))
        if self._job is not None and self._body_timer is None:
            self._body_timer = self.loop.call_later(timeout_for(job.plain.timeout_s, job.plain.size), self._late)

    def _arrived(self, job: Job, nbytes: int) -> None:
        job.arrived(nbytes)
        if not job.missing:
            if self._in_message:
                # The parser saw the head but not the whole body, so a new parser takes its place for the next request.
                self.parser = httptools.HttpRequestParser(self)
                self._in_message = False
            self._body_arrived()

    def data_received(self, data: bytes) -> None:
        """Parse a piece of data, and refuse what is no request, or has too large a head."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
            if self._fed.body_bytes:
                self._head.body()
            elif self._in_message and not self._fed.begun:
                self._head.piece(len(data))
        except HeadTooLargeError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, HeadTooLargeError):
                self._refuse(error.__context__)
            else:
                self._refuse(ProtocolError(f"the request is not valid HTTP/1.1: {short(error)}"))
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()

    def _refuse(self, error: Exception) -> None:
        """Answer with an error, and close the connection.

        The client may still be sending. If the connection were closed at once, the client's system would drop the
        answer. So what arrives is read on for a while, and dropped.
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._in_head or getattr(cycle, "response_started", True):
                # An answer to an earlier request is under way, which this one must not be taken for.
                self.transport.close()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        body = error_body(error)
        self.transport.write(reply_head(status_of(error), None, len(body), False) + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._stop_timers()
        self._repeat = None
        self._dropping = LINGER_BYTES
        self._head_timer = self.loop.call_later(LINGER_S, self._late)
        self.flow.resume_reading()

    def _drop(self, count: int) -> None:
        self._dropping = (self._dropping or 0) - count
        if self._dropping <= 0:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Note that a request begins; called by the parser."""
        super().on_message_begin()
        self._head.begin()
        self._in_head = self._in_message = True
        self._fed.begun += 1
        self._idle_since_s = self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target; called by the parser."""
        self._head.target(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header line, or a line of the trailer; called by the parser."""
        self._head.line(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Answer a plain request without ASGI, or leave the request to uvicorn; called by the parser."""
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if self._direct is not None and self._may_be_direct():
            admitted = self._direct.admit(self.url, self.headers)
            if admitted is not None:
                self._fed.admitted = admitted
                self._take_turn(Job(admitted, self._direct.buffers.take(admitted.size)))
                return
        self._repeat = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body; called by the parser."""
        self._fed.body_bytes += len(body)
        if self._job is None:
            super().on_body(body)
        else:
            self._job.take(body)

    def on_message_complete(self) -> None:
        """Note that a request is complete; called by the parser."""
        self._in_message = False
        if self._job is None:
            super().on_message_complete()
        else:
            self._body_arrived()

    def _may_begin(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _may_be_direct(self) -> bool:
        plain = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        return self._may_begin() and plain and self.parser.get_method() == b"POST" and not self.expect_100_continue

    def _take_turn(self, job: Job) -> None:
        self._job = job
        self._turn.response_complete = False
        self.cycle = self._turn  # type: ignore[assignment]

    def _body_arrived(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        job, self._job = self._job, None
        if job is not None:
            job.run(self.loop, self._reply)

    def _reply(self, reply: Reply) -> None:
        # Not self.cycle, which may be a pipelined request that waits for this answer.
        turn = self._turn
        if turn.disconnected or self.transport.is_closing():
            return
        head = reply_head(reply.status, reply.header_bytes, reply.size_bytes, turn.keep_alive)
        if reply.size_bytes <= JOIN_BYTES:
            self.transport.write(b"".join([head, *reply.buffers]))
        else:
            self.transport.write(head + reply.buffers[0])
            for buffer in reply.buffers[1:]:
                self.transport.write(buffer)
        turn.response_complete = self.answered = True
        if not turn.keep_alive:
            self.transport.close()
        if self.pipeline:
            self.on_response_complete()
            return
        self.server_state.total_requests += 1
        self._idle_since_s = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._maybe_idle)

    def _maybe_idle(self) -> None:
        """Close the connection if nothing has happened on it for the keep-alive time; else look again later."""
        # One timer that checks whether anything happened costs less than a new timer after each answer.
        self._idle_timer = None
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            left_s = self.timeout_keep_alive
        if left_s > 0:
            self._idle_timer = self.loop.call_later(left_s, self._maybe_idle)
        else:
            self.transport.close()

    def _late(self) -> None:
        """Close the connection: a head or a body did not arrive in time."""
        self._head_timer = self._body_timer = None
        self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._body_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._body_timer = self._idle_timer = None
