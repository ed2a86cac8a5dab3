"""The log of a server as text or as JSON.

Everything goes through Python's ``logging``, by the loggers below ``torchsurgeon``. A program that has its own handlers
for these keeps them.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from functools import lru_cache
from typing import Literal

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

# The attributes of a record that are written besides its message, in this order.
_FIELDS = ("client", "request_id", "asked", "model", "cut", "status", "error", "duration_ms")
_encode = json.JSONEncoder(ensure_ascii=False).encode
_LOGGERS = ("torchsurgeon", "uvicorn", "py.warnings")


class TextFormatter(logging.Formatter):
    """One line: the time, the level, the message, and then what is known of the request as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; that of an error is followed by its traceback."""
        message = record.getMessage()
        if "\n" in message or "\r" in message:
            message = message.replace("\n", "\\n").replace("\r", "\\r")
        known = "".join([f" {name}={value}" for name, value in _known(record).items()])
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{_time_of(record)} {record.levelname} {message}{known}{trace}"


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
        return _encode(found)


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


def _time_of(record: logging.LogRecord) -> str:
    seconds, part_s = divmod(record.created, 1.0)
    return f"{_second(int(seconds))}.{int(part_s * 1000):03d}+00:00"


# Many lines are written in the same second.
@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _known(record: logging.LogRecord) -> dict[str, object]:
    own = record.__dict__
    return {name: own[name] for name in _FIELDS if own.get(name) not in (None, "")}
