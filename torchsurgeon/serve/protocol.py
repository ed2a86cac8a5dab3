"""uvicorn's HTTP protocol with request bodies read from the socket straight into the buffer they are decoded from.

uvicorn hands a body through four copies (read, parser, queue, message). Here only what arrives together with the request's
head goes that way, at most 16 KiB; once the application has named a buffer, the event loop reads the rest into it.
The application finds :data:`~torchsurgeon.serve.body.RECEIVE_INTO` among the ASGI scope's extensions; one that does
not use it sees plain ASGI. A request's head has to arrive within ``HEAD_TIMEOUT_S``, which uvicorn leaves open.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from torchsurgeon.serve.body import RECEIVE_INTO

HEAD_TIMEOUT_S = 10.0
_SCRATCH_BYTES = 16 << 10


class InPlaceProtocol(HttpToolsProtocol, asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._body: memoryview | None = None
        self._body_done: asyncio.Future[bool] | None = None
        self._abandoned = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_head_timer()
        self._end_body(arrived=False)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._scratch if self._body is None else self._body

    def buffer_updated(self, nbytes: int) -> None:
        if self._abandoned:
            return
        if self._body is None:
            self.data_received(self._scratch[:nbytes])  # type: ignore[arg-type]
            return
        self._body = self._body[nbytes:]
        if not self._body:
            # The parser never saw the body's end, so the next request gets a new one.
            self.parser = httptools.HttpRequestParser(self)
            self.cycle.more_body = False
            self.cycle.message_event.set()
            self._end_body(arrived=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        super().on_headers_complete()
        if self.cycle is not None:
            self.scope["extensions"] = {RECEIVE_INTO: partial(self._receive_into, self.cycle)}  # type: ignore[typeddict-item]

    def _receive_into(self, cycle: RequestResponseCycle, buffer: memoryview) -> asyncio.Future[bool]:
        """Fill ``buffer``, which is as long as the body; the future says whether all of it arrived."""
        done: asyncio.Future[bool] = self.loop.create_future()
        arrived = len(cycle.body)
        buffer[:arrived] = cycle.body
        cycle.body = bytearray()
        if not cycle.more_body or cycle.disconnected:
            done.set_result(not cycle.disconnected)
            return done
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        self._body, self._body_done = buffer[arrived:], done
        done.add_done_callback(self._given_up)
        self.flow.resume_reading()
        return done

    def _given_up(self, done: asyncio.Future[bool]) -> None:
        if done.cancelled() and self._body is not None:
            self._body = self._body_done = None
            self._abandoned = True

    def _end_body(self, *, arrived: bool) -> None:
        done, self._body, self._body_done = self._body_done, None, None
        if done is not None and not done.done():
            done.set_result(arrived)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
