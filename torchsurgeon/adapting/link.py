"""The link as the requests themselves see it, and how often it may be probed when there are none."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from torchsurgeon.adapting.clock import NowS, Since
from torchsurgeon.adapting.tracker import Quantity, Tracker
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import Link, Radio

_DRIFT = 0.4  # with it the next transfer over recorded LTE and 3G uplinks is predicted best
_NOISE = 0.2
_FIRST_WINDOW_BYTES = 1 << 14  # TCP sends as much at once; when that arrives at once it says nothing about a rate
_SURELY_TIMED = 5.0
_PACKET_BYTES = 1500
_TIMER_S = 2e-3  # how far off the two ends of a transfer are seen
_LEAST_ROUND_TRIP_S = 5e-5
_LEAST_BIT_S, _MOST_BIT_S, _MOST_ROUND_TRIP_S = 1e3, 1e12, 60.0


class LinkEstimate(NamedTuple):
    """Both rates in bit/s and the round trip in seconds, each with uncertainty and age; the radio as it was given."""

    uplink: Quantity
    downlink: Quantity
    round_trip: Quantity
    radio: Radio | None = None

    def link(self, *, later_s: float = 0.0) -> Link:
        """The estimate as a link, for planning, with a round trip that is so many seconds longer."""
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
    """Uplink, downlink and round trip, told apart by what one request's timing says of each. Thread-safe.

    A transfer says something about its rate when it took long enough to be timed. A quick one only says that the rate
    is not below what it shows, and nothing if it was no longer than TCP's first window. Every request says something
    about the round trip: what is left of its time after both transfers and the server.

    :param prior: the link before anything has been sent
    """

    def __init__(self, prior: Link, *, now_s: NowS = time.monotonic) -> None:
        self.ignored = 0
        """Observations that could not be true, such as a server that worked for longer than the request took."""
        self._lock = threading.Lock()
        self._radio = prior.radio
        self._uplink = Tracker(prior.uplink_bit_s, now_s=now_s, error=1.0, noise=_NOISE, drift=_DRIFT)
        self._downlink = Tracker(prior.downlink_bit_s, now_s=now_s, error=1.0, noise=_NOISE, drift=_DRIFT)
        trip_s = max(prior.round_trip_s, _LEAST_ROUND_TRIP_S)
        self._round_trip = Tracker(trip_s, now_s=now_s, error=1.0, noise=_NOISE, drift=_DRIFT / 2)

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
        """Take in the timing of one request.

        :param up_s: from the request's head to the last byte of its body, by the server (``receive_s``); None if it
            does not tell: then what is left of the total beyond the round trip is the transfer's time
        :param down_s: from the answer's first byte to its last, by the device
        :param total_s: from the first byte sent to the last one received, by the device
        :param server_s: between the two transfers: queue, decoding and computing, by the server
        """
        told = (total_s, down_s, server_s, up_s or 0.0)
        left_s = total_s - down_s - server_s - (up_s or 0.0)
        if not (all(0 <= part < math.inf for part in told) and left_s >= -_TIMER_S and up_bytes >= 0 <= down_bytes):
            self.ignored += 1
            return
        with self._lock:
            down_bit_s = _rate(self._downlink, down_bytes, down_s, total_s)
            # The packet that starts the clock of a transfer is not timed by it.
            left_s -= min(down_bytes, _PACKET_BYTES) * 8 / down_bit_s
            if up_s is None and up_bytes >= _FIRST_WINDOW_BYTES:
                trip = self._round_trip.quantity()
                blur_s = max(_TIMER_S, trip.value * trip.spread)
                _rate(self._uplink, up_bytes, max(left_s - trip.value, 0.0), total_s, blur_s)
                return
            up_bit_s = _rate(self._uplink, up_bytes, up_s or 0.0, total_s)
            left_s -= (up_bytes if up_s is None else min(up_bytes, _PACKET_BYTES)) * 8 / up_bit_s
            trip_s = min(max(left_s, _LEAST_ROUND_TRIP_S), _MOST_ROUND_TRIP_S)
            self._round_trip.observe(trip_s, noise=_TIMER_S / 4 / (trip_s + _TIMER_S), lasted_s=total_s)

    def missed(self, *, up_bytes: int, waited_s: float) -> None:
        """Take in that there was no answer after waiting for so long, beside what the server needs.

        The uplink is taken to be as slow as that, or for few bytes the round trip as long, and at once: to wait for a
        second miss costs more than a few inferences elsewhere until a probe tells better.
        """
        if not (0 < waited_s < math.inf and up_bytes >= 0):
            self.ignored += 1
            return
        with self._lock:
            trip_s = self._round_trip.value()
            if up_bytes >= _FIRST_WINDOW_BYTES:
                bit_s = _within(up_bytes * 8 / max(waited_s - trip_s, _TIMER_S))
                if bit_s < self._uplink.value():
                    self._uplink.jump(bit_s)
            elif waited_s > trip_s:
                self._round_trip.jump(min(waited_s, _MOST_ROUND_TRIP_S))

    def estimate(self) -> LinkEstimate:
        """Both rates and the round trip now; they grow less certain with time."""
        with self._lock:
            up, down, trip = self._uplink.quantity(), self._downlink.quantity(), self._round_trip.quantity()
        return LinkEstimate(up, down, trip, self._radio)

    def link(self) -> Link:
        """The estimate as a link, for planning."""
        return self.estimate().link()

    @property
    def changes(self) -> int:
        """How many times a rate or the round trip was found to have jumped."""
        return self._uplink.changes + self._downlink.changes + self._round_trip.changes


def _rate(tracker: Tracker, size_bytes: int, taken_s: float, lasted_s: float, blur_s: float = _TIMER_S) -> float:
    """Tell `tracker` the rate of a transfer timed to within `blur_s`, if it shows one; return that or what is known."""
    if size_bytes < _FIRST_WINDOW_BYTES and taken_s < _SURELY_TIMED * blur_s:
        return tracker.value()
    timed_s = max(taken_s, blur_s)
    seen_bit_s = _within(max(size_bytes - _PACKET_BYTES, 1) * 8 / timed_s)
    if taken_s <= blur_s and seen_bit_s <= (bit_s := tracker.value()):
        return bit_s
    tracker.observe(seen_bit_s, noise=blur_s / timed_s / 2 + _PACKET_BYTES / max(size_bytes, 1), lasted_s=lasted_s)
    return seen_bit_s


class ProbePolicy:
    """When a link whose rate no request has shown lately is probed, and with how much. Thread-safe.

    A probe is due once neither a request nor a probe has shown the rate for `stale_s`, and the probes before it have
    been paid for: over any longer time they take at most `share` of it, and `most_byte_s` on average.

    :param share: of the time, at most
    :param most_byte_s: bytes a second, at most, averaged from probe to probe
    :param duration_s: how long a probe should take at the rate last known
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
                f"no probes can be sent with a share of {share}, {most_byte_s} byte/s, {duration_s} s each and "
                f"{stale_s} s between them: give a share up to 1, and numbers above 0"
            )
        self.count = 0
        self.spent_bytes = 0
        self.spent_s = 0.0
        self._stale_s, self._share, self._most_byte_s, self._duration_s = stale_s, share, most_byte_s, duration_s
        self._lock = threading.Lock()
        self._last = Since(now_s)
        self._pause_s = 0.0

    def due_bytes(self, age_s: float, rate_bit_s: float) -> int | None:
        """How many bytes to probe with now, or None.

        A size that is given is taken as begun: another one is due only after the pause that it will cost.

        :param age_s: since the rate was last seen, and `rate_bit_s`, as an estimate's :class:`Quantity` tells them
        """
        with self._lock:
            if age_s < self._stale_s or self._last.passed_s() < self._pause_s:
                return None
            size = int(min(max(rate_bit_s * self._duration_s / 8, self.least_bytes), self.most_bytes))
            self._last.mark()
            self._pause_s = max(self._stale_s, size / self._most_byte_s)
            return size

    def spent(self, size_bytes: int, taken_s: float) -> None:
        """Count what a probe cost, whether it was answered or not."""
        with self._lock:
            self.count += 1
            self.spent_bytes += size_bytes
            self.spent_s += taken_s
            self._pause_s = max(self._pause_s, taken_s / self._share, size_bytes / self._most_byte_s)
