"""The access log: a record for each request, by the logger ``torchsurgeon.serve.access``."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from torchsurgeon.serve.outcome import Outcome

# The access log is written this often, so that a request costs the event loop no more than appending to a list.
_EVERY_S = 0.1
# Where the log cannot be written as fast as requests come, the oldest lines are dropped.
_MOST_WAITING = 20_000

# What all records have in common.
_ALIKE = vars(logging.LogRecord(__name__, logging.INFO, __file__, 0, "request", (), None))

access = logging.getLogger(__name__)


class AccessLog:
    """Writes one record for each request to this module's logger, in a thread of its own.

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
