"""Answers through ASGI: JSON, errors, and an application that refuses everything but health."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torchsurgeon.serve.body import LINGER_BYTES, LINGER_S, Incoming, Receive, discard
from torchsurgeon.serve.failure import RETRY_AFTER_S

Scope = Mapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

HEALTH = ("/v2/health/live", "/v2/health/ready")


async def send_json(
    status: int, body: bytes, send: Send, *, close: bool = False, retry_after_s: int = RETRY_AFTER_S
) -> None:
    """Answer with JSON.

    Args:
        status: the HTTP status. With 503 the answer says when to ask again.
        body: the JSON.
        send: the ASGI ``send``.
        close: whether the connection will be closed; the answer is then left without its end.
        retry_after_s: in how many seconds to ask again.
    """
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": close})


async def refuse(status: int, body: bytes, incoming: Incoming, send: Send, retry_after_s: int = RETRY_AFTER_S) -> None:
    """Answer with an error. If the client still sends its body, read on for a while, so that it gets the error."""
    if incoming.complete:
        await send_json(status, body, send, retry_after_s=retry_after_s)
        return
    try:
        await send_json(status, body, send, close=True, retry_after_s=retry_after_s)
        await discard(incoming, LINGER_BYTES, LINGER_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    except (OSError, RuntimeError):
        # The client has left without waiting for its error.
        return


def only_health(app: Application, reason: Callable[[], str]) -> Application:
    """Return an ASGI application that leaves health checks to ``app``, and refuses everything else with 503.

    Args:
        app: the application.
        reason: returns the error's text.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in HEALTH:
            await app(scope, receive, send)
            return
        await refuse(503, json.dumps({"error": reason()}).encode(), Incoming(receive), send)

    return answer
