"""Stop asking a server that does not answer, and find out soon when it does again."""

from __future__ import annotations

import random
import threading
import time
from typing import Literal

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.errors import AdaptError

State = Literal["closed", "open", "half-open"]

_BACKOFF_SHARE, _TRIAL_SHARE = 0.7, 0.2
_FIRST_BACKOFF_S = 0.1
_PROVEN_ANSWERS = 3


class CircuitBreaker:
    """Closed while a server answers, open while it does not, half-open while one trial finds out. Thread-safe.

    The pause before a trial doubles with every failure, by a random half of it so that devices do not return at once
    (Nygard, Release It!, 2007, for the pattern). Pause and trial together stay below `return_s`: when trials are made
    as soon as they are due, a server is used again within that time of its return.

    :param failures: that open it when the server was healthy before; one that has just returned gets a single one
    :param return_s: within which a returned server is found
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
                f"a breaker cannot open after {failures} failures and find a return within {return_s} s: give 1 "
                "failure or more, and a positive number of seconds"
            )
        self.opened = 0
        """How many times it has opened after being closed."""
        self.trial_s = _TRIAL_SHARE * return_s
        """Time a trial may take; one that takes longer has failed."""
        self._lock = threading.Lock()
        self._random = jitter or random.Random()
        self._failures = failures
        self._most_backoff_s = _BACKOFF_SHARE * return_s
        self._least_backoff_s = min(_FIRST_BACKOFF_S, self._most_backoff_s)
        self._state: State = "closed"
        self._entered = Since(now_s)
        self._pause_s = 0.0
        self._level = 0
        self._failed = 0
        self._answered = _PROVEN_ANSWERS

    @property
    def state(self) -> State:
        """The state now. An open breaker whose pause is over stays open until a trial is allowed."""
        return self._state

    def allow(self) -> bool:
        """Whether to ask the server now. In the open state a True is the one trial: tell its end."""
        with self._lock:
            if self._state == "closed":
                return True
            if self._entered.passed_s() < (self._pause_s if self._state == "open" else self.trial_s):
                return False
            # A trial that never told its end is given up like one that failed, and this is the next.
            self._enter("half-open")
            return True

    def succeeded(self) -> None:
        """The server answered: use it. Only several answers in a row make its next failure a first one again."""
        with self._lock:
            self._failed = 0
            if self._state != "closed":
                self._enter("closed")
                self._answered = 0
            self._answered += 1
            if self._answered >= _PROVEN_ANSWERS:
                self._level = 0

    def failed(self) -> None:
        """The server did not answer, or too late, or wrongly."""
        with self._lock:
            self._failed += 1
            if self._state == "open":
                return  # of a request that began before it opened
            if self._state == "closed":
                if self._answered >= _PROVEN_ANSWERS and self._failed < self._failures:
                    return
                self.opened += 1
            pause_s = min(self._least_backoff_s * 2**self._level, self._most_backoff_s)
            if pause_s < self._most_backoff_s:
                self._level += 1
            self._pause_s = pause_s * self._random.uniform(0.5, 1.0)
            self._enter("open")

    def _enter(self, state: State) -> None:
        self._state = state
        self._entered.mark()
