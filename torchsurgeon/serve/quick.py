"""Which requests run in the thread that receives them, and not in one of their model's threads.

Those are requests that are so quick that handing them to another thread would take a noticeable part of their time. And
those of a client that is alone: while no other connection asks, nobody waits for the thread that receives requests. The
other thread would mostly run on another core, whose caches hold nothing of the request.
"""

from __future__ import annotations

from dataclasses import dataclass

# Handing a request to another thread and back would take a noticeable part of a time as short as this.
_QUICK_S = 5e-4
# A slow request among quick ones is the scheduler's doing, or that of other threads: in one of the model's threads a
# request also waits for the interpreter's lock, which the thread that receives requests holds most of the time under
# load. So a kind of request loses its place only after several: a slow one counts one, a quick one takes back two, and
# the place is lost at this count and won again at zero.
_LOST_AT = 8
_QUICK_COUNTS = 2
# A client is alone once it has asked so many times without another in between. Its requests then run where they are
# received if they take at most so long. Whoever comes meanwhile waits for that, and ends it.
_ALONE_AFTER, _BRIEF_S = 32, 2e-2
_MAX_REMEMBERED = 256
_SMOOTHING = 0.1


class LoneClient:
    """Notices when one connection alone asks for inferences. It is used by the event loop's thread only."""

    def __init__(self) -> None:
        self._client, self._count = "", 0

    def asks(self, client: str) -> bool:
        """Take notice of a request, and return whether its client has been alone for a while.

        Args:
            client: the address and port that it comes from; empty where they are not known, and then nobody is alone.
        """
        if client != self._client:
            self._client, self._count = client, 0
        self._count += 1
        return bool(client) and self._count > _ALONE_AFTER


@dataclass
class _Kind:
    quick: bool = False
    count: int = 1
    mean_s: float = 0.0
    share_s: float = 0.0
    least_s: float = 0.0


class QuickRequests:
    """Remembers how long requests took, by the length of their bodies, since those of one cut have the same length.

    It is used by the event loop's thread and the worker's, and an update that is lost between them does no harm.

    Attributes:
        slowdown: how many times as long as the quickest of their kind requests have taken lately.
    """

    def __init__(self) -> None:
        self.slowdown = 1.0
        self._kinds: dict[int, _Kind] = {}

    def expects(self, body_bytes: int) -> bool:
        """Return whether a request with a body of this length is expected to be quick; not before one was."""
        kind = self._kinds.get(body_bytes)
        return kind is not None and kind.quick

    def brief(self, body_bytes: int) -> bool:
        """Return whether a request with a body of this length is expected to keep nobody waiting for long."""
        return 0.0 < self.expected_s(body_bytes) <= _BRIEF_S

    def expected_s(self, body_bytes: int) -> float:
        """Return how long a request with a body of this length is expected to take; 0 before there was one."""
        kind = self._kinds.get(body_bytes)
        return 0.0 if kind is None else kind.mean_s

    def least_s(self, body_bytes: int) -> float:
        """Return the least that a request with a body of this length has taken so far; 0 before there was one."""
        kind = self._kinds.get(body_bytes)
        return 0.0 if kind is None else kind.least_s

    def share_s(self, body_bytes: int) -> float:
        """Return how much of a run a request with a body of this length is expected to take; 0 before there was one."""
        kind = self._kinds.get(body_bytes)
        return 0.0 if kind is None else kind.share_s

    def took(self, body_bytes: int, duration_s: float, together: int = 1) -> float:
        """Take notice of how long a request took, or so many together.

        Returns:
            The least that one of its kind has taken so far.
        """
        kind = self._kinds.get(body_bytes)
        if kind is None:
            if len(self._kinds) >= _MAX_REMEMBERED:
                self._kinds.clear()
            kind = self._kinds[body_bytes] = _Kind()
        kind.mean_s += (_SMOOTHING if kind.mean_s else 1.0) * (duration_s - kind.mean_s)
        share_s = duration_s / together
        kind.share_s += (_SMOOTHING if kind.share_s else 1.0) * (share_s - kind.share_s)
        kind.least_s = min(kind.least_s or duration_s, duration_s)
        if kind.least_s:
            self.slowdown += _SMOOTHING * (duration_s / kind.least_s - self.slowdown)
        if duration_s < _QUICK_S:
            kind.count = max(0, kind.count - _QUICK_COUNTS)
        else:
            kind.count = min(_LOST_AT, kind.count + 1)
        if kind.count in (0, _LOST_AT):
            kind.quick = kind.count == 0
        return kind.least_s
