"""Which requests a model takes: not more than may wait, and none whose deadline has passed before its turn comes.

What the headers of a request say of that is read here: its deadline and its priority.
"""

from __future__ import annotations

import math
import re
import time

from torchsurgeon import wire
from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.serve.failure import BusyError, DisplacedError
from torchsurgeon.serve.fairness import NORMAL
from torchsurgeon.serve.received import Received
from torchsurgeon.wire.header import PRIORITIES

DEADLINE = wire.DEADLINE.lower().encode()
PRIORITY = wire.PRIORITY.lower().encode()
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


def level_in(value: bytes | None, highest: int) -> int:
    """Return the priority in a request's ``Torchsurgeon-Priority``, as an index of ``wire.PRIORITIES``.

    Args:
        value: the header's value; None where the client gives none, which means normal.
        highest: the highest priority that the client is allowed. One that asks for more gets this one.

    Raises:
        ProtocolError: the value is no priority.
    """
    level = NORMAL
    if value is not None:
        name = value.decode("latin-1")
        if name not in PRIORITIES:
            raise ProtocolError(f"{wire.PRIORITY} must be one of {', '.join(PRIORITIES)}; got {short(name)}")
        level = PRIORITIES.index(name)
    return max(level, highest)


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

    @property
    def each_s(self) -> float:
        """How long a thread takes for a request; 0 before that is known."""
        return self._each_s

    def wait_s(self, waiting: int) -> float:
        """Return how long a request is expected to wait behind ``waiting`` others."""
        return waiting * self._each_s / self._concurrency

    def check(self, request: Received, ahead: int, expected_s: float) -> None:
        """Check that a request is expected to be answered by its deadline.

        Args:
            request: the request.
            ahead: how many run before it.
            expected_s: how long it is expected to take once it is its turn.

        Raises:
            BusyError: it would be answered later.
        """
        wait_s = self.wait_s(ahead)
        left_s = request.due_s - time.perf_counter()
        if wait_s + expected_s > left_s:
            raise BusyError(
                f"model {self._name!r} cannot answer within the request's deadline, of which {max(0.0, left_s):.3g} s "
                f"are left: {ahead} requests come first, so an answer takes about {wait_s + expected_s:.3g} s",
                wait_s,
            )

    def full(self) -> BusyError:
        """Return the error of a request that finds no place, and for which no other makes room."""
        return BusyError(
            f"model {self._name!r} has as many requests waiting as it takes ({self._max_queue}), and no other client "
            "has more of them waiting; try again later, or ask another server",
            self.wait_s(self._max_queue),
        )

    def displaced(self) -> DisplacedError:
        """Return the error of a request that has to make room for another."""
        return DisplacedError(
            f"model {self._name!r} has as many requests waiting as it takes ({self._max_queue}), and this one makes "
            "room for a client that has fewer of them waiting, or for a higher priority; try again later, or ask "
            "another server",
            self.wait_s(self._max_queue),
        )
