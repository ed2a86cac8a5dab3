"""The transport to a tail server in the same process."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torchsurgeon import wire
from torchsurgeon._interrupts import NoThreadError, by_signal_handler, join_threads, start_thread
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.transport.base import CONTROL_LIMIT_BYTES, RawAnswer, Timing, check_size, check_status
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.tensors import Transport
from torchsurgeon.transport.trace_context import TRACEPARENT, traceparent
from torchsurgeon.wire.buffers import aligned_buffer


class _Loop:
    """An event loop that other threads wake by a socket of its own.

    asyncio's way to wake a loop drops errors of the system, and so a TimeoutError that a signal handler raises there.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.closed = False
        self._calls: deque[Callable[[], object]] = deque()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self.loop.add_reader(self._woken, self._wake)

    def run(self) -> None:
        """Run until ``stop()``; in a thread of its own."""
        self.loop.run_forever()
        self.close()

    def close(self) -> None:
        """Close it, once it does not run any more."""
        self.loop.remove_reader(self._woken)
        self.loop.close()
        self._woken.close()
        self._waker.close()

    def call(self, function: Callable[[], object]) -> None:
        """Have the loop's thread call ``function``; nothing happens once it has stopped."""
        self._calls.append(function)
        try:
            if not self.closed:
                self._waker.send(b"\0")
        except OSError as error:
            # The loop is closed, or it has not read yet what woke it before.
            if by_signal_handler(error):
                raise

    def stop(self) -> None:
        """End the loop and its thread. Stopping twice is harmless."""
        if not self.closed:
            self.call(self.loop.stop)
            self.closed = True

    def _wake(self) -> None:
        self._woken.recv(4096)
        while self._calls:
            self._calls.popleft()()


class _Call:
    """One call of the application: it runs in the loop's thread, and another thread waits for it.

    That thread waits for a bare lock, since those of Python's own futures may stay locked, or lose what a signal
    handler raises, where it raises while they are taken.
    """

    def __init__(self, loop: _Loop, function: Callable[[], Awaitable[RawAnswer]]) -> None:
        self._loop, self._function = loop, function
        self._answer: RawAnswer | None = None
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._ended = threading.Lock()
        self._ended.acquire()

    def begin(self) -> None:
        """Have the loop begin it."""
        self._loop.call(self._begin)

    def cancel(self) -> None:
        """Have the loop end it; from any thread."""
        self._cancelled = True
        self._loop.call(self._cancel)

    def result(self, timeout_s: float) -> RawAnswer:
        """Wait for the answer.

        Raises:
            TimeoutError: it has not come within ``timeout_s``.
        """
        if not self._ended.acquire(timeout=timeout_s):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def _begin(self) -> None:
        if self._cancelled:
            self._error = TimeoutError()
            self._ended.release()
        else:
            self._task = self._loop.loop.create_task(self._run())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self._answer = await self._function()
        except BaseException as error:
            self._error = error
        finally:
            # Nothing but the loop's thread refers to the task, so that its weak references end there.
            self._task = None
            self._ended.release()


class InProcessTransport(Transport):
    """The way to a tail server in the same process: an ASGI application, called in a thread with an event loop.

    Args:
        app: the application, such as ``torchsurgeon.serve.create_app()`` makes.
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
    """

    def __init__(self, app: Callable[..., Any], timeout_s: float = 30.0) -> None:
        super().__init__(timeout_s)
        self._app = app
        self._loop = _Loop()
        self._threads: list[threading.Thread] = []
        try:
            start_thread(self._loop.run, "torchsurgeon-in-process", self._threads)
        except NoThreadError:
            self._loop.close()
            raise
        # For a transport that the program drops without closing it.
        self._end = weakref.finalize(self, self._loop.stop)

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        """Return the JSON value at a path of the server; see ``Transport.get_json()``."""
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        raw = self._call("GET", path, {}, [b""], CONTROL_LIMIT_BYTES, deadline)
        check_status(raw.status, raw.body, path)
        return wire.parse_json(raw.body, f"the answer of {path}")

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        self._loop.stop()
        self._end.detach()
        join_threads(self._threads, threading.TIMEOUT_MAX)

    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: Deadline
    ) -> RawAnswer:
        headers = {"Content-Type": "application/octet-stream"}
        if header_bytes is not None:
            headers[wire.HEADER_LENGTH] = str(header_bytes)
        span = traceparent()
        if span is not None:
            headers[TRACEPARENT] = span
        return self._call("POST", path, headers, buffers, limit_bytes, deadline)

    def _call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        buffers: list[wire.Buffer],
        limit_bytes: int,
        deadline: Deadline,
    ) -> RawAnswer:
        if self._loop.closed:
            raise ServerUnavailableError("the in-process transport has been closed; make a new one")
        call = _Call(self._loop, functools.partial(self._drive, method, path, headers, buffers, limit_bytes))
        try:
            call.begin()
            deadline.sent_bytes += sum(len(buffer) for buffer in buffers)
            deadline.interrupted_by(call.cancel)
            return call.result(deadline.left_s())
        except BaseException as error:
            call.cancel()
            if by_signal_handler(error) or not isinstance(error, TimeoutError | asyncio.CancelledError):
                raise
            raise ServerUnavailableError(f"no complete answer within {deadline.timeout_s:g} s") from None
        finally:
            deadline.interrupted_by(None)

    async def _drive(
        self, method: str, path: str, headers: Mapping[str, str], buffers: list[wire.Buffer], limit_bytes: int
    ) -> RawAnswer:
        plain, _, query = path.partition("?")
        size = sum(len(buffer) for buffer in buffers)
        sent = {"host": "in-process", "content-length": str(size), **{k.lower(): v for k, v in headers.items()}}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": plain,
            "raw_path": plain.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": None,
            "server": None,
        }
        pending = [bytes(buffer) for buffer in buffers]
        start = time.perf_counter()
        first = 0.0
        status = 0
        answered: dict[bytes, bytes] = {}
        body = bytearray()

        async def receive() -> dict[str, Any]:
            if not pending:
                # The whole body was sent. A client that stays connected sends nothing more, so this never returns.
                await asyncio.Event().wait()
            return {"type": "http.request", "body": pending.pop(0), "more_body": bool(pending)}

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status, first, answered
            if message["type"] == "http.response.start":
                status, first = message["status"], time.perf_counter()
                answered = {name.lower(): value for name, value in message.get("headers", [])}
            else:
                body.extend(message.get("body", b""))
                check_size(len(body), limit_bytes, "the in-process server")

        await self._app(scope, receive, send)
        length = answered.get(wire.HEADER_LENGTH.lower().encode())
        buffer = aligned_buffer(len(body))
        buffer[:] = body
        timing = Timing(size, len(body), start, start, first, time.perf_counter())
        return RawAnswer(status, None if length is None else length.decode("latin-1"), buffer, timing)
