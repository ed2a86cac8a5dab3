"""Estimates of the link from the requests that use it, and when it is probed because no request does."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.adapting.mean import Mean, Quantity
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import Link, Radio

# Over recorded and synthetic uplinks, a longer memory follows too late, and a shorter one is no better than the last
# transfer alone.
_MEMORY_S = 0.2
# A request that a stall has held up is over with the stall, so the last round trip counts for half at least.
_TRIP_SHARE = 0.5
_FIRST_WINDOW_BYTES = 1 << 14  # TCP sends this much at once; a shorter transfer that arrives at once shows no rate
_SURELY_TIMED = 2.0  # a short transfer that took this many times the timing error does show one
_PACKET_BYTES = 1500
_TIMER_S = 2e-3  # error of a transfer's measured duration
_LEAST_ROUND_TRIP_S = 5e-5
_LEAST_BIT_S, _MOST_BIT_S, _MOST_ROUND_TRIP_S = 1e3, 1e12, 60.0


class LinkEstimate(NamedTuple):
    """The estimated link.

    Attributes:
        uplink: rate in bit/s, with its uncertainty and age.
        downlink: rate in bit/s, likewise.
        round_trip: seconds, likewise.
        radio: the radio of the link that the estimator started from.
    """

    uplink: Quantity
    downlink: Quantity
    round_trip: Quantity
    radio: Radio | None = None

    def link(self, *, later_s: float = 0.0) -> Link:
        """Return the estimate as a link for planning.

        Args:
            later_s: seconds that are added to the round trip, such as the wait in a server's queue.
        """
        return Link(
            "estimated",
            _within(self.uplink.value),
            _within(self.downlink.value),
            min(self.round_trip.value + later_s, _MOST_ROUND_TRIP_S),
            "requests over this connection",
            self.radio,
        )


def _within(bit_s: float) -> float:
    return min(max(bit_s, _LEAST_BIT_S), _MOST_BIT_S)


class LinkEstimator:
    """Estimates uplink rate, downlink rate and round trip separately, from the timings of requests. Thread-safe.

    A transfer shows its rate when it took long enough to be timed. A quick transfer shows only a lower bound of the
    rate, and one within TCP's first window shows nothing. Every request shows the round trip, as the part of its time
    that neither the transfers nor the server took.

    Args:
        prior: the link to assume before anything has been sent.
        now_s: a monotonic clock in seconds.

    Attributes:
        ignored: how many observations were left out because they cannot be true, such as a server that computed for
            longer than the whole request took.
    """

    def __init__(self, prior: Link, *, now_s: NowS = time.monotonic) -> None:
        self.ignored = 0
        self._lock = threading.Lock()
        self._radio = prior.radio
        # Seconds of a bit.
        self._uplink = Mean(1 / prior.uplink_bit_s, now_s=now_s, memory_s=_MEMORY_S)
        self._downlink = Mean(1 / prior.downlink_bit_s, now_s=now_s, memory_s=_MEMORY_S)
        trip_s = max(prior.round_trip_s, _LEAST_ROUND_TRIP_S)
        self._round_trip = Mean(trip_s, now_s=now_s, memory_s=_MEMORY_S, least_share=_TRIP_SHARE)

    def observe(
        self,
        *,
        up_bytes: int,
        up_s: float | None,
        down_bytes: int,
        down_s: float,
        total_s: float,
        server_s: float = 0.0,
    ) -> None:
        """Update the estimates with the timing of one request.

        Args:
            up_bytes: bytes of the request's body.
            up_s: seconds from the request's head to the last byte of its body, measured by the server (``receive_s``).
                None where the server does not report it: then the time beyond the round trip counts as the transfer's.
            down_bytes: bytes of the answer's body.
            down_s: seconds from the answer's first byte to its last, measured by the device.
            total_s: seconds from the first byte sent to the last byte received, measured by the device.
            server_s: seconds between the two transfers (queue, decoding and computing), measured by the server.
        """
        sending_s = up_s or 0.0
        left_s = total_s - down_s - server_s - sending_s
        possible = 0 <= total_s < math.inf and down_s >= 0 and server_s >= 0 and sending_s >= 0
        # No part is longer than the whole, so none is infinite, and what is left of it tells of NaN.
        if not (possible and left_s >= -_TIMER_S and up_bytes >= 0 <= down_bytes):
            self.ignored += 1
            return
        with self._lock:
            down_bit_s = _rate(self._downlink, down_bytes, down_s)
            # A transfer's clock starts when its first packet has arrived, so that packet's own time is in the rest.
            left_s -= min(down_bytes, _PACKET_BYTES) * 8 / down_bit_s
            if up_s is None and up_bytes >= _FIRST_WINDOW_BYTES:
                trip = self._round_trip.quantity()
                blur_s = max(_TIMER_S, trip.value * trip.spread)
                _rate(self._uplink, up_bytes, max(left_s - trip.value, 0.0), blur_s)
                return
            up_bit_s = _rate(self._uplink, up_bytes, sending_s)
            left_s -= (up_bytes if up_s is None else min(up_bytes, _PACKET_BYTES)) * 8 / up_bit_s
            trip_s = min(max(left_s, _LEAST_ROUND_TRIP_S), _MOST_ROUND_TRIP_S)
            self._round_trip.observe(trip_s)

    def missed(self, *, up_bytes: int, waited_s: float) -> None:
        """Lower the estimate at once because no answer came.

        The uplink is assumed to be so slow that the transfer explains the wait; for few bytes the round trip is assumed
        to be that long. A single miss is enough: waiting for a second one costs a whole inference, while a wrong
        estimate costs only a few inferences with another cut until a probe corrects it.

        Args:
            up_bytes: bytes of the request's body.
            waited_s: seconds waited in vain, without the time that the server needs.
        """
        if not (0 < waited_s < math.inf and up_bytes >= 0):
            self.ignored += 1
            return
        with self._lock:
            trip_s = self._round_trip.value()
            if up_bytes >= _FIRST_WINDOW_BYTES:
                bit_s = _within(up_bytes * 8 / max(waited_s - trip_s, _TIMER_S))
                self._uplink.suppose(max(1 / bit_s, self._uplink.value()))
            elif waited_s > trip_s:
                self._round_trip.suppose(min(waited_s, _MOST_ROUND_TRIP_S))

    def estimate(self) -> LinkEstimate:
        """Return both rates and the round trip as estimated now. Their uncertainty grows with their age."""
        with self._lock:
            up, down, trip = self._uplink.quantity(), self._downlink.quantity(), self._round_trip.quantity()
        return LinkEstimate(up.inverse(), down.inverse(), trip, self._radio)

    def link(self) -> Link:
        """Return the present estimate as a link for planning."""
        return self.estimate().link()


def _rate(seconds_of_bit: Mean, size_bytes: int, taken_s: float, blur_s: float = _TIMER_S) -> float:
    """Update the mean with the rate that a transfer shows, if it shows one; return that rate or else the known one.

    ``blur_s`` is the error of ``taken_s``.
    """
    known_bit_s = 1 / seconds_of_bit.value()
    if size_bytes < _FIRST_WINDOW_BYTES and (size_bytes < 2 * _PACKET_BYTES or taken_s < _SURELY_TIMED * blur_s):
        return known_bit_s
    bits = max(size_bytes - _PACKET_BYTES, 1) * 8
    seen_bit_s = _within(bits / max(taken_s, blur_s))
    if taken_s <= blur_s and seen_bit_s <= known_bit_s:
        return known_bit_s  # too quick to be timed: it shows only a lower bound, which the estimate already exceeds
    seconds_of_bit.observe(bits / seen_bit_s, bits)
    return seen_bit_s


class ProbePolicy:
    """Says when to probe a link whose rate no request has shown lately, and with how many bytes. Thread-safe.

    A probe is due once neither a request nor a probe has shown the rate for ``stale_s``, and the pause that the probe
    before has cost is over. The pauses keep all probes together below ``share`` of the time and ``most_byte_s`` on
    average.

    Args:
        now_s: a monotonic clock in seconds.
        stale_s: age in seconds from which a rate is probed.
        share: highest share of the time that probes take; above 0, at most 1.
        most_byte_s: highest average rate of probes, in bytes per second.
        duration_s: seconds that a probe should take at the last known rate.

    Raises:
        AdaptError: an argument is out of its range.

    Attributes:
        least_bytes: the smallest probe.
        most_bytes: the largest probe.
        count: probes that were made.
        spent_bytes: their bytes together.
        spent_s: their seconds together.
    """

    least_bytes = 1 << 14
    most_bytes = 1 << 18

    def __init__(
        self,
        *,
        now_s: NowS = time.monotonic,
        stale_s: float = 2.0,
        share: float = 0.1,
        most_byte_s: float = 32e3,
        duration_s: float = 0.05,
    ) -> None:
        if not (0 < share <= 1 and most_byte_s > 0 and duration_s > 0 and stale_s >= 0):
            raise AdaptError(
                "probes take a share above 0 and at most 1, most_byte_s and duration_s above 0, and stale_s of 0 or "
                f"more; got share {share}, most_byte_s {most_byte_s}, duration_s {duration_s} and stale_s {stale_s}"
            )
        self.count = 0
        self.spent_bytes = 0
        self.spent_s = 0.0
        self._stale_s, self._share, self._most_byte_s, self._duration_s = stale_s, share, most_byte_s, duration_s
        self._lock = threading.Lock()
        self._last = Since(now_s)
        self._pause_s = 0.0

    def due_bytes(self, age_s: float, rate_bit_s: float) -> int | None:
        """Return how many bytes to probe with now; None where no probe is due.

        The caller makes the probe whose size it gets: the pause before the next one begins at once.

        Args:
            age_s: seconds since the rate was last seen (an estimate's ``Quantity.age_s``).
            rate_bit_s: the estimated rate in bit/s.
        """
        with self._lock:
            if not self._due(age_s):
                return None
            size = int(min(max(rate_bit_s * self._duration_s / 8, self.least_bytes), self.most_bytes))
            self._last.mark()
            self._pause_s = max(self._stale_s, size / self._most_byte_s)
            return size

    def due(self, age_s: float) -> bool:
        """Return whether to measure something else now that costs time and bytes, within the same bounds.

        The caller measures it, and reports with ``spent()`` what it cost.

        Args:
            age_s: seconds since it was last measured.
        """
        with self._lock:
            if not self._due(age_s):
                return False
            self._last.mark()
            self._pause_s = self._stale_s
            return True

    def _due(self, age_s: float) -> bool:
        return age_s >= self._stale_s and self._last.passed_s() >= self._pause_s

    def spent(self, size_bytes: int, taken_s: float) -> None:
        """Record what a probe cost, whether it was answered or not."""
        with self._lock:
            self.count += 1
            self.spent_bytes += size_bytes
            self.spent_s += taken_s
            self._pause_s = max(self._pause_s, taken_s / self._share, size_bytes / self._most_byte_s)
