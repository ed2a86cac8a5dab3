"""Recordings of how a link's rate changes over time, and links that follow them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchsurgeon.errors import LinkError, short
from torchsurgeon.link.rates import (
    LEAST_BIT_S,
    MOST_BIT_S,
    Link,
    checked_rate,
    checked_round_trip,
    checked_size,
    seconds_of,
)

MAHIMAHI_OPPORTUNITY_BYTES = 1500

# Bits that may be missing at the end of a transfer, because of rounding.
_FULL_BITS_TOLERANCE = 1e-3


class BandwidthTrace:
    """How many bits one direction of a link can carry over time: a recording that is repeated when it ends.

    Between two points of the recording the rate is constant.

    Args:
        times_s: the times of the points in seconds, shape (n,): from 0 to the length of the recording, rising.
        bits: the bits that could have been delivered from the start until each of these times, shape (n,): from 0,
            never falling.
        name: what the trace is called in messages.

    Raises:
        LinkError: times or bits are not as they must be, or the trace carries nothing.
    """

    def __init__(self, times_s: ArrayLike, bits: ArrayLike, name: str = "trace") -> None:
        times, total = np.asarray(times_s, dtype=np.float64), np.asarray(bits, dtype=np.float64)
        if times.ndim != 1 or times.shape != total.shape or len(times) < 2:
            raise LinkError(
                f"{name}: a trace must have two points or more, each a time with its bits; got {times.shape} times and "
                f"{total.shape} bits"
            )
        if not (np.isfinite(times).all() and np.isfinite(total).all()):
            raise LinkError(f"{name}: times and bits must be finite; got infinity or NaN")
        if times[0] != 0 or total[0] != 0 or (np.diff(times) <= 0).any() or (np.diff(total) < 0).any():
            raise LinkError(f"{name}: times must rise and bits must not fall, both from 0; sort the points by time")
        if total[-1] <= 0:
            raise LinkError(f"{name}: a trace must deliver some bits, or a transfer over it would never end; got 0")
        self.name = name
        self._times, self._bits = times, total
        if not LEAST_BIT_S <= self.mean_bit_s <= MOST_BIT_S:
            pause_s = float(np.diff(times)[np.diff(total) == 0].max(initial=0.0))
            raise LinkError(
                f"{name}: the mean rate must be from {LEAST_BIT_S:g} to {MOST_BIT_S:g} bit/s; got {self.mean_bit_s:g} "
                f"over {self.duration_s:g} s, of which the longest pause takes {pause_s:g} s; check the units of times "
                "and rates, or cut the trace where nothing was sent"
            )

    def __repr__(self) -> str:
        return f"BandwidthTrace({self.name!r}, {self.duration_s:g} s, mean {self.mean_bit_s / 1e6:.3g} Mbit/s)"

    @property
    def duration_s(self) -> float:
        """Seconds that the recording lasts, after which it repeats."""
        return float(self._times[-1])

    @property
    def mean_bit_s(self) -> float:
        """Mean rate over the recording, in bit/s."""
        return float(self._bits[-1] / self._times[-1])

    def rates_bit_s(self, interval_s: float = 1.0) -> NDArray[np.float64]:
        """Return the mean rate in bit/s in each whole interval of the recording, shape (intervals,).

        Args:
            interval_s: the length of an interval.
        """
        count = int(self.duration_s / interval_s + 1e-9)
        bits: NDArray[np.float64] = np.interp(np.arange(count + 1) * interval_s, self._times, self._bits)
        return np.diff(bits) / interval_s

    def bits_available(self, start_s: float, end_s: float) -> float:
        """Return the bits that can be carried between two times of a replay.

        Args:
            start_s: seconds since the start of the replay, 0 or more.
            end_s: the same, not before ``start_s``.

        Raises:
            LinkError: a time is negative or not finite, or the span ends before it starts.
        """
        if not 0 <= start_s <= end_s or not math.isfinite(end_s):
            raise LinkError(
                f"{self.name}: a span must be two finite times from 0 on, in order; got {start_s} s to {end_s} s"
            )
        return self._bits_until(end_s) - self._bits_until(start_s)

    def delivered_at(self, start_s: float, size_bytes: float) -> float:
        """Return when the last byte of a transfer has passed, in seconds since the start of the replay.

        Args:
            start_s: when the transfer begins, in seconds since the start of the replay.
            size_bytes: its bytes.

        Raises:
            LinkError: a value is negative or not finite.
        """
        checked_size(size_bytes)
        if not (start_s >= 0 and math.isfinite(start_s)):
            raise LinkError(f"{self.name}: a transfer must start at 0 or more seconds; got {start_s}")
        if size_bytes == 0:
            return start_s
        # Without the tolerance, rounding would let a transfer that ends exactly where an outage begins end after it.
        wanted = self._bits_until(start_s) + size_bytes * 8 - _FULL_BITS_TOLERANCE
        rounds, rest = divmod(wanted, float(self._bits[-1]))
        right = max(int(np.searchsorted(self._bits, rest, side="left")), 1)
        left_bits, left_s = self._bits[right - 1], self._times[right - 1]
        rise, run = self._bits[right] - left_bits, self._times[right] - left_s
        within = left_s + (run * (rest - left_bits) / rise if rise > 0 else 0.0)
        return max(start_s, rounds * self.duration_s + float(within))

    def _bits_until(self, time_s: float) -> float:
        rounds, within = divmod(time_s, self.duration_s)
        return rounds * float(self._bits[-1]) + float(np.interp(within, self._times, self._bits))

    @classmethod
    def read(cls, path: str | Path) -> BandwidthTrace:
        """Read a trace from a text file.

        A file with one whole number a line is in mahimahi's format (mm-link(1)): each number is the millisecond of an
        opportunity to deliver 1500 bytes, and the last is also the length of the recording. A file with two numbers a
        line holds times in seconds and the rate in Mbit/s from each time on; the last rate lasts as long as the one
        before it. Empty lines and those that start with ``#`` are skipped.

        Args:
            path: the file.

        Raises:
            LinkError: the file cannot be read, or a line of it is malformed; the message names file and line.
        """
        try:
            text = Path(path).read_text(encoding="ascii")
        except UnicodeDecodeError as error:
            raise LinkError(
                f"{path}: a bandwidth trace must be plain ASCII text; byte {error.start} of the file is not"
            ) from None
        except OSError as error:
            raise LinkError(f"{path}: cannot be read: {error.strerror}") from error
        rows = [
            (number, words)
            for number, line in enumerate(text.splitlines(), start=1)
            if (words := line.split()) and not words[0].startswith("#")
        ]
        if not rows:
            raise LinkError(f"{path}: the file must hold at least one line of numbers; it holds none")
        columns = len(rows[0][1])
        if columns not in (1, 2):
            raise LinkError(
                f"{path}:{rows[0][0]}: a line must hold one number (milliseconds) or two (seconds, Mbit/s); got "
                f"{columns}"
            )
        values: list[list[float]] = []
        for number, words in rows:
            if len(words) != columns:
                raise LinkError(
                    f"{path}:{number}: every line must hold {columns} numbers, as the first does; got {len(words)}"
                )
            values.append([_trace_number(word, f"{path}:{number}", whole=columns == 1) for word in words])
        lines = np.array([number for number, _ in rows])
        table = np.array(values, dtype=np.float64)
        if columns == 1:
            return cls._from_opportunities(table[:, 0], lines, str(path))
        return cls._from_rates(table[:, 0], table[:, 1] * 1e6, lines, str(path))

    @classmethod
    def _from_opportunities(cls, ms: NDArray[np.float64], lines: NDArray[np.int_], name: str) -> BandwidthTrace:
        falling = np.flatnonzero(np.diff(ms) < 0)
        if len(falling):
            at = int(falling[0]) + 1
            raise LinkError(f"{name}:{lines[at]}: times must not fall; got {ms[at]:g} ms after {ms[at - 1]:g} ms")
        if ms[-1] == 0:
            raise LinkError(f"{name}:{lines[-1]}: the last number, the length of the trace, must be above 0; got 0 ms")
        # An opportunity at millisecond k is spread over the millisecond that ends at k; one at 0, over the first.
        ends, counts = np.unique(np.maximum(ms, 1), return_counts=True)
        edges = np.unique(np.concatenate((ends - 1, ends, (0.0,))))
        bits = np.zeros(len(edges))
        bits[np.searchsorted(edges, ends)] = counts * MAHIMAHI_OPPORTUNITY_BYTES * 8
        return cls(edges / 1e3, np.cumsum(bits), name)

    @classmethod
    def _from_rates(
        cls, starts_s: NDArray[np.float64], rates_bit_s: NDArray[np.float64], lines: NDArray[np.int_], name: str
    ) -> BandwidthTrace:
        falling = np.flatnonzero(np.diff(starts_s) <= 0)
        if len(falling):
            at = int(falling[0]) + 1
            raise LinkError(f"{name}:{lines[at]}: times must rise; got {starts_s[at]:g} s after {starts_s[at - 1]:g} s")
        steps = np.diff(starts_s)
        steps = np.append(steps, steps[-1] if len(steps) else 1.0)
        return cls(np.append(0.0, np.cumsum(steps)), np.append(0.0, np.cumsum(steps * rates_bit_s)), name)

    @classmethod
    def synthetic(
        cls, mean_bit_s: float, *, duration_s: float = 140.0, correlation_s: float = 4.0, seed: int = 0
    ) -> BandwidthTrace:
        """Return a trace that varies as a cellular link does, with one rate a second.

        The rates follow a Rayleigh distribution, taken at evenly spaced quantiles so that a short trace has its
        statistics too, in the order of a first-order autoregression. At a mean of 5.95 Mbit/s their 10 %, 50 % and 90 %
        quantiles are 2.2, 5.6 and 10.1 Mbit/s, where a measured LTE uplink of that mean had 2.4, 5.7 and 10.6.

        Args:
            mean_bit_s: mean rate over the whole trace, in bit/s.
            duration_s: length in seconds, 2 or more; it is rounded to whole seconds.
            correlation_s: seconds in which the autocorrelation of the rates falls to 1/e, 0 or more.
            seed: the same seed and arguments give the same trace.

        Raises:
            LinkError: a value is out of its range.
        """
        checked_rate("a trace's mean rate", mean_bit_s)
        if not (math.isfinite(duration_s) and duration_s >= 2):
            raise LinkError(f"a synthetic trace must last 2 s or more; got {short(duration_s)}")
        if not (math.isfinite(correlation_s) and correlation_s >= 0):
            raise LinkError(f"a correlation time must be zero or more seconds; got {short(correlation_s)}")
        count = round(duration_s)
        memory = math.exp(-1 / correlation_s) if correlation_s > 0 else 0.0
        noise = np.random.default_rng(seed).standard_normal(count)
        walk = noise.copy()
        for second in range(1, count):
            walk[second] = memory * walk[second - 1] + math.sqrt(1 - memory**2) * noise[second]
        ranks = np.argsort(np.argsort(walk))
        shape = np.sqrt(-2 * np.log(1 - (ranks + 0.5) / count))
        rates = shape * (mean_bit_s / shape.mean())
        times = np.arange(count + 1, dtype=np.float64)
        return cls(times, np.append(0.0, np.cumsum(rates)), f"synthetic {mean_bit_s / 1e6:g} Mbit/s")


def _trace_number(word: str, where: str, *, whole: bool) -> float:
    try:
        value = float(int(word)) if whole else float(word)
    except (ValueError, OverflowError):
        wanted = "a whole number of milliseconds" if whole else "a number"
        raise LinkError(f"{where}: a line must hold {wanted}; got {short(word, 40)}") from None
    if not math.isfinite(value) or value < 0:
        raise LinkError(f"{where}: times and rates must be finite and zero or more; got {short(word, 40)}")
    return value


@dataclass(frozen=True)
class TracedLink:
    """A link whose two rates follow recordings.

    Attributes:
        name: the link's name.
        uplink: the recording of the rate from device to server.
        downlink: the recording of the rate from server to device.
        round_trip_s: seconds between sending an empty message and receiving its answer, 0 to 60.

    Raises:
        LinkError: the round-trip time is out of its range.
    """

    name: str
    uplink: BandwidthTrace
    downlink: BandwidthTrace
    round_trip_s: float = 0.0

    def __post_init__(self) -> None:
        checked_round_trip(self.round_trip_s)

    def __str__(self) -> str:
        return f"{self.name}: {self.uplink} up, {self.downlink} down, {self.round_trip_s * 1e3:g} ms round trip"


def parse_profile(text: str) -> Link | TracedLink:
    """Return the link that a command line names.

    Args:
        text: what ``Link.parse()`` takes; ``trace:FILE`` for a recording that both directions follow; or
            ``trace:UP,DOWN`` for one each. A number at the end (``trace:UP,DOWN,0.06``, ``trace:FILE,60ms``) is the
            round-trip time, which is otherwise 0.

    Raises:
        LinkError: the text names no link, or a trace file is missing or malformed.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon or kind != "trace":
        return Link.parse(text)
    files = [part.strip() for part in rest.split(",")]
    round_trip_s = 0.0
    if len(files) > 1 and re.fullmatch(r"[0-9.]+(e-?[0-9]+)?\s*(ms|s)?", files[-1]):
        round_trip_s = seconds_of(files.pop(), text)
    if not 1 <= len(files) <= 2 or not all(files):
        raise LinkError(
            f"a recorded link must be written trace:FILE, trace:UP,DOWN or trace:UP,DOWN,SECONDS; got {short(text)}"
        )
    traces = [BandwidthTrace.read(file) for file in files]
    return TracedLink(text.strip(), traces[0], traces[-1], round_trip_s)
