"""One direction of an emulated link: when what enters it comes out.

Nothing here waits or touches a socket. When bytes pass is computed from when the bytes before them passed, not from
when somebody looked, so that late timers delay single packets but never add up.
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
    """Bytes of `flow` on their way; none at all mean that their sender ended it, in order or by a reset."""

    flow: _F
    data: bytes
    entered_s: float
    reset: bool = False


class Bottleneck(Generic[_F]):
    """A bounded queue, a transmitter at the link's rate, and the delay of the way, shared by all flows.

    `readable` holds the flows whose sender has more bytes, for which the queue may have no room yet.
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
        """Take on a rate in bit/s, or the replay of a trace, and a one-way delay; what has passed arrives as before."""
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
        """No more may enter until some has passed."""
        return self._queued_bytes >= self.buffer_bytes

    def push(self, packet: Packet[_F]) -> None:
        """Put a packet at the end of the queue."""
        self._queue.append(packet)
        self._queued_bytes += len(packet.data)

    def advance(self, now_s: float) -> None:
        """Let everything pass that would have passed by now."""
        while self._queue and (passed_s := self._head_passes()) <= now_s:
            packet = self._queue.popleft()
            self._head_passed_s = None
            self._queued_bytes -= len(packet.data)
            self._free_at_s = passed_s
            self._last_arrival_s = max(passed_s + self.delay_s, self._last_arrival_s)
            self._flying.append((self._last_arrival_s, packet))

    def arrivals(self, now_s: float) -> Iterator[Packet[_F]]:
        """The packets that have come out by now, in the order they entered; each is given once."""
        while self._flying and self._flying[0][0] <= now_s:
            packet = self._flying.popleft()[1]
            self.passed_bytes += len(packet.data)
            yield packet

    def wake_at_s(self) -> float:
        """When there is something to do next: an arrival, or room for a flow that waits to be read."""
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
