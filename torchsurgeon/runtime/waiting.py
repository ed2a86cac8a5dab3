"""How long a call waits for a server's answer before its tail is started on the device."""

from __future__ import annotations

import time
from collections.abc import Callable

from torchsurgeon.adapting import patience, rescue
from torchsurgeon.planning.costs import Expected
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.device import DeviceTimes
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.parts import Parts
from torchsurgeon.runtime.peer import Peer

FIRST_PATIENCE_S = 1.0
"""How long to wait for a server's first answer, when nothing is known yet of how long its answers take."""


class Waiting:
    """What one call expects of the servers that it asks.

    Args:
        times: how long the parts of the model take on this device.
        parts: the parts, some of which cannot be stopped when the answer comes after all.
        way: where the call is cut.
        scale: how many times as large as the traced example the call is.
        expected: predicts the part of the first server that is asked, for a call of so many times the example's size;
            None where nothing has been measured.
        deadline_s: when the answer is due (``time.perf_counter``); None for no deadline.

    Attributes:
        way: as given; may be assigned.
        share: how many requests the expected time allows for, this one included; ``crowded()`` raises it.
    """

    def __init__(
        self,
        times: DeviceTimes,
        parts: Parts,
        way: Way,
        scale: float,
        expected: Callable[[float], Expected] | None,
        deadline_s: float | None,
    ) -> None:
        self.way, self.share = way, 1
        self._times, self._parts, self._scale = times, parts, scale
        self._foreseen, self._deadline_s = expected, deadline_s

    def patience(self, peer: Peer, *, first: bool) -> tuple[float, Failure]:
        """Return how many seconds to wait before the tail is started on the device, and the failure to record then.

        With a deadline the seconds count from now, and without one from when the request was sent.

        Args:
            peer: the server that is asked.
            first: whether it is the first one that the call asks.
        """
        expected, times = self.expected(peer, first=first), self._times
        if expected is None:
            patience_s, why = FIRST_PATIENCE_S, "the first answer is usually sooner"
        else:
            remote_s = expected.remote_s
            # A tail that a backend runs cannot be stopped. So it is started only once the answer is late by as much
            # time as the tail takes.
            stoppable = self._parts.stoppable
            tail_s = None if stoppable else times.known_tail_s(self.way)
            patience_s = patience(
                remote_s,
                expected.spread,
                expected.round_trip_s,
                stoppable=stoppable,
                tail_s=None if tail_s is None else tail_s * self._scale,
            )
            why = f"expected after {remote_s * 1e3:.3g} ms"
        late = Failure("late", f"{peer.label} gave no answer within {patience_s * 1e3:.3g} ms, {why}")
        if self._deadline_s is None:
            return patience_s, late
        left_s = self._deadline_s - time.perf_counter()
        plan = rescue(
            left_s,
            # Where nothing is known yet, the median is taken to be half of the time that is left, with a spread of a
            # factor of two.
            remote_s=left_s / 2 if expected is None else expected.remote_s,
            remote_spread=0.7 if expected is None else expected.spread,
            tail_s=times.expected_s(self.way)[1] * self._scale,
            tail_spread=times.slowdown().spread,
        )
        if plan.start_s >= patience_s:
            return patience_s, late
        why = "will probably be late" if plan.hedged else f"had not come {plan.start_s * 1e3:.3g} ms after the head"
        return plan.start_s, Failure("deadline", f"the answer of {peer.label} {why}")

    def expected(self, peer: Peer, *, first: bool) -> Expected | None:
        """Return how long a server's part should take, given how many requests share link and server.

        Args:
            peer: the server that is asked.
            first: whether it is the first one that the call asks.
        """
        # What the server needs is not scaled down for calls smaller than the example.
        scale = max(self._scale, 1.0)
        if self._foreseen is not None and first:
            foreseen = self._foreseen(scale)
            return foreseen._replace(remote_s=foreseen.remote_s * self.share)
        duration = peer.expected_duration(self.way.point)
        if duration is None:
            return None
        round_trip_s = min(peer.state.link.estimate().round_trip.value, duration.value)
        return Expected(duration.value * self.share * scale, duration.spread, round_trip_s)

    def crowded(self, peer: Peer) -> bool:
        """Return whether more requests share link and server than this one's time allows for, and allow for them."""
        share, self.share = self.share, max(self.share, peer.under_way)
        return self.share > share
