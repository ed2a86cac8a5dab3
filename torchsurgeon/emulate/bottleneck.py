"""One direction of an emulated link: it computes when the bytes that enter come out.

This is arithmetic only; nothing waits or uses a socket. The moment at which bytes pass is computed from the moment at
which the bytes before them passed, not from the moment at which that is asked for. So a late timer delays single
packets, and the delays never add up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torchsurgeon.link import BandwidthTrace

_F = TypeVar("_F")

_CHUNK_S = 2e-3
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 1500, 1 << 16
_BUFFER_S = 0.1
_LEAST_BUFFER_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class Packet(Generic[_F]):
    """Bytes on their way.

    Attributes:
        flow: what they belong to.
        data: the bytes. Empty where the sender has closed its half of the connection.
        entered_s: when they were ready to enter the link.
        reset: whether the sender reset the connection.
    """

    flow: _F
    data: bytes
    entered_s: float
    reset: bool = False


class Bottleneck(Generic[_F]):
    """A bounded queue, a transmitter at the link's rate, and a propagation delay, which all flows share.

    A packet waits in the queue until the packets before it have passed the transmitter, passes it at the link's rate,
    and arrives after the delay. All times are those of one monotonic clock, in seconds.

    Attributes:
        readable: flows whose sender has more bytes, in the order in which they may enter once the queue has room.
        passed_bytes: bytes that have arrived.
        delay_s: the one-way delay.
        chunk_bytes: how many bytes to read at once: about 2 ms of the link's rate.
        buffer_bytes: bytes from which the queue is full: about a tenth of a second of the link's rate.
    """

    def __init__(self) -> None:
        self.readable: deque[_F] = deque()
        self.passed_bytes = 0
        self.delay_s = 0.0
        self.chunk_bytes = _LEAST_CHUNK_BYTES
        self.buffer_bytes = _LEAST_BUFFER_BYTES
        self._passed_s: Callable[[float, int], float] = lambda start_s, size_bytes: start_s
        self._queue: deque[Packet[_F]] = deque()
        self._queued_bytes = 0
        self._free_at_s = -math.inf
        self._head_passed_s: float | None = None
        self._flying: deque[tuple[float, Packet[_F]]] = deque()
        self._last_arrival_s = -math.inf

    def shape(self, rate: float | BandwidthTrace, delay_s: float, now_s: float) -> None:
        """Change the link. What has passed the transmitter arrives as it would have; the queue passes at the new rate.

        Args:
            rate: the rate in bit/s, or a trace that is replayed from now on.
            delay_s: the one-way delay.
            now_s: the time now.
        """
        self.advance(now_s)
        if isinstance(rate, BandwidthTrace):
            mean_bit_s, trace = rate.mean_bit_s, rate
            self._passed_s = lambda start_s, size_bytes: now_s + trace.delivered_at(start_s - now_s, size_bytes)
        else:
            mean_bit_s = bit_s = rate
            self._passed_s = lambda start_s, size_bytes: start_s + size_bytes * 8 / bit_s
        self.delay_s = delay_s
        self.chunk_bytes = min(max(int(mean_bit_s * _CHUNK_S / 8), _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
        self.buffer_bytes = max(int(mean_bit_s * _BUFFER_S / 8), _LEAST_BUFFER_BYTES)
        self._free_at_s = now_s
        self._head_passed_s = None

    @property
    def full(self) -> bool:
        """Whether nothing may enter before something has passed."""
        return self._queued_bytes >= self.buffer_bytes

    def push(self, packet: Packet[_F]) -> None:
        """Put a packet at the end of the queue."""
        self._queue.append(packet)
        self._queued_bytes += len(packet.data)

    def advance(self, now_s: float) -> None:
        """Let everything pass that passes the transmitter until ``now_s``."""
        while self._queue and (passed_s := self._head_passes()) <= now_s:
            packet = self._queue.popleft()
            self._head_passed_s = None
            self._queued_bytes -= len(packet.data)
            self._free_at_s = passed_s
            # Packets keep their order even where the delay has become shorter.
            self._last_arrival_s = max(passed_s + self.delay_s, self._last_arrival_s)
            self._flying.append((self._last_arrival_s, packet))

    def arrivals(self, now_s: float) -> Iterator[Packet[_F]]:
        """Return the packets that arrive until ``now_s``, in the order in which they entered. Each is returned once."""
        while self._flying and self._flying[0][0] <= now_s:
            packet = self._flying.popleft()[1]
            self.passed_bytes += len(packet.data)
            yield packet

    def wake_at_s(self) -> float:
        """Return when there is something to do next: an arrival, or room for a flow that waits. Infinite for never."""
        if self.readable and not self.full:
            return -math.inf
        room_s = self._head_passes() if self._queue and self.readable else math.inf
        if self._flying:
            return min(room_s, self._flying[0][0])
        return min(room_s, self._head_passes() + self.delay_s) if self._queue else math.inf

    def _head_passes(self) -> float:
        if self._head_passed_s is None:
            head = self._queue[0]
            self._head_passed_s = self._passed_s(max(self._free_at_s, head.entered_s), len(head.data))
        return self._head_passed_s
