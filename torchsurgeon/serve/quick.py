"""Which requests run in the thread that receives them, and not in one of their model's threads.

Those are requests that are so quick that handing them to another thread would take a noticeable part of their time. And
those of a client that is alone: while no other connection asks, nobody waits for the thread that receives requests. The
other thread would mostly run on another core, whose caches hold nothing of the request.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torchsurgeon.serve.recent import Recent

# Handing a request to another thread and back would take a noticeable part of a time as short as this.
_QUICK_S = 5e-4
# A slow request among quick ones is the scheduler's doing, or that of other threads: in one of the model's threads a
# request also waits for the interpreter's lock, which the thread that receives requests holds most of the time under
# load. So a kind of request loses its place only after several: a slow one counts one, a quick one takes back two, and
# the place is lost at this count and won again at zero. One that has kept everybody waiting for longer than _BRIEF_S
# loses it at once.
_LOST_AT = 8
_QUICK_COUNTS = 2
# A client is alone once it has asked so many times without another in between. Its requests then run where they are
# received if they take at most so long. Whoever comes meanwhile waits for that, and ends it.
_ALONE_AFTER, _BRIEF_S = 32, 2e-2
_MAX_REMEMBERED = 256
_SMOOTHING = 0.1
# A request that seems to take too long for its deadline is tried all the same after a pause of so many times what it
# has left. Then such trials, each of which ends with its deadline, take at most about a tenth of a thread's time.
_PAUSE = 10.0


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
    hoped_s: float = 0.0
    tried_s: float = -math.inf

    def shared(self, share_s: float) -> None:
        """Take notice of what a request took of a thread's time, whatever became of it."""
        self.share_s += (_SMOOTHING if self.share_s else 1.0) * (share_s - self.share_s)


class QuickRequests:
    """Remembers how long requests took, by their kind: what ``Received.alike`` tells of them.

    It is used by the event loop's thread and the worker's, and an update that is lost between them does no harm.

    Attributes:
        slowdown: how many times as long as the quickest of their kind requests have taken lately.
    """

    def __init__(self) -> None:
        self.slowdown = 1.0
        self._kinds: Recent[object, _Kind] = Recent(_MAX_REMEMBERED)

    def expects(self, kind: object) -> bool:
        """Return whether a request of a kind is expected to be quick; not before one was."""
        found = self._kinds.get(kind)
        return found is not None and found.quick

    def brief(self, kind: object) -> bool:
        """Return whether a request of a kind is expected to keep nobody waiting for long."""
        return 0.0 < self.expected_s(kind) <= _BRIEF_S

    def expected_s(self, kind: object) -> float:
        """Return how long a request of a kind is expected to take; 0 before there was one."""
        found = self._kinds.get(kind)
        return 0.0 if found is None else found.mean_s

    def hoped_s(self, kind: object, left_s: float) -> float:
        """Return how long a request of a kind takes at best, as far as is known; 0 where that is to be tried.

        It is asked for a request that nothing else comes before. What is known can be wrong, such as where the first
        request of a kind found the weights swapped out. If all requests were refused by it, none would ever correct it.
        So one of them is tried now and then.

        Args:
            kind: the kind.
            left_s: the seconds to the request's deadline.
        """
        found = self._kinds.get(kind)
        if found is None:
            return 0.0
        now_s = time.perf_counter()
        if found.hoped_s > left_s > 0 and now_s - found.tried_s > _PAUSE * left_s:
            found.tried_s = now_s
            return 0.0
        return found.hoped_s

    def least_s(self, kind: object) -> float:
        """Return the least that a request of a kind has taken so far; 0 before there was one."""
        found = self._kinds.get(kind)
        return 0.0 if found is None else found.least_s

    def share_s(self, kind: object) -> float:
        """Return how much of a run a request of a kind is expected to take; 0 before there was one."""
        found = self._kinds.get(kind)
        return 0.0 if found is None else found.share_s

    def took(self, kind: object, duration_s: float, together: int = 1) -> float:
        """Take notice of how long a request of a kind took, or so many together.

        Returns:
            The least that one of its kind has taken so far.
        """
        found = self._known(kind)
        found.mean_s += (_SMOOTHING if found.mean_s else 1.0) * (duration_s - found.mean_s)
        found.shared(duration_s / together)
        found.least_s = min(found.least_s or duration_s, duration_s)
        found.hoped_s = min(found.hoped_s or duration_s, duration_s)
        if found.least_s:
            self.slowdown += _SMOOTHING * (duration_s / found.least_s - self.slowdown)
        if duration_s < _QUICK_S:
            found.count = max(0, found.count - _QUICK_COUNTS)
        elif duration_s > _BRIEF_S:
            found.count = _LOST_AT
        else:
            found.count = min(_LOST_AT, found.count + 1)
        if found.count in (0, _LOST_AT):
            found.quick = found.count == 0
        return found.least_s

    def failed(self, kind: object, share_s: float, *, at_least_s: float = 0.0) -> None:
        """Take notice of a request of a kind that was not answered.

        Args:
            kind: the kind.
            share_s: what it took of a thread's time.
            at_least_s: what an answer would have taken at least, since the request was stopped after so long.
        """
        found = self._known(kind)
        found.shared(share_s)
        found.hoped_s = max(found.hoped_s, at_least_s)

    def _known(self, kind: object) -> _Kind:
        found = self._kinds.get(kind)
        if found is None:
            found = _Kind()
            self._kinds.put(kind, found)
        return found
