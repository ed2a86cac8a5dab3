"""The HTTP status and the body with which an error is answered, and what the operator's log says of it."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Mapping
from types import MappingProxyType

from torchsurgeon.errors import (
    BodyTooLargeError,
    ModelFailedError,
    ModelNotReadyError,
    ModelNotServedError,
    PartitionError,
    ProtocolError,
    short,
)
from torchsurgeon.serve.outcome import CLIENT_GONE

# For how many seconds a client that was answered with 503 should wait at least before it asks again.
RETRY_AFTER_S = 1


class LateError(Exception):
    """A request's head or body did not arrive in time."""


class HeadTooLargeError(Exception):
    """A request's head has more lines or bytes than any request needs."""


class VersionError(Exception):
    """A request is of another version of HTTP."""


class TransferCodingError(Exception):
    """A request's body is sent in a way that the server does not know."""


class UnauthorizedError(Exception):
    """A request has no token, or one that the server does not know."""


class ForbiddenError(Exception):
    """A request asks for what the operator has not allowed."""


class BusyError(Exception):
    """A request is refused because too many wait, or because it could not be answered in time.

    Args:
        message: why, in a sentence.
        wait_s: how long those take that wait.
    """

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class DisplacedError(BusyError):
    """A request that waited was refused after all, to make room for one of a client that has fewer waiting."""


class ExpiredError(Exception):
    """A request's deadline passed before it was answered."""


class GoneError(Exception):
    """The client of a request has left, so nobody waits for its answer."""


STATUS: dict[type[Exception], int] = {
    ModelNotServedError: 404,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    LateError: 408,
    BodyTooLargeError: 413,
    HeadTooLargeError: 431,
    ProtocolError: 400,
    PartitionError: 400,
    ModelFailedError: 500,
    TransferCodingError: 501,
    ModelNotReadyError: 503,
    BusyError: 503,
    ExpiredError: 503,
    VersionError: 505,
    GoneError: CLIENT_GONE,
}

# The same complaint is written once in this time.
COMPLAINT_PERIOD_S = 10.0
# Of so many kinds at a time. What comes beyond them counts as one more kind.
_MOST_KINDS = 64


class OncePerPeriod(logging.Filter):
    """Lets the same complaint through once in a period. At the period's end it says how many more there were.

    Complaints are the same if they have the same ``complaint``, an attribute of the record, or else the same text
    before its arguments are put in. A filter belongs to a logger, so it holds whatever handlers the program has.

    Args:
        period_s: the period.
    """

    def __init__(self, period_s: float = COMPLAINT_PERIOD_S) -> None:
        super().__init__()
        self.period_s = period_s
        self._more: dict[object, int] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is written; called by ``logging``."""
        if getattr(record, "counts_more", False):
            return True
        key: object = (record.levelno, getattr(record, "complaint", record.msg))
        with self._lock:
            if key not in self._more and len(self._more) >= _MOST_KINDS:
                key = "others"
            if key in self._more:
                self._more[key] += 1
                return False
            self._more[key] = 0
        timer = threading.Timer(self.period_s, self._end, (key, record))
        timer.daemon = True
        timer.start()
        return True

    def _end(self, key: object, record: logging.LogRecord) -> None:
        with self._lock:
            more = self._more.pop(key)
        if more:
            said = "others that were not written" if key == "others" else record.getMessage()
            logging.getLogger(record.name).log(
                record.levelno, "%s: %d more in %g s", said, more, self.period_s, extra={"counts_more": True}
            )


_log = logging.getLogger(__name__)
_log.addFilter(OncePerPeriod())


def complain(
    kind: str,
    message: str,
    about: Mapping[str, str],
    error: BaseException | None = None,
    level: int = logging.ERROR,
) -> None:
    """Tell the operator of something, unless the same was told a moment ago.

    Args:
        kind: what makes two complaints the same.
        message: what is told.
        about: of which request or connection, as ``Received.about()`` returns it.
        error: what is written with its traceback; None for nothing.
        level: the level, as ``logging`` counts it.
    """
    _log.log(level, "%s", message, extra={**about, "complaint": kind}, exc_info=error)


def retry_after_s(error: BaseException) -> int:
    """Return for how many seconds a client that is answered with 503 should wait before it asks again."""
    return max(RETRY_AFTER_S, math.ceil(error.wait_s)) if isinstance(error, BusyError) else RETRY_AFTER_S


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error; 500 for an unexpected one."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def error_body(error: BaseException, about: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Return the body of an error's answer, ``{"error": "…"}``, in at most 1,000 characters of text.

    The client gets the message of an expected error. A model that failed, and an unexpected error, are also logged for
    the operator; of an unexpected error the client gets no more than its type.

    Args:
        error: the error.
        about: what the log says of the request, as ``Received.about()`` returns it.
    """
    kind = f"{type(error).__name__} {about.get('model', '')}"
    if not isinstance(error, tuple(STATUS)):
        complain(kind, "a request failed", about, error)
        text = f"{type(error).__name__} in the server; its log has the details"
    else:
        text = short(error, 1000)
        if isinstance(error, ModelFailedError):
            complain(kind, str(error), about, error.__cause__)
    return json.dumps({"error": text}).encode()
