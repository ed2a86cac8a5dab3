"""The server's HTTP protocol, with a shortcut for inference that bypasses ASGI.

A plain inference request is a POST to …/infer with a Content-Length, on a connection that is kept alive, for a model
that is ready. This protocol answers it without ASGI: the body is read from the socket straight into the buffer that it
is decoded from, and the answer goes out in one write.

A device repeats the head of its requests byte for byte while it cuts at one point. So after a plain request, the next
one is read into a buffer that is laid out for the same head followed by a body: if the head is the same, nothing is
parsed and nothing is copied. If not, the head is parsed, and the part of the body that came with it is copied.

Every other request, and every request that has to be refused, takes uvicorn's ordinary way to the ASGI application,
which gives the same answers. What both ways have in common is in ``guarded``.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httptools

from torchsurgeon.serve.body import JOIN_BYTES, late, timeout_for
from torchsurgeon.serve.connections import Connections
from torchsurgeon.serve.direct import Direct, Job, Plain, Reply, reply_head, with_id
from torchsurgeon.serve.failure import GoneError
from torchsurgeon.serve.guarded import GuardedProtocol
from torchsurgeon.serve.outcome import CLIENT_GONE, Listener

_SCRATCH_BYTES = 16 << 10
_MAX_REPEATED_BYTES = 4096


class _Turn:
    """Stands for the request that is being answered, so that uvicorn queues pipelined requests behind it.

    It has the attributes of uvicorn's ``RequestResponseCycle`` that uvicorn's protocol reads.
    """

    def __init__(self) -> None:
        self.response_complete = False
        self.disconnected = False
        self.response_started = False
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


class ServeProtocol(GuardedProtocol, asyncio.BufferedProtocol):
    """One connection. asyncio asks ``get_buffer()`` where to put data, and then calls ``buffer_updated()``.

    Data goes to one of three places:

    * While a body is being read, to the part of the body's buffer that is still empty.
    * Where a request with the same head as the last is expected, to ``_ahead``, a buffer for that head and a body.
    * Otherwise to ``_scratch``, from where it is parsed.

    Args:
        direct: decides which requests are answered without ASGI; None to answer none that way.
        connections: all connections of the server.
        listeners: who is told what became of each request.
        *args: passed on to uvicorn's protocol.
        **kwargs: passed on to uvicorn's protocol.
    """

    def __init__(
        self, direct: Direct | None, connections: Connections, listeners: list[Listener], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(connections, listeners, *args, **kwargs)
        self._direct = direct
        self._asked: Job | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._job: Job | None = None
        self._turn = _Turn()
        self._repeat: _Repeat | None = None
        self._ahead: memoryview | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._body_since_s = 0.0
        self._admitted: Plain | None = None
        self._unread = False

    def connection_made(self, transport: Any) -> None:
        """Start the connection; called by asyncio."""
        super().connection_made(transport)
        self._fd: int = transport.get_extra_info("socket").fileno()
        if self.spare:
            self._direct = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Release timers and buffers; called by asyncio."""
        super().connection_lost(exc)
        if self._asked is not None:
            self._asked.received.gone = True
        # Of which not all has come.
        self._tell_of(self._job, CLIENT_GONE, 0, GoneError.__name__)
        self._job = self._repeat = self._ahead = None
        # By this, asyncio's transport refers to itself. Without it, the transport is freed here, in the loop's thread,
        # and not by a garbage collection in any thread, where Python drops what a signal handler raises meanwhile.
        vars(self.transport).pop("_read_ready_cb", None)

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
            if repeat is not None and repeat.begins(read[:nbytes]) and repeat.plain.open():
                # The same head again: its content is known, and the body already lies where it is decoded.
                self._begin(Job(repeat.plain, read[len(repeat.head) :], self.peer), nbytes - len(repeat.head))
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
        goes_on = self.feed(data)
        admitted, self._admitted = self._admitted, None
        if not goes_on:
            self._repeat = None
            return
        if admitted is not None:
            self._repeat = None
            head = bytes(data[: len(data) - self._fed.body_bytes])
            # A head is remembered only if the parser and a plain search agree on where it begins and ends.
            whole = from_start and self._fed.begun == 1 and head.find(b"\r\n\r\n") == len(head) - 4
            if whole and len(head) <= _MAX_REPEATED_BYTES:
                self._repeat = _Repeat(head, admitted)
        if self._job is not None:
            self._read_on(self._job)

    def _read_on(self, job: Job) -> None:
        """Read what has arrived of the body by now. That is cheaper than to wait for the event loop to say so."""
        if self.scheme == "http":
            # At the end of the stream this reads nothing, and the event loop finds that out by itself.
            with suppress(BlockingIOError, ConnectionError):
                self._arrived(job, os.readv(self._fd, [job.missing]))
        if self._job is not None and self._body_timer is None:
            self._body_since_s = self.loop.time()
            self._body_timer = self.loop.call_later(job.plain.timeout_s, self._body_late)

    def _arrived(self, job: Job, nbytes: int) -> None:
        job.arrived(nbytes)
        if not job.missing:
            if self._in_message:
                # The parser saw the head but not the whole body, so a new parser takes its place for the next request.
                self.parser = httptools.HttpRequestParser(self)
                self._in_message = False
            self._body_arrived()

    def _begin_request(self) -> None:
        """Answer a plain request without ASGI, or leave the request to uvicorn."""
        if self._direct is not None and self._may_be_direct():
            admitted = self._direct.admit(self.url, self.headers)
            if admitted is not None:
                self._admitted = admitted
                self._take_turn(Job(admitted, self._direct.buffers.take(admitted.size), self.peer))
                return
        self._repeat = None
        super()._begin_request()

    def _take_body(self, body: bytes) -> None:
        if self._job is None:
            super()._take_body(body)
        else:
            self._job.take(body)

    def _end_request(self) -> None:
        if self._job is None:
            super()._end_request()
        else:
            self._body_arrived()

    def _may_begin(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _may_be_direct(self) -> bool:
        plain = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        return self._may_begin() and plain and self.parser.get_method() == b"POST" and not self.expect_100_continue

    def _take_turn(self, job: Job) -> None:
        self._job = job
        self._turn.response_complete = self._turn.response_started = False
        self._turn.keep_alive = not self._draining
        self.cycle = self._turn  # type: ignore[assignment]

    def _body_arrived(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        job, self._job = self._job, None
        if job is not None:
            self._asked = job
            self._turn.response_started = True
            alone = self._direct is not None and self._direct.lone.asks(self.peer)
            job.run(self.loop, self._reply, alone=alone)

    def _reply(self, reply: Reply) -> None:
        job, self._asked = self._asked, None
        # Not self.cycle, which may be a pipelined request that waits for this answer.
        turn = self._turn
        if turn.disconnected or self.transport.is_closing():
            self._tell_of(job, CLIENT_GONE, 0, GoneError.__name__)
            return
        head = reply_head(reply.status, reply.header_bytes, reply.size_bytes, turn.keep_alive, reply.retry_after_s)
        if job is not None and (job.plain.given_id is not None or reply.status >= 400):
            head = with_id(head, job.received.request_id)
        if reply.size_bytes <= JOIN_BYTES:
            self.transport.write(b"".join([head, *reply.buffers]))
        else:
            self.transport.write(head + reply.buffers[0])
            for buffer in reply.buffers[1:]:
                self.transport.write(buffer)
        self._tell_of(job, reply.status, reply.size_bytes, reply.error)
        if not turn.keep_alive:
            self.close()
        elif self.flow.write_paused:
            # The next request is read once the client has read this answer. Otherwise a client that reads nothing could
            # have any number of answers computed and kept.
            self._unread = True
            self.flow.pause_reading()
            return
        self._end_turn()

    def resume_writing(self) -> None:
        """Go on with the next request once the client has read an answer; called by asyncio."""
        super().resume_writing()
        if self._unread:
            self._unread = False
            self._end_turn()
            self.flow.resume_reading()

    def _end_turn(self) -> None:
        self._turn.response_complete = self.answered = True
        if self.pipeline or self._dropping is not None:
            self.on_response_complete()
            return
        self.server_state.total_requests += 1
        self._idle_since_s = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._maybe_idle)

    def _tell_of(self, job: Job | None, status: int, sent_bytes: int, error: str) -> None:
        if self._listeners and job is not None:
            outcome = job.outcome(status, sent_bytes, error)
            for listener in self._listeners:
                listener(outcome)

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
            self.close()

    def _body_late(self) -> None:
        """Look whether enough of a body has arrived. If not, say so, and close the connection."""
        self._body_timer = None
        job = self._job
        if job is None:
            return
        left_s = self._body_since_s + timeout_for(job.plain.timeout_s, job.arrived_bytes) - self.loop.time()
        if left_s > 0:
            self._body_timer = self.loop.call_later(left_s, self._body_late)
        else:
            self._job = None
            self._refuse(late(job.plain.timeout_s), job)

    def _stop_timers(self) -> None:
        super()._stop_timers()
        for timer in (self._body_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._body_timer = self._idle_timer = None
