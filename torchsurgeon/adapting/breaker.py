"""The circuit breaker of one server: stop asking it while it fails, and notice soon when it works again."""

from __future__ import annotations

import random
import threading
import time
from typing import Literal

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.errors import AdaptError

BreakerState = Literal["closed", "open", "half-open"]

_BACKOFF_SHARE, _TRIAL_SHARE = 0.7, 0.2
_FIRST_BACKOFF_S = 0.1
_PROVEN_ANSWERS = 3


class CircuitBreaker:
    """Says whether to ask one server: closed while it answers, open while it fails, half-open in a trial. Thread-safe.

    An open breaker lets no request through. After a pause it lets one through as a trial (half-open): an answer closes
    the breaker, a failure opens it again. The pause doubles with every failure, and a random part of up to one half is
    taken off so that many devices do not return in the same moment. Pause and trial together stay below ``return_s``:
    when trials are made as soon as they are allowed, a server is used again within that time after its return. The
    pattern is from Nygard, Release It!, 2007.

    Args:
        now_s: a monotonic clock in seconds.
        failures: consecutive failures that open the breaker. Until a server has given three answers in a row after its
            return, a single failure opens it.
        return_s: seconds after its return within which a server is used again.
        jitter: the source of randomness of the pauses.

    Raises:
        AdaptError: ``failures`` is below 1, or ``return_s`` is not positive and finite.

    Attributes:
        opened: how many times the breaker has opened after being closed.
        trial_s: seconds that a trial may take. A trial that takes longer has failed.
    """

    def __init__(
        self,
        *,
        now_s: NowS = time.monotonic,
        failures: int = 2,
        return_s: float = 2.0,
        jitter: random.Random | None = None,
    ) -> None:
        if failures < 1 or not 0 < return_s < float("inf"):
            raise AdaptError(
                f"a breaker takes 1 failure or more, and a positive, finite return_s in seconds; got {failures} and "
                f"{return_s}"
            )
        self.opened = 0
        self.trial_s = _TRIAL_SHARE * return_s
        self._lock = threading.Lock()
        self._random = jitter or random.Random()
        self._failures = failures
        self._most_backoff_s = _BACKOFF_SHARE * return_s
        self._least_backoff_s = min(_FIRST_BACKOFF_S, self._most_backoff_s)
        self._state: BreakerState = "closed"
        self._entered = Since(now_s)
        self._pause_s = 0.0
        self._level = 0
        self._failed = 0
        self._answered = _PROVEN_ANSWERS

    @property
    def state(self) -> BreakerState:
        """The state now. An open breaker whose pause is over stays open until ``allow()`` begins a trial."""
        return self._state

    def allow(self) -> bool:
        """Return whether to ask the server now.

        True from a breaker that is not closed begins the one trial. The caller then reports how it ended, with
        ``succeeded()`` or ``failed()``.
        """
        with self._lock:
            if self._state == "closed":
                return True
            if self._entered.passed_s() < (self._pause_s if self._state == "open" else self.trial_s):
                return False
            # A trial whose end nobody reported within trial_s counts as failed, so the next one may begin.
            self._enter("half-open")
            return True

    def succeeded(self) -> None:
        """Record an answer: the breaker closes.

        After a return it takes three answers in a row until a single failure is forgiven again, and until the pauses
        start from the shortest.
        """
        if not (self._failed or self._level) and self._state == "closed" and self._answered >= _PROVEN_ANSWERS:
            return  # The usual case, in which an answer changes nothing.
        with self._lock:
            self._failed = 0
            if self._state != "closed":
                self._enter("closed")
                self._answered = 0
            self._answered += 1
            if self._answered >= _PROVEN_ANSWERS:
                self._level = 0

    def failed(self) -> None:
        """Record a failure (no answer, a late one or a wrong one): the breaker may open."""
        with self._lock:
            self._failed += 1
            if self._state == "open":
                return  # The failed request began before the breaker opened, so it says nothing new.
            if self._state == "closed":
                if self._answered >= _PROVEN_ANSWERS and self._failed < self._failures:
                    return
                self.opened += 1
            pause_s = min(self._least_backoff_s * 2**self._level, self._most_backoff_s)
            if pause_s < self._most_backoff_s:
                self._level += 1
            self._pause_s = pause_s * self._random.uniform(0.5, 1.0)
            self._enter("open")

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._entered.mark()
