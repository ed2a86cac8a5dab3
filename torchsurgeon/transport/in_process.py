"""The transport to a tail server in the same process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torchsurgeon import wire
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.transport.base import (
    CONTROL_LIMIT_BYTES,
    Deadline,
    RawAnswer,
    Timing,
    Transport,
    check_size,
    check_status,
)
from torchsurgeon.wire.buffers import aligned_buffer


class InProcessTransport(Transport):
    """The way to a tail server in the same process: an ASGI application, called in a thread with an event loop.

    Args:
        app: the application, such as ``torchsurgeon.serve.create_app()`` makes.
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
    """

    def __init__(self, app: Callable[..., Any], timeout_s: float = 30.0) -> None:
        super().__init__(timeout_s)
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torchsurgeon-in-process", daemon=True)
        self._thread.start()

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        """Return the JSON value at a path of the server; see ``Transport.get_json()``."""
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        raw = self._call("GET", path, {}, [b""], CONTROL_LIMIT_BYTES, deadline)
        check_status(raw.status, raw.body, path)
        return wire.parse_json(raw.body, f"the answer of {path}")

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: Deadline
    ) -> RawAnswer:
        headers = {"Content-Type": "application/octet-stream"}
        if header_bytes is not None:
            headers[wire.HEADER_LENGTH] = str(header_bytes)
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
        if self._loop.is_closed():
            raise ServerUnavailableError("the in-process transport has been closed; make a new one")
        future = asyncio.run_coroutine_threadsafe(self._drive(method, path, headers, buffers, limit_bytes), self._loop)
        try:
            deadline.interrupted_by(future.cancel)
            return future.result(deadline.left_s())
        except (TimeoutError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            future.cancel()
            raise ServerUnavailableError(f"no complete answer within {deadline.timeout_s:g} s") from None

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
