"""One request that is answered through ASGI: what is said of it in the log, and its answer on the way out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from torchsurgeon.serve.failure import GoneError
from torchsurgeon.serve.outcome import CLIENT_GONE, Listener, Outcome
from torchsurgeon.serve.received import REQUEST_ID, TRACEPARENT, Received, address_text, given_id, new_id
from torchsurgeon.serve.replies import Scope, Send


class Exchange:
    """A request and its answer, from the request's head on.

    Args:
        scope: the ASGI scope.
        send: the ASGI ``send``.

    Attributes:
        headers: the request's headers; of one that is there several times, the last.
        repeated: the names of the headers that are there several times.
        received: the inference request, once its body has arrived; None before, and for every other request.
        received_bytes: length of the inference request's body as it arrived, compressed or not; 0 before it has.
        error: the kind of error that is answered; empty for none.
        model: the name of the model that an inference is asked of; empty for every other request.
        client: the client's address and port; empty where they are not known.
        given_id: the id that the client gave the request; None where it gave none.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self.headers = dict(scope["headers"])
        counts = Counter(name for name, _ in scope["headers"]) if len(self.headers) < len(scope["headers"]) else {}
        self.repeated = [name for name, count in counts.items() if count > 1]
        self.received: Received | None = None
        self.received_bytes = 0
        self.model = self.error = ""
        self.client = address_text(scope["client"]) if scope.get("client") else ""
        self.given_id = given_id(self.headers.get(REQUEST_ID))
        # As it was sent: decoded, it may hold spaces and line breaks.
        sent_path = scope.get("raw_path") or quote(scope["path"]).encode()
        self._asked = f"{scope['method']} {sent_path.decode('latin-1')}"
        self._send = send
        self._made_id: str | None = None
        self._started_s = time.perf_counter()
        self._status, self._sent_bytes, self._complete = CLIENT_GONE, 0, False

    @property
    def request_id(self) -> str:
        """The id that the client gave the request, or one that is made at the first use."""
        if self.received is not None:
            return self.received.request_id
        self._made_id = self._made_id or self.given_id or new_id()
        return self._made_id

    def about(self) -> dict[str, str]:
        """Return what a line of the log says of the request besides its message."""
        if self.received is not None:
            return self.received.about()
        return {"client": self.client, "request_id": self.request_id, "asked": self._asked, "model": self.model}

    async def send(self, message: dict[str, Any]) -> None:
        """Send a part of the answer, as ASGI's ``send`` does. The answer gets the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self.given_id is not None or self._status >= 400:
                message = {**message, "headers": [*message["headers"], (REQUEST_ID, self.request_id.encode())]}
        elif message["type"] == "http.response.body":
            self._sent_bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        await self._send(message)

    def end(self, listeners: Sequence[Listener]) -> None:
        """Tell what became of the request."""
        received = self.received
        outcome = Outcome(
            self.client,
            self.request_id,
            self._asked,
            self.model,
            "" if received is None else received.cut,
            self._status if self._complete else CLIENT_GONE,
            time.perf_counter() - self._started_s,
            self.received_bytes,
            self._sent_bytes,
            self.error if self._complete else GoneError.__name__,
            self.headers.get(TRACEPARENT, b"").decode("latin-1"),
        )
        for listener in listeners:
            listener(outcome)
