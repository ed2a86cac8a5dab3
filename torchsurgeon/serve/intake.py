"""The requests of one model on their way to its threads: which run at once, which wait, and which run together."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torchsurgeon import wire
from torchsurgeon.errors import EncodingError, ModelFailedError
from torchsurgeon.serve.admission import MAX_QUEUE, Admission
from torchsurgeon.serve.batching import Apart, Gain
from torchsurgeon.serve.failure import ExpiredError, GoneError
from torchsurgeon.serve.fairness import ANY_S, Place
from torchsurgeon.serve.quick import QuickRequests
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.worker import Worker

Answer = Callable[[Received], wire.Encoded]
AnswerTogether = Callable[[Sequence[Received]], Sequence["wire.Encoded | Exception"]]

_SEVERAL = "several kinds"


class Intake:
    """The requests of one model.

    Args:
        name: the model's name.
        answer: answers one request.
        answer_together: answers several of one kind.
        concurrency: how many requests run at once.
        joins: whether requests of two kinds can run together.
        together: how many samples of requests that wait are run as one at most.
        max_queue: how many requests may wait.

    Attributes:
        together: as given.
        max_queue: as given.
        worker: the threads that run the requests.
    """

    def __init__(
        self,
        name: str,
        answer: Answer,
        answer_together: AnswerTogether,
        joins: Callable[[object, object], bool] = lambda kind, other: False,
        *,
        concurrency: int = 1,
        together: int = 1,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.together = together
        self.max_queue = max_queue
        self.answer_together = answer_together
        self._answer = answer
        self._joins = joins
        self._gain = Gain(together)
        # Of requests of several kinds: what a run takes, divided by what they would take one after the other.
        self._gain_of_several = Gain(together)
        self._gain_of_several.took(_SEVERAL, 1, 1.0)
        self._apart = Apart()
        self._quick = QuickRequests()
        self._admission = Admission(name, max_queue, concurrency)
        self.worker = Worker(f"torchsurgeon-{name}", concurrency, self if together > 1 else None)

    def quick(self, alike: bytes | int) -> bool:
        """Return whether a request is so quick that a thread is not worth switching to.

        It is not where requests have no more in common than the length of their bodies: among quick ones of the same
        length one can take any time, and while it runs where it was received, the server does nothing else.

        Args:
            alike: what the request has in common with earlier ones, which say how long it takes.
        """
        return isinstance(alike, bytes) and self._quick.expects(alike)

    def brief(self, alike: bytes | int) -> bool:
        """Return whether no thread is worth switching to for a request whose client is alone."""
        return isinstance(alike, bytes) and self._quick.brief(alike)

    def submit(self, request: Received, *, quick: bool = False) -> Future[wire.Encoded]:
        """Have a thread answer a request, perhaps together with others that wait.

        Args:
            request: the request.
            quick: as ``quick()`` says.

        Raises:
            BusyError: too many requests wait, or this one would be answered after its deadline. The future raises it
                where the request has to make room for another later on.
            ClosedError: the model is served no more.
        """
        alike = request.alike
        place = Place(request.share, request.level, self._cost_s(alike))
        if request.due_s < math.inf:
            self._check_due(request, self.worker.ahead_of(place))
        if self.worker.waiting >= self.max_queue and not self.worker.evict_for(place, self._admission.displaced()):
            raise self._admission.full()
        if self.together > 1 and isinstance(alike, bytes) and not self._apart.holds(request.share):
            # Requests with the same header have the same tensors, of the same shapes, under the same codecs.
            request.kind = alike
        request.queued = True
        job = functools.partial(self._answer, request)
        return self.worker.submit(job, quick=quick, kind=request.kind, load=request, place=place)

    @property
    def slowdown(self) -> float:
        """How many times as long as without load requests have taken lately (K)."""
        return self._quick.slowdown

    def limit(self, kind: object) -> int:
        """Return how many waiting requests of a kind to run together at most; called by the worker."""
        return self._gain.limit(kind)

    def limit_of_several(self) -> int:
        """Return how many waiting requests of several kinds to run together at most; called by the worker."""
        return self._gain_of_several.limit(_SEVERAL)

    def joins(self, kind: object, other: object) -> bool:
        """Return whether requests of two kinds may run together; called by the worker."""
        known = self._gain.alone_s(kind) is not None and self._gain.alone_s(other) is not None
        return known and self._joins(kind, other)

    def weights(self, requests: Sequence[Received]) -> list[float]:
        """Return in which ratio requests share the time that they took together; called by the worker.

        At an earlier cut, or with more samples, a request takes longer than those that it runs together with.
        """
        alone_s = {kind: self._gain.alone_s(kind) for kind in {request.kind for request in requests}}
        if not all(alone_s.values()):
            return [1.0] * len(requests)
        return [alone_s[request.kind] or 1.0 for request in requests]

    def took_of_several(self, requests: Sequence[Received], duration_s: float) -> list[float]:
        """Take notice of how long requests of several kinds took that ran together.

        Returns:
            The least that a request of each one's kind has taken so far.
        """
        self._answered(requests, duration_s)
        alone_s = [self._gain.alone_s(request.kind) for request in requests]
        known_s = [one for one in alone_s if one is not None]
        if len(known_s) == len(requests) and sum(known_s) > 0:
            self._gain_of_several.took(_SEVERAL, len(requests), len(requests) * duration_s / sum(known_s))
        return [self._quick.least_s(request.alike) for request in requests]

    def took(self, requests: Sequence[Received], duration_s: float) -> float:
        """Take notice of how long a request took, or several of one kind together.

        Returns:
            The least that a request of their kind has taken so far.
        """
        self._answered(requests, duration_s)
        first, together = requests[0], len(requests)
        if first.kind is not None:
            self._gain.took(first.kind, together, duration_s)
        return self._quick.took(first.alike, duration_s, together)

    def failed(self, request: Received, ran_s: float, error: Exception) -> None:
        """Take notice of a request that was not answered, after it had run for so long."""
        if isinstance(error, ModelFailedError | EncodingError):
            self._apart.failed(request.share)
        stopped = isinstance(error, ExpiredError | GoneError)
        # One that ended soon is no reason to charge the next ones less when they are queued.
        share_s = max(ran_s, self._cost_s(request.alike))
        self._quick.failed(request.alike, share_s, at_least_s=ran_s if stopped else 0.0)

    def _answered(self, requests: Sequence[Received], duration_s: float) -> None:
        self._admission.took(duration_s, len(requests))
        if self.together > 1:
            for request in requests:
                self._apart.answered(request.share)

    def _cost_s(self, alike: bytes | int) -> float:
        return self._quick.share_s(alike) or self._admission.each_s or ANY_S

    def _check_due(self, request: Received, ahead: int) -> None:
        if ahead:
            expected_s = self._quick.expected_s(request.alike)
        else:
            # It keeps nobody waiting yet, and is stopped at its deadline if it takes longer than at best.
            expected_s = self._quick.hoped_s(request.alike, request.due_s - time.perf_counter())
        self._admission.check(request, ahead, expected_s)
