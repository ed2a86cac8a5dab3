"""The HTTP status and the body with which an error is answered."""

from __future__ import annotations

import json
import logging

from torchsurgeon.errors import (
    BodyTooLargeError,
    ModelFailedError,
    ModelNotReadyError,
    ModelNotServedError,
    PartitionError,
    ProtocolError,
    short,
)


class BodyTimeoutError(Exception):
    """A request's body did not arrive in time."""


class HeadTooLargeError(Exception):
    """A request's head has more lines or bytes than any request needs."""


STATUS: dict[type[Exception], int] = {
    ModelNotServedError: 404,
    BodyTimeoutError: 408,
    BodyTooLargeError: 413,
    HeadTooLargeError: 431,
    ProtocolError: 400,
    PartitionError: 400,
    ModelFailedError: 500,
    ModelNotReadyError: 503,
}

_log = logging.getLogger(__name__)


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error; 500 for an unexpected one."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def error_body(error: Exception) -> bytes:
    """Return the body of an error's answer, ``{"error": "…"}``, in at most 1,000 characters of text.

    The client gets the message of an expected error. A model that failed, and an unexpected error, are also logged for
    the operator; of an unexpected error the client gets no more than its type.
    """
    if not isinstance(error, tuple(STATUS)):
        _log.error("a request failed", exc_info=error)
        text = f"{type(error).__name__} in the server; its log has the details"
    else:
        text = short(error, 1000)
        if isinstance(error, ModelFailedError):
            _log.error("%s", error, exc_info=error.__cause__)
    return json.dumps({"error": text}).encode()
