"""When the tail has to start on the device for an answer in time."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.errors import DeadlineError

_LEAST_SPREAD = 0.01
SURE = 2.33
"""Deviations that one in a hundred is above."""
# An answer is late when 99 in 100 would have come, but not before a round trip more than was predicted, and at the
# latest after three times the prediction and four round trips: one lost segment that is sent again after a timeout, and
# a connection that is opened again, both stay below that.
_LATE_FACTOR, _LATE_ROUND_TRIPS = 3.0, 4.0
# Cap on the log-scale spread: far above the limit before, and it keeps exp() from overflowing.
_MOST_SPREAD = 5.0
# A scheduler, a garbage collector or a radio that wakes up may cost as much at any time.
_LEAST_PATIENCE_S = 0.05
_TRIALS = 2
_TRIAL_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Rescue:
    """When to start the local tail beside a request, in seconds from when the boundary tensors are at hand.

    `start_s` is 0 when it is `hedged`, that is worth starting at once, or when it would be late already.
    `late` is the probability that the server's answer comes after the deadline, `slack_s` the time left after a tail
    that starts now; below 0 the deadline may be missed whatever is done.
    """

    start_s: float
    late: float
    hedged: bool
    slack_s: float


def late_probability(median_s: float, spread: float, left_s: float) -> float:
    """The probability that something of `median_s` takes longer than `left_s`, if its logarithm is normal."""
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
    """Return when to start the local tail so that it ends before the deadline 99 times in 100.

    :param left_s: from now, when the boundary tensors are at hand, to the deadline
    :param remote_s: predicted from now to the server's answer; infinite when no server is asked
    :param tail_s: predicted for the tail on the device, its slow-down included
    :param remote_spread, tail_spread: relative deviations of the two, as :attr:`Quantity.spread`
    :param hedge_above: probability of a late answer from which the local tail starts at once
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
        stoppable: whether a tail that turns out not to be needed ends early. If not, it is started only once as much
            has been waited in vain as it costs.
        tail_s: predicted seconds of such a tail; None where they are unknown.
    """
    likely_s = remote_s * math.exp(min(SURE * spread, _MOST_SPREAD))
    patience_s = max(likely_s, remote_s + round_trip_s + _LEAST_PATIENCE_S)
    if not stoppable:
        patience_s = math.inf if tail_s is None else max(patience_s, remote_s + tail_s)
    return min(patience_s, max(_LATE_FACTOR * remote_s + _LATE_ROUND_TRIPS * round_trip_s, _LEAST_PATIENCE_S))


def check_deadline(deadline_s: float, best_s: float, how: str) -> None:
    """Raise unless an answer within `deadline_s` is possible.

    :param best_s: the least predicted latency of all ways to answer, and `how` it is reached, such as "on the device"
    :raises DeadlineError: it is not; the message and its ``best_s`` name the best that is
    """
    if not (deadline_s > 0 and math.isfinite(deadline_s)):
        raise DeadlineError(f"a deadline of {deadline_s} s cannot be: give a positive number of seconds", best_s)
    if deadline_s < best_s:
        raise DeadlineError(
            f"no answer within {deadline_s:g} s: the best possible is {best_s:.4g} s, {how}; give a later deadline, "
            "or a smaller model",
            best_s,
        )


class Refusals:
    """Which calls run although their deadlines cannot be kept as it looks. Thread-safe.

    A call that is refused shows nothing, so whoever refuses takes what was slow for a while for slow long after. Once
    calls have been refused for `after_s`, or for five times what one takes if that is longer, two are let through: one
    measurement unlike those before it is not believed.
    """

    def __init__(self, *, now_s: NowS = time.monotonic, after_s: float = 1.0) -> None:
        self._lock = threading.Lock()
        self._since = Since(now_s)
        self._after_s = after_s
        self._refusing = False
        self._trials = 0

    def refuse(self, best_s: float) -> bool:
        """Whether to refuse a call that takes `best_s` at best, and is due before that."""
        with self._lock:
            if not self._refusing:
                self._refusing = True
                self._since.mark()
            elif self._trials:
                self._trials -= 1
                return False
            elif self._since.passed_s() >= max(self._after_s, _TRIAL_PAUSE * best_s):
                self._trials = _TRIALS - 1
                self._since.mark()
                return False
            return True

    def end(self) -> None:
        """A call can be in time."""
        if self._refusing:
            with self._lock:
                self._refusing, self._trials = False, 0
