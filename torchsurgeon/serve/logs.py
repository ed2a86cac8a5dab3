"""The log of a server as text or as JSON.

Everything goes through Python's ``logging``, by the loggers below ``torchsurgeon``. A program that has its own handlers
for these keeps them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, Literal

from torchsurgeon.serve.outcome import Outcome

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

# The message of a request's entry in the access log, whose level is INFO.
REQUEST = "request"
Ended = tuple[float, Outcome]
"""When a request ended, in seconds since the epoch, and what became of it."""

# The attributes of a record that are written besides its message, in this order.
_FIELDS = ("client", "request_id", "asked", "model", "cut", "status", "error", "duration_ms")
_LINE = f"%s.%03d+00:00 INFO {REQUEST}%s request_id=%s%s duration_ms=%.3f"
_encode = json.JSONEncoder(ensure_ascii=False).encode
_LOGGERS = ("torchsurgeon", "uvicorn", "py.warnings")


class LineFormatter(logging.Formatter):
    """Formats records as lines. Those of requests it also formats many at a time, in a quarter of the time."""

    def lines(self, logger: str, requests: Sequence[Ended]) -> list[str]:
        """Return the lines that ``format()`` would return for records of requests by a logger of this name."""
        raise NotImplementedError


class TextFormatter(LineFormatter):
    """One line: the time, the level, the message, and then what is known of the request as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; that of an error is followed by its traceback."""
        message = record.getMessage()
        if "\n" in message or "\r" in message:
            message = message.replace("\n", "\\n").replace("\r", "\\r")
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{_time(record.created)} {record.levelname} {message}{_text(_known(record.__dict__))}{trace}"

    def lines(self, logger: str, requests: Sequence[Ended]) -> list[str]:
        """Return the lines that ``format()`` would return for records of requests by a logger of this name."""
        found, known_second, begin = [], -1, ""
        for ended_s, (client, request_id, asked, model, cut, status, duration_s, _, _, error, _) in requests:
            # As in _time(). Many requests end in the same second, and a call would take longer than all this does.
            second = int(ended_s)
            if second != known_second:
                known_second, begin = second, _second(second)
            who = f" client={client}" if client else ""
            rest = _cached(_text, asked, model, cut, status, error)
            # Numbers are formatted in this way in half the time that they take in an f-string.
            found.append(_LINE % (begin, (ended_s - second) * 1000, who, request_id, rest, duration_s * 1e3))
        return found


class JsonFormatter(LineFormatter):
    """One JSON object a line, with the keys ``time``, ``level``, ``logger`` and ``message``.

    A record of a request has the keys ``client``, ``request_id``, ``asked``, ``model``, ``cut``, ``status`` and
    ``duration_ms`` as far as they are known. That of an error has its traceback under ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as text."""
        found = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_known(record.__dict__),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return _encode(found)

    def lines(self, logger: str, requests: Sequence[Ended]) -> list[str]:
        """Return the lines that ``format()`` would return for records of requests by a logger of this name."""
        alike = f'"level": "INFO", "logger": {_encode(logger)}, "message": "{REQUEST}"'
        found = []
        for ended_s, (client, request_id, asked, model, cut, status, duration_s, _, _, error, _) in requests:
            who = f', "client": {_encode(client)}' if client else ""
            found.append(
                f'{{"time": "{_time(ended_s)}", {alike}{who}, "request_id": {_encode(request_id)}'
                f'{_cached(_json, asked, model, cut, status, error)}, "duration_ms": {round(duration_s * 1e3, 3)}}}'
            )
        return found


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the log to a stream. It takes the lines of many requests in one write."""

    def write(self, logger: str, requests: Sequence[Ended]) -> None:
        """Write the lines of requests, which a logger of this name tells of; a failure is dealt with as in emit()."""
        formatter = self.formatter
        assert isinstance(formatter, LineFormatter)
        self.acquire()
        try:
            self.stream.write(self.terminator.join([*formatter.lines(logger, requests), ""]))
            self.flush()
        except Exception:
            told = {"name": logger, "msg": f"the log lost {len(requests)} lines", "levelno": logging.INFO}
            self.handleError(logging.makeLogRecord(told))
        finally:
            self.release()


def log_handler(stream: Any, log_format: LogFormat) -> LogHandler:
    """Return a handler that writes the log to a stream.

    Args:
        stream: the stream.
        log_format: ``"text"`` or ``"json"``.
    """
    handler = LogHandler(stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    return handler


def configure(log_format: LogFormat) -> None:
    """Write the server's log to standard error.

    A logger that has handlers, itself or by one above it, is left as its program has set it up.

    Args:
        log_format: ``"text"`` or ``"json"``.
    """
    handler = log_handler(sys.stderr, log_format)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.hasHandlers():
            logger.addHandler(handler)
    if log_format == "json":
        logging.getLogger("torchsurgeon.serve").setLevel(logging.INFO)
        # A warning would be printed over two lines that are no JSON.
        logging.captureWarnings(True)


def _time(created_s: float) -> str:
    second = int(created_s)
    return f"{_second(second)}.{int((created_s - second) * 1000):03d}+00:00"


# Many lines are written in the same second.
@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _known(found: Mapping[str, Any]) -> dict[str, object]:
    return {name: found[name] for name in _FIELDS if found.get(name) not in (None, "")}


def _text(known: Mapping[str, object]) -> str:
    return "".join([f" {name}={_printable(value)}" for name, value in known.items()])


def _printable(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.3f}"
    # A client chooses the path and the name of the model. A line break in them would begin a line of the client's own.
    return value.encode("unicode_escape").decode() if isinstance(value, str) and not value.isprintable() else value


def _json(known: Mapping[str, object]) -> str:
    return f", {_encode(known)[1:-1]}" if known else ""


# Requests for one cut of a model have all this in common.
@lru_cache(maxsize=512)
def _cached(
    how: Callable[[Mapping[str, object]], str], asked: str, model: str, cut: str, status: int, error: str
) -> str:
    return how(_known({"asked": asked, "model": model, "cut": cut, "status": status, "error": error}))
