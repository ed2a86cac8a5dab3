"""The ASGI application: Open Inference Protocol v2 over HTTP, extensions of Triton's, and some of its own.

=============================================  =====================================================================
``GET /``                                      a page that shows how busy the server is
``GET /v2``                                    server metadata
``GET /openapi.json``                          all of this as an OpenAPI description
``GET /v2/health/live``, ``/v2/health/ready``  200, or 503 while a model loads
``GET /v2/models/NAME[/versions/V]``           model metadata; ``…/ready`` likewise
``POST /v2/models/NAME[/versions/V]/infer``    inference; the tensors' names decide which part of the model runs
``GET /v2/models/NAME/config``, ``…/stats``    Triton's model configuration and statistics; ``/v2/models/stats`` of all
``POST /v2/repository/index``                  Triton's list of models
``POST /v2/repository/models/NAME/load``       loads a model anew; ``…/unload`` likewise; where the operator allows it
``GET /v2/load``                               how busy the server is
``GET /v2/models/NAME/fingerprint``            graph and weight digests
``GET /v2/models/NAME/profile``                the profile of the model's layers on the server
``GET /metrics``                               counts, in Prometheus' text format, where the operator wants them
``POST /v2/probe[?down=BYTES]``                takes a body, answers with as many bytes as asked, to measure a link
=============================================  =====================================================================

An error is answered with ``{"error": "…"}`` and one of these statuses: 400 for a request that is not valid, 401 without
a token that the server knows, 403 for loading models where that is not allowed, 404 for a model that is not served, 405
for another method, 408 for a body that does not arrive in time, 413 for a body larger than any request to the model (it
is refused before it is read), 431 for too large a head, 500 when the model fails, 501 for a transfer coding that the
server does not know, 503 while it loads, or where too many requests wait, 505 for another version of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import quote, unquote

from torchsurgeon import wire
from torchsurgeon.errors import BodyTooLargeError, ModelNotServedError, ProtocolError
from torchsurgeon.serve.admission import DEADLINE, PRIORITY, deadline_in, level_in
from torchsurgeon.serve.body import (
    JOIN_BYTES,
    DisconnectedError,
    Incoming,
    Receive,
    check_length,
    content_length,
    inflate,
    read_body,
)
from torchsurgeon.serve.control import control_plane
from torchsurgeon.serve.direct import Direct
from torchsurgeon.serve.exchange import Exchange
from torchsurgeon.serve.failure import (
    ForbiddenError,
    UnauthorizedError,
    complain,
    error_body,
    retry_after_s,
    status_of,
)
from torchsurgeon.serve.fairness import NORMAL
from torchsurgeon.serve.outcome import Listener
from torchsurgeon.serve.page import PATH
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.replies import HEALTH, Scope, Send, refuse, send_json
from torchsurgeon.serve.repository import MAX_BODY_BYTES, Loading, answer
from torchsurgeon.serve.served import ServedModel
from torchsurgeon.serve.tokens import Holder, Tokens, is_bearer

MAX_PROBE_BYTES = 4 << 20
_OPEN = (*HEALTH, PATH)
_REPOSITORY = "/v2/repository/"
_HEADER_LENGTH = wire.HEADER_LENGTH.lower().encode()
_ONCE = (_HEADER_LENGTH, DEADLINE, PRIORITY, b"authorization", b"content-encoding", b"content-length")


class TailApp:
    """The ASGI application. It handles inference and probes itself; Starlette routes everything else.

    Args:
        registry: the models.
        body_timeout_s: seconds that a client may take to send a body, and the time at 16 KiB/s of what has come.

    Attributes:
        registry: as given.
        body_timeout_s: as given.
        direct: answers plain inference requests without ASGI; torchsurgeon's own server uses it.
        tokens: the tokens of which every request must have one, except those for health and for the page, which holds
            nothing; None to ask for none.
        highest: the highest priority that a client may ask for of whose token the file says none, as an index of
            ``wire.PRIORITIES``.
        listeners: who is told what became of each request.
        metrics: returns what ``/metrics`` answers, and its media type; None for no such path.
        has_page: whether ``/`` shows how busy the server is.
        draining: whether the server is about to stop. It is then not ready, and answers all the same.
        loading: what the operator allows clients to load and unload; None for nothing.
        connections: returns how many connections are open.
        started_s: when the application was made, in seconds of ``time.monotonic``.
    """

    def __init__(self, registry: ModelRegistry, *, body_timeout_s: float = 30.0) -> None:
        self.registry = registry
        self.body_timeout_s = body_timeout_s
        self.direct = Direct(registry, body_timeout_s, lambda: self.tokens, lambda: self.highest)
        self.tokens: Tokens | None = None
        self.highest = NORMAL
        self.listeners: list[Listener] = []
        self.metrics: Callable[[], tuple[bytes, str]] | None = None
        self.has_page = True
        self.draining = False
        self.loading: Loading | None = None
        self.connections: Callable[[], int] = lambda: 0
        self.started_s = time.monotonic()
        self._rest = control_plane(self)

    def drain(self) -> None:
        """Say from now on that the server is not ready."""
        self.draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI 3 calls an application."""
        if scope["type"] != "http":
            await self._rest({**scope, "app": self}, receive, send)  # type: ignore[arg-type]
            return
        scope = _with_own_slashes(scope)
        exchange = Exchange(scope, send)
        try:
            await self._answer(scope, receive, exchange)
        finally:
            if self.listeners:
                exchange.end(self.listeners)

    async def _answer(self, scope: Scope, receive: Receive, exchange: Exchange) -> None:
        tokens = None if scope["path"] in _OPEN else self.tokens
        holder = Holder() if tokens is None else tokens.holder_of(exchange.headers.get(b"authorization"))
        if holder is None:
            incoming = Incoming(receive, exchange.headers)
            await self._guarded(_refuse_unauthorized(exchange), incoming, exchange)
            return
        if scope["method"] == "POST":
            parts = scope["path"].split("/")
            versioned = len(parts) == 7 and parts[4] == "versions"
            if parts[-1] == "infer" and parts[1:3] == ["v2", "models"] and (versioned or len(parts) == 5):
                version = parts[5] if versioned else None
                incoming = Incoming(receive, exchange.headers)
                # For the log, where a name with spaces could pass for other fields. A served model's has none.
                exchange.model = quote(parts[3])
                await self._guarded(self._infer(parts[3], version, exchange, incoming, holder), incoming, exchange)
                return
            if scope["path"] == "/v2/probe":
                incoming = Incoming(receive, exchange.headers)
                await self._guarded(self._probe(scope, incoming, exchange.send), incoming, exchange)
                return
            if scope["path"].startswith(_REPOSITORY):
                incoming = Incoming(receive, exchange.headers)
                await self._guarded(self._repository(scope, incoming, exchange), incoming, exchange)
                return
        # By "app", the router knows that an error it raises is answered.
        told = {**scope, "app": self, "exchange": exchange}
        await self._rest(told, receive, exchange.send)  # type: ignore[arg-type]

    async def _guarded(self, handling: Awaitable[None], incoming: Incoming, exchange: Exchange) -> None:
        try:
            await handling
        except DisconnectedError:
            pass
        except Exception as error:
            body = error_body(error, exchange.about())
            exchange.error = type(error).__name__
            await refuse(status_of(error), body, incoming, exchange.send, retry_after_s(error))

    async def _infer(
        self, name: str, version: str | None, exchange: Exchange, receive: Receive, holder: Holder
    ) -> None:
        started_s = time.perf_counter()
        model = self.registry.get(name, version)
        headers = exchange.headers
        _check_once(exchange.repeated)
        size = content_length(headers)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        compressed = encoding not in (b"", b"identity")
        length = headers.get(_HEADER_LENGTH)
        header_bytes = None if length is None else wire.header_length(length, None if compressed else size)
        deadline_s = deadline_in(headers.get(DEADLINE))
        level = level_in(headers.get(PRIORITY), self.highest if holder.highest is None else holder.highest)
        limit = model.max_body_bytes(binary=header_bytes is not None)
        with _advising(header_bytes, model):
            check_length(size, limit)
            body = await read_body(receive, size, limit, self.body_timeout_s)
        arrived_s = time.perf_counter()
        receive_s, own_id = arrived_s - started_s, exchange.given_id
        request = Received(body, header_bytes, receive_s, arrived_s, exchange.client, own_id, name)
        request.due_s = started_s + deadline_s
        request.holder, request.level = holder.name, level
        exchange.received, exchange.received_bytes = request, len(body)
        del body  # Only the request keeps it alive, so its memory is free as soon as the request is answered.
        if compressed:
            with _advising(header_bytes, model):
                request.body = await asyncio.to_thread(inflate, request.body, encoding, limit)
        encoded = await _answered(self.registry.submit(model, request), request, receive)
        await _send_encoded(encoded, exchange.send)

    async def _repository(self, scope: Scope, receive: Incoming, exchange: Exchange) -> None:
        if b"origin" in exchange.headers and scope["path"] != f"{_REPOSITORY}index":
            # A browser sends such a request for any page that its user opens, also to a server that only this machine
            # reaches and that asks for no token.
            raise ForbiddenError(
                "a page in a browser may not load and unload models; ask by a program, which sends no Origin"
            )
        size = content_length(exchange.headers)
        check_length(size, MAX_BODY_BYTES)
        body = await read_body(receive, size, MAX_BODY_BYTES, self.body_timeout_s)
        told = await answer(scope["path"][len(_REPOSITORY) :], body, self.registry, self.loading)
        if told is None:
            raise ModelNotServedError(f"Not Found: POST {scope['path'][:300]}")
        await send_json(200, json.dumps(told).encode(), exchange.send)

    async def _probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.perf_counter()
        headers = dict(scope["headers"])
        down = _down_bytes(scope["query_string"])
        size = content_length(headers)
        check_length(size, MAX_PROBE_BYTES)
        received = len(await read_body(receive, size, MAX_PROBE_BYTES, self.body_timeout_s))
        answer = {"received_bytes": received, "receive_s": round(time.perf_counter() - started_s, 6)}
        # JSON may end in spaces, so the answer has the length that was asked for and still is JSON.
        await send_json(200, json.dumps(answer).encode().ljust(down), send)


def create_app(registry: ModelRegistry, *, body_timeout_s: float = 30.0) -> TailApp:
    """Return the ASGI application for a registry. Models may be added to the registry at any time.

    Args:
        registry: the models.
        body_timeout_s: seconds that a client may take to send a body, and the time at 16 KiB/s of what has come.
    """
    return TailApp(registry, body_timeout_s=body_timeout_s)


def _with_own_slashes(scope: Scope) -> Scope:
    """Return a scope in whose path what was sent as ``%2F`` is no slash: a proxy that lets paths in sees none there."""
    sent = scope.get("raw_path") or b""
    if b"%2f" not in sent.lower():
        return scope
    kept = sent.replace(b"%2F", b"%252F").replace(b"%2f", b"%252F")
    return {**scope, "path": unquote(kept.decode("latin-1"))}


def _check_once(repeated: Sequence[bytes]) -> None:
    """Check that no header is repeated by which a request is read: a proxy may go by another one of them."""
    for name in repeated:
        if name in _ONCE:
            raise ProtocolError(f"the header {name.decode()} must be there once; send it with one value")


@contextlib.contextmanager
def _advising(header_bytes: int | None, model: ServedModel) -> Iterator[None]:
    """Have an error that a body is too large say what to do where the body is JSON."""
    try:
        yield
    except BodyTooLargeError as error:
        if header_bytes is not None:
            raise
        raise BodyTooLargeError(
            f"{error}, because it is JSON: send tensors as binary data with {wire.HEADER_LENGTH}, of which model "
            f"{model.name!r} takes {model.max_body_bytes(binary=True)} bytes"
        ) from None


async def _refuse_unauthorized(exchange: Exchange) -> None:
    given = exchange.headers.get(b"authorization", b"").strip()
    if is_bearer(given):
        told = "the token that was sent is none of this server's"
        advice = "correct token= (--token-file), or send the server SIGHUP if its file of tokens has changed since"
    else:
        told = "this server asks for a token"
        advice = (
            "send it as Authorization: Bearer TOKEN; SplitModule and HttpTransport take token=, the command line "
            "--token-file"
        )
    complain(f"refused 401 {told}", f"refused a request: {told}", exchange.about(), level=logging.WARNING)
    raise UnauthorizedError(f"{told}: {advice}")


async def _answered(future: Future[wire.Encoded], request: Received, receive: Receive) -> wire.Encoded:
    """Wait for an answer, and have the model stop where the client leaves before it."""
    answer, leaving = asyncio.wrap_future(future), asyncio.ensure_future(_left(receive))
    try:
        first: set[asyncio.Future[Any]] = {answer, leaving}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise DisconnectedError
        return answer.result()
    finally:
        request.gone = not answer.done()
        answer.cancel()
        leaving.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _down_bytes(query: bytes) -> int:
    if not query:
        return 0
    key, _, value = query.partition(b"=")
    if key != b"down" or not value.isdigit() or len(value) > 9 or int(value) > MAX_PROBE_BYTES:
        raise ProtocolError(f"the query must be down=BYTES with at most {MAX_PROBE_BYTES} bytes; got {query[:40]!r}")
    return int(value)


async def _send_encoded(encoded: wire.Encoded, send: Send) -> None:
    kind = b"application/json" if encoded.header_bytes is None else b"application/octet-stream"
    headers = [(b"content-type", kind), (b"content-length", b"%d" % encoded.size_bytes)]
    if encoded.header_bytes is not None:
        headers.append((_HEADER_LENGTH, b"%d" % encoded.header_bytes))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    # Joining small buffers costs less than one more system call for each.
    buffers = [b"".join(encoded.buffers)] if encoded.size_bytes <= JOIN_BYTES else encoded.buffers
    for index, buffer in enumerate(buffers):
        await send({"type": "http.response.body", "body": buffer, "more_body": index + 1 < len(buffers)})
