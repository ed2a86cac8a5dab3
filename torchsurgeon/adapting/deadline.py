"""Deadlines: when to start the tail on the device beside a request, and which deadlines are refused."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.errors import DeadlineError, is_finite, short

_LEAST_SPREAD = 0.01
SURE = 2.33
"""Standard deviations above the mean that one in a hundred normally distributed values exceeds."""
# Likewise one in ten.
_USUAL = 1.28
# An answer is late once nine in ten answers would have arrived, but not sooner than one round trip and
# _LEAST_PATIENCE_S after the prediction, and in any case after three times the prediction and four round trips: a lost
# segment that is sent again after a timeout, and a connection that has to be opened again, both take less than that.
_LATE_FACTOR, _LATE_ROUND_TRIPS = 3.0, 4.0
# Cap on the log-scale spread: far above the limit before, and it keeps exp() from overflowing.
_MOST_SPREAD = 5.0
# A scheduler, a garbage collector or a radio that wakes up may cost this much at any time.
_LEAST_PATIENCE_S = 0.05
# How long calls are refused before one is let through, in multiples of a call's duration.
_TRIAL_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Rescue:
    """When to start the tail on the device beside a request to the server.

    Attributes:
        start_s: seconds to wait before the start, counted from when the boundary tensors are ready. 0 where the tail is
            ``hedged``, or where it would already be late.
        late: probability that the server's answer comes after the deadline.
        hedged: whether a late answer is so likely that the tail is started at once.
        slack_s: seconds left before the deadline after a tail that starts at once, with 99 % confidence. Below 0 the
            deadline may be missed whatever is done.
    """

    start_s: float
    late: float
    hedged: bool
    slack_s: float


def late_probability(median_s: float, spread: float, left_s: float) -> float:
    """Return the probability that a log-normally distributed duration exceeds a given time.

    Args:
        median_s: the duration's median in seconds; it may be infinite.
        spread: standard deviation of the duration's logarithm.
        left_s: the given time in seconds.
    """
    if left_s <= 0 or math.isinf(median_s):
        return 1.0
    if median_s <= 0:
        return 0.0
    return 0.5 * math.erfc(math.log(left_s / median_s) / (max(spread, _LEAST_SPREAD) * math.sqrt(2)))


def rescue(
    left_s: float,
    *,
    remote_s: float,
    remote_spread: float,
    tail_s: float,
    tail_spread: float,
    hedge_above: float = 0.5,
) -> Rescue:
    """Return when to start the tail on the device so that it ends before the deadline 99 times in 100.

    Args:
        left_s: seconds from now, when the boundary tensors are ready, to the deadline.
        remote_s: predicted seconds from now to the server's answer; infinite when no server is asked.
        remote_spread: relative deviation of ``remote_s``, like ``Quantity.spread``.
        tail_s: predicted seconds of the tail on the device, its slow-down included.
        tail_spread: relative deviation of ``tail_s``.
        hedge_above: probability of a late answer above which the tail is started at once.
    """
    slack_s = left_s - tail_s * math.exp(SURE * max(tail_spread, _LEAST_SPREAD))
    late = late_probability(remote_s, remote_spread, left_s)
    hedged = late > hedge_above
    return Rescue(0.0 if hedged else max(slack_s, 0.0), late, hedged, slack_s)


def patience(
    remote_s: float, spread: float, round_trip_s: float, *, stoppable: bool = True, tail_s: float | None = None
) -> float:
    """Return for how many seconds to wait for an answer before the tail is started on the device beside it.

    Args:
        remote_s: predicted seconds from the end of the head to the answer.
        spread: the prediction's relative deviation.
        round_trip_s: one round trip of the link.
        stoppable: whether the tail can be stopped when the answer arrives after all. If it cannot, it is started only
            once the answer is late by as much time as the tail costs.
        tail_s: predicted seconds of such a tail; None where they are unknown.
    """
    likely_s = remote_s * math.exp(min(_USUAL * spread, _MOST_SPREAD))
    patience_s = max(likely_s, remote_s + round_trip_s + _LEAST_PATIENCE_S)
    if not stoppable:
        patience_s = math.inf if tail_s is None else max(patience_s, remote_s + tail_s)
    return min(patience_s, max(_LATE_FACTOR * remote_s + _LATE_ROUND_TRIPS * round_trip_s, _LEAST_PATIENCE_S))


def check_deadline(deadline_s: float, best_s: float, how: str) -> None:
    """Raise unless an answer within ``deadline_s`` is possible.

    Args:
        deadline_s: seconds within which an answer is wanted.
        best_s: the lowest predicted latency of all ways to answer, in seconds.
        how: the way with that latency, for the message, such as "all on the device".

    Raises:
        DeadlineError: ``deadline_s`` is not positive and finite, or is below ``best_s``. The error's ``best_s`` holds
            the lowest latency.
    """
    if not (is_finite(deadline_s) and deadline_s > 0):
        raise DeadlineError(f"a deadline must be a positive, finite number of seconds; got {short(deadline_s)}", best_s)
    if deadline_s < best_s:
        raise DeadlineError(
            f"no answer within {deadline_s:g} s: the best possible is {best_s:.4g} s, {how}; give a later deadline, "
            "or a smaller model",
            best_s,
        )


class Refusals:
    """Lets an occasional call through while deadlines look impossible, so that recovery is noticed. Thread-safe.

    A refused call measures nothing. If every call were refused, a server or device that was slow for a while would be
    taken for slow for ever. So a call is let through once calls have been refused for ``after_s``, or for five times
    what one call takes if that is longer. Where deadlines stay impossible, that is one late answer a second.

    Args:
        now_s: a monotonic clock in seconds.
        after_s: seconds of refusals after which calls are let through.
    """

    def __init__(self, *, now_s: NowS = time.monotonic, after_s: float = 1.0) -> None:
        self._lock = threading.Lock()
        self._since = Since(now_s)
        self._after_s = after_s
        self._refusing = False

    def refuse(self, best_s: float) -> bool:
        """Return whether to refuse a call whose deadline is before the ``best_s`` seconds that it takes at best."""
        with self._lock:
            if not self._refusing:
                self._refusing = True
                self._since.mark()
            elif self._since.passed_s() >= max(self._after_s, _TRIAL_PAUSE * best_s):
                self._since.mark()
                return False
            return True

    def end(self) -> None:
        """Record that a call can meet its deadline: the refusals are over."""
        # Read without the lock, since almost every call comes by here and finds False.
        if self._refusing:
            with self._lock:
                self._refusing = False
