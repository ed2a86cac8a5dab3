"""The access log: a record for each request, by the logger ``torchsurgeon.serve.access``."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from torchsurgeon.serve.logs import REQUEST, Ended, LineFormatter, LogHandler
from torchsurgeon.serve.outcome import Outcome

# The access log is written this often, so that a request costs the event loop no more than appending to a list.
_EVERY_S = 0.1
# Where the log cannot be written as fast as requests come, the oldest lines are dropped.
_MOST_WAITING = 20_000
# So many lines are written at a time, so that the thread which answers requests never waits long for this one.
_BUNCH = 200
# When the server ends, so long it waits for a log that is written too slowly.
_PATIENCE_S = 10.0

# What all records have in common.
_ALIKE = vars(logging.LogRecord(__name__, logging.INFO, __file__, 0, REQUEST, (), None))

access = logging.getLogger(__name__)


class AccessLog:
    """Writes one record for each request to this module's logger, in a thread of its own.

    The event loop only appends to a list, so a full disk or a slow terminal delays no answer. Where nobody but the
    server's own handler is told of the records, the lines are formatted and written without them, many at a time.
    """

    def __init__(self) -> None:
        self._waiting: deque[Ended] = deque(maxlen=_MOST_WAITING)
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
        """Write what is waiting, and end the thread; a log that cannot be written is waited for ``_PATIENCE_S`` only.

        Closing twice is harmless.
        """
        self._end.set()
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        while not self._end.wait(_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        while self._waiting:
            count = min(len(self._waiting), _BUNCH)
            bunch = [self._waiting.popleft() for _ in range(count)]
            ours = _own_handlers()
            for handler in ours:
                handler.write(access.name, bunch)
            if not ours:
                for one in bunch:
                    access.handle(_record(*one))
        lost, self._lost = self._lost, 0
        if lost:
            access.warning("%d requests are missing here, because the log was written too slowly", lost)


def _own_handlers() -> Sequence[LogHandler]:
    """Return the handlers to which lines can be given at once; none where anybody else is to be told of records."""
    handlers = list(_handlers(access))
    ours = [
        one
        for one in handlers
        if isinstance(one, LogHandler)
        and isinstance(one.formatter, LineFormatter)
        and one.level <= logging.INFO
        and not one.filters
    ]
    return ours if len(ours) == len(handlers) and not access.filters and not access.disabled else []


def _handlers(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    """Return the handlers that are told of a logger's records, as ``logging`` finds them."""
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _record(ended_s: float, outcome: Outcome) -> logging.LogRecord:
    # A new one asks the system for names of threads and processes, which takes longer than all the rest.
    record = logging.LogRecord.__new__(logging.LogRecord)
    record.__dict__.update(
        _ALIKE,
        created=ended_s,
        msecs=ended_s % 1.0 * 1000,
        client=outcome.client,
        request_id=outcome.request_id,
        asked=outcome.asked,
        model=outcome.model,
        cut=outcome.cut,
        status=outcome.status,
        error=outcome.error,
        duration_ms=round(outcome.duration_s * 1e3, 3),
    )
    return record
