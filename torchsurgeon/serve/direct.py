"""Inference requests answered without ASGI: which ones, and how a body becomes a reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torchsurgeon import wire
from torchsurgeon.errors import ModelServingError, ProtocolError
from torchsurgeon.serve.body import Buffers
from torchsurgeon.serve.failure import error_body, status_of
from torchsurgeon.serve.registry import ModelRegistry, Received, ServedModel

_HEADER_LENGTH = wire.HEADER_LENGTH.lower().encode()
# Requests that say more about their body than its length are left to the application.
_NOT_DIRECT = frozenset({b"transfer-encoding", b"content-encoding", b"upgrade"})

# A device sends the same head as long as it cuts at the same point.
_MAX_KNOWN = 256
_MAX_KNOWN_BYTES = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """An answer: header lines beside the length, and the body in pieces."""

    status: int
    headers: list[bytes]
    buffers: list[wire.Buffer]
    size_bytes: int


class Job:
    """One request whose body is arriving."""

    def __init__(self, model: ServedModel, buffer: memoryview, header_bytes: int | None, timeout_s: float) -> None:
        self.size = len(buffer)
        self.timeout_s = timeout_s
        self._model = model
        self._header_bytes = header_bytes
        self._buffer = buffer
        self._filled = 0
        self._started_s = time.perf_counter()

    @property
    def complete(self) -> bool:
        return self._filled == self.size

    def take(self, data: bytes) -> None:
        """Copy what arrived together with the head."""
        self._buffer[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def missing(self) -> memoryview:
        """Where the rest of the body belongs; whoever fills it then calls :meth:`run`."""
        return self._buffer[self._filled :]

    def run(self, loop: asyncio.AbstractEventLoop, reply: Callable[[Reply], None]) -> None:
        """Answer the request; ``reply`` is called on the loop's thread, at once or later."""
        arrived_s = time.perf_counter()
        received = Received(self._buffer, self._header_bytes, arrived_s - self._started_s, arrived_s)
        answer = partial(_answer, self._model, received)
        worker = self._model.worker
        now = worker.now(answer) if self._model.quick(self.size) else None
        if now is not None:
            reply(now)
            return

        def done(future: Future[Reply]) -> None:
            try:
                loop.call_soon_threadsafe(reply, future.result())
            except RuntimeError:
                _log.debug("the server stopped before a request was answered")

        worker.submit(answer).add_done_callback(done)


class Direct:
    """Admits requests for the short way."""

    def __init__(self, registry: ModelRegistry, body_timeout_s: float) -> None:
        self._registry = registry
        self._timeout_s = body_timeout_s
        self._buffers = Buffers()
        self._known: dict[tuple[object, ...], tuple[ServedModel, int, int | None]] = {}

    def admit(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> Job | None:
        """A job for a plain inference request; None for every other, and for one that has to be refused."""
        key = (url, *headers)
        known = self._known.get(key)
        if known is None:
            known = self._judge(url, headers)
            if known is None:
                return None
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = known
        model, size, header_bytes = known
        if not model.open:
            del self._known[key]
            return None
        return Job(model, self._buffers.take(size), header_bytes, self._timeout_s)

    def _judge(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[ServedModel, int, int | None] | None:
        if len(url) + sum(len(name) + len(value) for name, value in headers) > _MAX_KNOWN_BYTES:
            return None
        parts = url.split(b"/")
        versioned = len(parts) == 7 and parts[4] == b"versions"
        if parts[-1] != b"infer" or parts[1:3] != [b"v2", b"models"] or not (versioned or len(parts) == 5):
            return None
        fields = dict(headers)
        if not _NOT_DIRECT.isdisjoint(fields) or len(fields) != len(headers):
            return None
        size = fields.get(b"content-length", b"")
        length = fields.get(_HEADER_LENGTH)
        if not size.isdigit() or len(size) > 15:
            return None
        try:
            model = self._registry.get(parts[3].decode("latin-1"), parts[5].decode("latin-1") if versioned else None)
            header_bytes = None if length is None else wire.header_length(length, int(size))
        except (ModelServingError, ProtocolError):
            return None
        if int(size) == 0 or int(size) > model.max_body_bytes(binary=length is not None):
            return None
        return model, int(size), header_bytes


def _answer(model: ServedModel, received: Received) -> Reply:
    try:
        encoded = model.answer(received)
    except Exception as error:
        body = error_body(error)
        return Reply(status_of(error), [b"content-type: application/json\r\n"], [body], len(body))
    if encoded.header_bytes is None:
        lines = [b"content-type: application/json\r\n"]
    else:
        length = b"%s: %d\r\n" % (_HEADER_LENGTH, encoded.header_bytes)
        lines = [b"content-type: application/octet-stream\r\n", length]
    return Reply(200, lines, encoded.buffers, encoded.size_bytes)
