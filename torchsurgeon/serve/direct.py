"""Inference requests that are answered without ASGI: which requests these are, and how a body becomes a reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from torchsurgeon import wire
from torchsurgeon.errors import ModelServingError, ProtocolError
from torchsurgeon.serve.admission import DEADLINE, PRIORITY, deadline_in, level_in
from torchsurgeon.serve.failure import RETRY_AFTER_S, BusyError, error_body, retry_after_s, status_of
from torchsurgeon.serve.fairness import NORMAL
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.quick import LoneClient
from torchsurgeon.serve.received import REQUEST_ID, TRACEPARENT, Received, given_id
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.served import ServedModel
from torchsurgeon.serve.tokens import Allowed, Holder, Tokens
from torchsurgeon.wire.buffers import Buffers

_HEADER_LENGTH = wire.HEADER_LENGTH.lower().encode()
# A request that declares more about its body than the length is left to the ASGI application.
_NOT_DIRECT = frozenset({b"transfer-encoding", b"content-encoding", b"upgrade"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plain:
    """The content of a plain inference request's head.

    Attributes:
        registry: the models.
        model: the model that is asked for.
        size: length of the body.
        header_bytes: length of the body's JSON header; None where the whole body is JSON.
        timeout_s: seconds that the client may take to send the body, and the time at 16 KiB/s of what has come.
        asked: the method, and the path that is asked for.
        given_id: the id that the client gave the request; None where it gave none.
        allowed: by which tokens the request was allowed.
        traceparent: the value of the request's ``traceparent``; empty for none.
        deadline_s: seconds from the head to when the answer is due; infinity where the client gave none.
        holder: the name of the token by which its client was let in; empty where no token is asked for.
        level: the request's priority, as an index of ``wire.PRIORITIES``.
    """

    registry: ModelRegistry
    model: ServedModel
    size: int
    header_bytes: int | None
    timeout_s: float
    asked: str
    given_id: str | None
    deadline_s: float
    allowed: Allowed
    traceparent: str
    holder: str
    level: int

    def open(self) -> bool:
        """Return whether a request with the same head may still be answered."""
        return self.model.open and self.allowed.holds()


class Reply(NamedTuple):
    """An answer.

    Attributes:
        status: the HTTP status.
        buffers: the body, in buffers to be written one after the other.
        header_bytes: as in ``torchsurgeon.wire.Encoded``.
        size_bytes: length of the body.
        retry_after_s: with status 503, in how many seconds to ask again.
        error: the kind of error that it tells; empty for none.
    """

    status: int
    buffers: list[wire.Buffer]
    header_bytes: int | None
    size_bytes: int
    retry_after_s: int = RETRY_AFTER_S
    error: str = ""


class Job:
    """One request whose body is arriving. The connection fills ``missing``, and then calls ``run()``.

    Args:
        plain: the request's head.
        body: memory for the whole body.
        client: the client's address and port.

    Attributes:
        plain: as given.
        missing: the part of the body that has not arrived.
        started_s: when the head arrived, in seconds of ``time.perf_counter``.
        received: the request, once its body has arrived.
    """

    def __init__(self, plain: Plain, body: memoryview, client: str) -> None:
        self.plain = plain
        self.missing = body
        self.started_s = time.perf_counter()
        self.received = Received(body, plain.header_bytes, 0.0, 0.0, client, plain.given_id, plain.model.name)
        self.received.due_s = self.started_s + plain.deadline_s
        self.received.holder, self.received.level = plain.holder, plain.level

    @property
    def arrived_bytes(self) -> int:
        """How much of the body has arrived."""
        return self.plain.size - len(self.missing)

    def arrived(self, count: int) -> None:
        """Record that the first ``count`` of the missing bytes have arrived."""
        self.missing = self.missing[count:]

    def take(self, data: bytes) -> None:
        """Copy the part of the body that arrived together with the head."""
        self.missing[: len(data)] = data
        self.arrived(len(data))

    def about(self) -> dict[str, str]:
        """Return what a line of the log says of the request besides its message, before its body has arrived."""
        received = self.received
        about = {"client": received.client, "request_id": received.request_id}
        return {**about, "asked": self.plain.asked, "model": received.model}

    def outcome(self, status: int, sent_bytes: int, error: str) -> Outcome:
        """Return what became of the request: its status, the bytes of the answer, and the kind of its error."""
        received, duration_s = self.received, time.perf_counter() - self.started_s
        return Outcome(
            received.client,
            received.request_id,
            self.plain.asked,
            received.model,
            received.cut,
            status,
            duration_s,
            0 if self.missing else self.plain.size,
            sent_bytes,
            error,
            self.plain.traceparent,
        )

    def run(self, loop: asyncio.AbstractEventLoop, reply: Callable[[Reply], None], *, alone: bool = False) -> None:
        """Compute the answer to the request.

        Args:
            loop: the connection's event loop.
            reply: called with the answer in the loop's thread: at once where the model is quick and idle, or else once
                the model's worker thread has computed it.
            alone: whether no other client asks the server.
        """
        model, received = self.plain.model, self.received
        received.arrived_s = arrived_s = time.perf_counter()
        received.receive_s = arrived_s - self.started_s
        quick = model.quick(received.alike)
        if quick or (alone and model.brief(received.alike)):
            received.notes_later = True
            try:
                encoded = model.worker.now(partial(model.answer, received))
            except Exception as error:
                reply(_refusal(error, received))
                return
            if encoded is not None:
                reply(Reply(200, *encoded))
                # Forgotten first, since it refers to the request, whose buffer is to be free for the next one.
                note, received.note = received.note, None
                if note is not None:
                    note()
                return
            received.notes_later = False

        def done(future: Future[wire.Encoded]) -> None:
            error = future.exception()
            try:
                if error is None:
                    loop.call_soon_threadsafe(reply, Reply(200, *future.result()))
                else:
                    loop.call_soon_threadsafe(reply, _refusal(error, received))
            except RuntimeError:
                # The event loop is closed, so nobody waits for the answer.
                _log.debug("the server stopped before a request was answered")

        try:
            self.plain.registry.submit(model, received, quick=quick).add_done_callback(done)
        except (BusyError, ModelServingError) as error:
            reply(_refusal(error, received))


class Direct:
    """Decides which requests are answered without ASGI, and provides the memory for their bodies.

    Args:
        registry: the models.
        body_timeout_s: seconds that a client may take to send a body, and the time at 16 KiB/s of what has come.
        tokens: returns the tokens of which a request must have one; None for requests without.
        highest: returns the highest priority that a client may ask for of whose token the file says none.

    Attributes:
        buffers: the memory for bodies, used by the event loop's thread only.
        lone: notices when one client alone asks.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        body_timeout_s: float,
        tokens: Callable[[], Tokens | None] = lambda: None,
        highest: Callable[[], int] = lambda: NORMAL,
    ) -> None:
        self._registry = registry
        self._timeout_s = body_timeout_s
        self._tokens, self._highest = tokens, highest
        self.buffers = Buffers()
        self.lone = LoneClient()

    def admit(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> Plain | None:
        """Return the content of a plain inference request's head.

        Args:
            url: the request's target.
            headers: the request's headers, with names in lower case.

        Returns:
            The content; None for every other request, and for one that has to be refused: the application answers it.
        """
        parts = url.split(b"/")
        versioned = len(parts) == 7 and parts[4] == b"versions"
        if parts[-1] != b"infer" or parts[1:3] != [b"v2", b"models"] or not (versioned or len(parts) == 5):
            return None
        fields = dict(headers)
        if not _NOT_DIRECT.isdisjoint(fields) or len(fields) != len(headers):
            return None
        tokens = self._tokens()
        holder = Holder() if tokens is None else tokens.holder_of(fields.get(b"authorization"))
        if holder is None:
            return None
        size = fields.get(b"content-length", b"")
        length = fields.get(_HEADER_LENGTH)
        if not size.isdigit() or len(size) > 15:
            return None
        try:
            model = self._registry.get(parts[3].decode("latin-1"), parts[5].decode("latin-1") if versioned else None)
            header_bytes = None if length is None else wire.header_length(length, int(size))
            deadline_s = deadline_in(fields.get(DEADLINE))
            level = level_in(fields.get(PRIORITY), self._highest() if holder.highest is None else holder.highest)
        except (ModelServingError, ProtocolError):
            return None
        if int(size) == 0 or int(size) > model.max_body_bytes(binary=length is not None):
            return None
        asked, own_id = f"POST {url.decode('latin-1')}", given_id(fields.get(REQUEST_ID))
        allowed = Allowed(tokens, 0 if tokens is None else tokens.generation)
        span = fields.get(TRACEPARENT, b"").decode("latin-1")
        return Plain(
            self._registry,
            model,
            int(size),
            header_bytes,
            self._timeout_s,
            asked,
            own_id,
            deadline_s,
            allowed,
            span,
            holder.name,
            level,
        )


def _refusal(error: BaseException, received: Received) -> Reply:
    body = error_body(error, received.about())
    return Reply(status_of(error), [body], None, len(body), retry_after_s(error), type(error).__name__)


@lru_cache(maxsize=256)
def reply_head(
    status: int, header_bytes: int | None, size_bytes: int, keep_alive: bool, retry_after_s: int = RETRY_AFTER_S
) -> bytes:
    """Return the status line and the headers of an answer. Cached, since answers of one cut have the same.

    Args:
        status: the HTTP status.
        header_bytes: the value of ``Inference-Header-Content-Length``; None for a body of JSON only.
        size_bytes: length of the body.
        keep_alive: whether the connection stays open.
        retry_after_s: with status 503, in how many seconds to ask again.
    """
    kind = b"application/json" if header_bytes is None else b"application/octet-stream"
    lines = [STATUS_LINE[status], b"content-length: %d\r\ncontent-type: %s\r\n" % (size_bytes, kind)]
    if header_bytes is not None:
        lines.append(b"%s: %d\r\n" % (_HEADER_LENGTH, header_bytes))
    if status == 503:
        lines.append(b"retry-after: %d\r\n" % retry_after_s)
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join([*lines, b"\r\n"])


def with_id(head: bytes, request_id: str) -> bytes:
    """Return the head of an answer with the id of its request."""
    return b"%s%s: %s\r\n\r\n" % (head[:-2], REQUEST_ID, request_id.encode())
