"""Which HTTP status an error becomes, and what the client is told."""

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
)


class BodyTimeoutError(Exception):
    """A request's body did not arrive in time."""


STATUS: dict[type[Exception], int] = {
    ModelNotServedError: 404,
    BodyTimeoutError: 408,
    BodyTooLargeError: 413,
    ProtocolError: 400,
    PartitionError: 400,
    ModelFailedError: 500,
    ModelNotReadyError: 503,
}

_log = logging.getLogger(__name__)


def status_of(error: Exception) -> int:
    """The HTTP status of an error; 500 for one that nobody foresaw."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def error_body(error: Exception) -> bytes:
    """``{"error": "…"}`` for the client. A failed model and an unforeseen error are also logged for the operator."""
    if not isinstance(error, tuple(STATUS)):
        _log.error("a request failed", exc_info=error)
        text = f"{type(error).__name__} in the server; its log has the details"
    else:
        text = str(error)
        if isinstance(error, ModelFailedError):
            _log.error("%s", error, exc_info=error.__cause__)
    return json.dumps({"error": text}).encode()
