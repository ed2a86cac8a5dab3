"""The log of a server as text or as JSON, and its access log.

Everything goes through Python's ``logging``: complaints and progress through the loggers below ``torchsurgeon``, and a
line for each request through ``torchsurgeon.serve.access``. A program that has its own handlers for these keeps them.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import deque
from datetime import datetime, timezone
from typing import Literal

from torchsurgeon.serve.outcome import Outcome

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

# The attributes of a record that are written besides its message, in this order.
_FIELDS = ("client", "request_id", "asked", "model", "cut", "status", "duration_ms")
_LOGGERS = ("torchsurgeon", "uvicorn", "py.warnings")
# The access log is written this often, so that a request costs the event loop no more than appending to a list.
_EVERY_S = 0.1
# Where the log cannot be written as fast as requests come, the oldest lines are dropped.
_MOST_WAITING = 20_000

access = logging.getLogger("torchsurgeon.serve.access")


class TextFormatter(logging.Formatter):
    """One line: the time, the level, the message, and then what is known of the request as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; that of an error is followed by its traceback."""
        message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        parts = [_time_of(record), record.levelname, message]
        parts += [f"{name}={value}" for name, value in _known(record).items()]
        if record.exc_info:
            parts[-1] += "\n" + self.formatException(record.exc_info)
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys ``time``, ``level``, ``logger`` and ``message``.

    A record of a request has the keys ``client``, ``request_id``, ``asked``, ``model``, ``cut``, ``status`` and
    ``duration_ms`` as far as they are known. That of an error has its traceback under ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as text."""
        found = {
            "time": _time_of(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_known(record),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False)


def configure(log_format: LogFormat) -> None:
    """Write the server's log to standard error.

    A logger that has handlers, itself or by one above it, is left as its program has set it up.

    Args:
        log_format: ``"text"`` or ``"json"``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.hasHandlers():
            logger.addHandler(handler)
    if log_format == "json":
        logging.getLogger("torchsurgeon.serve").setLevel(logging.INFO)
        # A warning would be printed over two lines that are no JSON.
        logging.captureWarnings(True)


class AccessLog:
    """Writes one record for each request to the logger ``torchsurgeon.serve.access``, in a thread of its own.

    The event loop only appends to a list, so a full disk or a slow terminal delays no answer.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Outcome]] = deque(maxlen=_MOST_WAITING)
        self._lost = 0
        self._end = threading.Event()
        if not access.isEnabledFor(logging.INFO):
            access.setLevel(logging.INFO)
        self._thread = threading.Thread(target=self._run, name="torchsurgeon-access-log", daemon=True)
        self._thread.start()

    def __call__(self, outcome: Outcome) -> None:
        """Have a request written; called by the event loop's thread."""
        if len(self._waiting) == _MOST_WAITING:
            self._lost += 1
        self._waiting.append((time.time(), outcome))

    def close(self) -> None:
        """Write what is waiting, and end the thread. Closing twice is harmless."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        while self._waiting:
            access.handle(_record(*self._waiting.popleft()))
        lost, self._lost = self._lost, 0
        if lost:
            access.warning("%d requests are missing here, because the log was written too slowly", lost)


def _record(ended_s: float, outcome: Outcome) -> logging.LogRecord:
    record = logging.LogRecord(access.name, logging.INFO, __file__, 0, "request", (), None)
    record.created = ended_s
    record.__dict__.update(
        client=outcome.client,
        request_id=outcome.request_id,
        asked=outcome.asked,
        model=outcome.model,
        cut=outcome.cut,
        status=outcome.status,
        duration_ms=round(outcome.duration_s * 1e3, 3),
    )
    return record


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


def _known(record: logging.LogRecord) -> dict[str, object]:
    own = record.__dict__
    return {name: own[name] for name in _FIELDS if own.get(name) not in (None, "")}
