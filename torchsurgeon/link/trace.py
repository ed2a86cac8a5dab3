"""How a link's rates change over time: recordings, and links that follow them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchsurgeon.errors import LinkError
from torchsurgeon.link.rates import Link, checked_rate, checked_round_trip, checked_size, seconds_of

MAHIMAHI_OPPORTUNITY_BYTES = 1500

_FULL_BITS_TOLERANCE = 1e-3


class BandwidthTrace:
    """How many bits one direction of a link can carry over time: a recording that repeats at its end.

    Between two points of the recording the rate is constant, so the trace is a rising line of bits over seconds.

    :param times_s: rising, from 0 to the length of the recording, shape (n,)
    :param bits: bits that could have been delivered since the start at each of `times_s`, never falling, from 0
    :raises LinkError: the two are not such a line, or it carries nothing
    """

    def __init__(self, times_s: ArrayLike, bits: ArrayLike, name: str = "trace") -> None:
        times, total = np.asarray(times_s, dtype=np.float64), np.asarray(bits, dtype=np.float64)
        if times.ndim != 1 or times.shape != total.shape or len(times) < 2:
            raise LinkError(f"{name}: a trace is two points or more, not {times.shape} times with {total.shape} bits")
        if not (np.isfinite(times).all() and np.isfinite(total).all()):
            raise LinkError(f"{name}: a trace of times or bits that are not finite cannot be replayed")
        if times[0] != 0 or total[0] != 0 or (np.diff(times) <= 0).any() or (np.diff(total) < 0).any():
            raise LinkError(f"{name}: times must rise and bits must not fall, both from 0")
        if total[-1] <= 0:
            raise LinkError(f"{name}: the trace delivers nothing, so a transfer over it would never end")
        self.name = name
        self._times, self._bits = times, total
        checked_rate(f"{name}: a mean rate", self.mean_bit_s)

    def __repr__(self) -> str:
        return f"BandwidthTrace({self.name!r}, {self.duration_s:g} s, mean {self.mean_bit_s / 1e6:.3g} Mbit/s)"

    @property
    def duration_s(self) -> float:
        """Length of the recording, after which it repeats."""
        return float(self._times[-1])

    @property
    def mean_bit_s(self) -> float:
        """Mean rate over the recording."""
        return float(self._bits[-1] / self._times[-1])

    def rates_bit_s(self, interval_s: float = 1.0) -> NDArray[np.float64]:
        """Mean rate in each whole interval of the recording, shape (intervals,)."""
        count = int(self.duration_s / interval_s + 1e-9)
        bits: NDArray[np.float64] = np.interp(np.arange(count + 1) * interval_s, self._times, self._bits)
        return np.diff(bits) / interval_s

    def bits_available(self, start_s: float, end_s: float) -> float:
        """Bits the direction can carry between two times, both seconds since the start of the replay."""
        if not 0 <= start_s <= end_s or not math.isfinite(end_s):
            raise LinkError(f"{self.name}: no span from {start_s} s to {end_s} s; give two times from 0 on, in order")
        return self._bits_until(end_s) - self._bits_until(start_s)

    def delivered_at(self, start_s: float, size_bytes: float) -> float:
        """When the last of `size_bytes` sent from `start_s` on has passed, in seconds since the start of the replay."""
        checked_size(size_bytes)
        if not (start_s >= 0 and math.isfinite(start_s)):
            raise LinkError(f"{self.name}: a transfer cannot start at {start_s} s; a replay starts at 0")
        if size_bytes == 0:
            return start_s
        # Without the tolerance, a transfer that ends exactly where an outage begins is rounded to after the outage.
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
        """The trace in a text file of either format, told apart by the numbers on a line.

        One whole number a line is mahimahi's format: the millisecond of an opportunity to deliver 1500 bytes, the last
        one being the length of the recording (mm-link(1)). Two numbers are a time in seconds and the rate in Mbit/s
        from then on; the last rate holds as long as the one before it. Empty lines and those that start with ``#`` are
        skipped.

        :raises LinkError: the file cannot be read, or a line of it is malformed; the message names file and line
        """
        try:
            text = Path(path).read_text(encoding="ascii")
        except UnicodeDecodeError as error:
            raise LinkError(f"{path}: not a bandwidth trace: byte {error.start} is not plain text") from None
        except OSError as error:
            raise LinkError(f"{path}: cannot be read: {error.strerror}") from error
        rows = [
            (number, words)
            for number, line in enumerate(text.splitlines(), start=1)
            if (words := line.split()) and not words[0].startswith("#")
        ]
        if not rows:
            raise LinkError(f"{path}: holds no line of a bandwidth trace")
        columns = len(rows[0][1])
        if columns not in (1, 2):
            raise LinkError(f"{path}:{rows[0][0]}: {columns} numbers; give one (milliseconds) or two (seconds, Mbit/s)")
        values: list[list[float]] = []
        for number, words in rows:
            if len(words) != columns:
                raise LinkError(f"{path}:{number}: {len(words)} numbers where the lines before have {columns}")
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
            raise LinkError(f"{name}:{lines[at]}: {ms[at]:g} ms comes after {ms[at - 1]:g} ms; times must not fall")
        if ms[-1] == 0:
            raise LinkError(f"{name}:{lines[-1]}: the trace ends at 0 ms, so it has no length to repeat at")
        # An opportunity at millisecond k is spread over the millisecond that ends there; at 0 there is none before it.
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
            raise LinkError(f"{name}:{lines[at]}: {starts_s[at]:g} s after {starts_s[at - 1]:g} s; times must rise")
        steps = np.diff(starts_s)
        steps = np.append(steps, steps[-1] if len(steps) else 1.0)
        return cls(np.append(0.0, np.cumsum(steps)), np.append(0.0, np.cumsum(steps * rates_bit_s)), name)

    @classmethod
    def synthetic(
        cls, mean_bit_s: float, *, duration_s: float = 140.0, correlation_s: float = 4.0, seed: int = 0
    ) -> BandwidthTrace:
        """A trace that varies as a cellular link does, one rate a second, the same for the same arguments.

        The rates follow a Rayleigh distribution, taken at evenly spaced quantiles so that a short trace has its
        statistics too, in the order of a first-order autoregression. At a mean of 5.95 Mbit/s their 10 %, 50 % and 90 %
        quantiles are 2.2, 5.6 and 10.1 Mbit/s, where a measured LTE uplink of that mean had 2.4, 5.7 and 10.6.

        :param mean_bit_s: mean rate over the whole trace
        :param duration_s: rounded to whole seconds, two at least
        :param correlation_s: time in which the memory of a rate falls to 1/e
        """
        checked_rate("a mean rate", mean_bit_s)
        if not (math.isfinite(duration_s) and duration_s >= 2):
            raise LinkError(f"a synthetic trace of {duration_s} s is too short: give 2 s or more")
        if not (math.isfinite(correlation_s) and correlation_s >= 0):
            raise LinkError(f"a correlation time of {correlation_s} s cannot be: give zero or more seconds")
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
        raise LinkError(f"{where}: {word[:40]!r} is not {wanted}") from None
    if not math.isfinite(value) or value < 0:
        raise LinkError(f"{where}: {word} cannot be; times and rates are zero or more")
    return value


@dataclass(frozen=True)
class TracedLink:
    """A link whose two rates follow recordings.

    :raises LinkError: the round-trip time is negative, not finite or above 60 s
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
    """The link a command line means.

    Besides what :meth:`Link.parse` understands, ``trace:FILE`` replays a recording in both directions,
    ``trace:UP,DOWN`` one in each. A number at the end, ``trace:UP,DOWN,0.06`` or ``…,60ms``, is the round-trip time; it
    is 0 unless given.

    :raises LinkError: the text names no link, or a trace file is missing or malformed
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon or kind != "trace":
        return Link.parse(text)
    files = [part.strip() for part in rest.split(",")]
    round_trip_s = 0.0
    if len(files) > 1 and re.fullmatch(r"[0-9.]+(e-?[0-9]+)?\s*(ms|s)?", files[-1]):
        round_trip_s = seconds_of(files.pop(), text)
    if not 1 <= len(files) <= 2 or not all(files):
        raise LinkError(f"no link {text!r}: write trace:FILE, trace:UP,DOWN or trace:UP,DOWN,SECONDS")
    traces = [BandwidthTrace.read(file) for file in files]
    return TracedLink(text.strip(), traces[0], traces[-1], round_trip_s)
