"""What became of a request, and those who want to know: the access log and the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# The status under which a request is noted whose client left before the answer. No client ever sees it.
CLIENT_GONE = 499


class Outcome(NamedTuple):
    """What became of one request.

    Attributes:
        client: the client's address and port; empty where they are not known.
        request_id: the id that the client gave the request, or that the server made for it.
        asked: the method and the path, without the query; empty for what was no request.
        model: the model that an inference was asked of; empty for every other request.
        cut: the names of the tensors that were sent; empty where they were not read.
        status: the HTTP status of the answer, or ``CLIENT_GONE``.
        duration_s: seconds from the request's head to its answer.
        received_bytes: length of the body as it was sent; 0 where it was not read as a whole.
        sent_bytes: length of the answer's body.
        error: the kind of error that was answered, as the name of its class; empty for none.
        traceparent: the value of the request's ``traceparent``, which names a span; empty for none.
    """

    client: str
    request_id: str
    asked: str
    model: str
    cut: str
    status: int
    duration_s: float
    received_bytes: int
    sent_bytes: int
    error: str = ""
    traceparent: str = ""


Listener = Callable[[Outcome], None]
"""Called by the event loop's thread for every request once it is answered. It must be quick, and must not raise."""
