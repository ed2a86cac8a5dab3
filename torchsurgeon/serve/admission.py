"""Which requests a model takes: not more than may wait, and none whose deadline has passed before its turn comes."""

from __future__ import annotations

import math
import re
import time

from torchsurgeon import wire
from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.serve.failure import BusyError
from torchsurgeon.serve.received import Received

DEADLINE = wire.DEADLINE.lower().encode()
MAX_QUEUE = 256

_SECONDS = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")
_SMOOTHING = 0.1


def deadline_in(value: bytes | None) -> float:
    """Return the seconds that a client gives a request in ``Torchsurgeon-Deadline-S``; infinity where it gives none.

    Raises:
        ProtocolError: the value is no number of seconds.
    """
    if value is None:
        return math.inf
    if not _SECONDS.fullmatch(value):
        raise ProtocolError(
            f"{wire.DEADLINE} must be a number of seconds, such as 0.25; got {short(value.decode('latin-1'))}"
        )
    return float(value)


class Admission:
    """Takes requests of one model, or refuses them at once.

    It is used by several threads, and an update that is lost between them does no harm.

    Args:
        name: the model's name.
        max_queue: how many requests may wait.
        concurrency: how many run at once.
    """

    def __init__(self, name: str, max_queue: int, concurrency: int) -> None:
        self._name, self._max_queue, self._concurrency = name, max_queue, concurrency
        self._each_s = 0.0

    def took(self, duration_s: float, count: int) -> None:
        """Take notice of how long a thread took for ``count`` requests."""
        each_s = duration_s / count
        self._each_s += (_SMOOTHING if self._each_s else 1.0) * (each_s - self._each_s)

    def wait_s(self, waiting: int) -> float:
        """Return how long a request is expected to wait behind ``waiting`` others."""
        return waiting * self._each_s / self._concurrency

    def check(self, request: Received, waiting: int, expected_s: float) -> None:
        """Check that a request may wait.

        Args:
            request: the request.
            waiting: how many wait already.
            expected_s: how long it is expected to take once it is its turn.

        Raises:
            BusyError: too many wait, or it would be answered after its deadline.
        """
        wait_s = self.wait_s(waiting)
        if waiting >= self._max_queue:
            raise BusyError(
                f"model {self._name!r} has as many requests waiting as it takes ({self._max_queue}); try again later, "
                "or ask another server",
                wait_s,
            )
        left_s = request.due_s - time.perf_counter()
        if wait_s + expected_s > left_s:
            raise BusyError(
                f"model {self._name!r} cannot answer within the request's deadline, of which {max(0.0, left_s):.3g} s "
                f"are left: {waiting} requests wait, so an answer takes about {wait_s + expected_s:.3g} s",
                wait_s,
            )
