"""Measure the link to a server before anything has been sent over it."""

from __future__ import annotations

from torchsurgeon.link import Link
from torchsurgeon.transport.base import ByteTransport

_PROBE_BYTES = (16 << 10, 128 << 10, 1 << 20)
_PROBE_ENOUGH_S = 0.05


def measure_link(transport: ByteTransport, *, name: str = "measured", repeats: int = 5) -> Link:
    """Measure the link to a tail server with a few small exchanges.

    The round trip is the shortest of ``repeats`` empty exchanges. Each rate is that of a transfer of 16 KiB; where that
    is too quick to be timed, of 128 KiB or 1 MiB.

    Args:
        transport: the way to the server.
        name: the name of the returned link.
        repeats: how many round trips to measure.

    Raises:
        ServerUnavailableError: the server gave no complete answer in time.
        RequestRefusedError: the server answered with an error.
    """
    trips = [_exchange_s(transport, 0, 0) for _ in range(repeats)]
    round_trip_s = min(trips)
    rates = []
    for up in (True, False):
        for size in _PROBE_BYTES:
            taken = min(_exchange_s(transport, size if up else 0, 0 if up else size) for _ in range(2)) - round_trip_s
            if taken >= _PROBE_ENOUGH_S:
                break
        rates.append(min(size * 8 / max(taken, 1e-6), 1e12))
    return Link(name, rates[0], rates[1], round_trip_s, source="probes of this connection")


def _exchange_s(transport: ByteTransport, up_bytes: int, down_bytes: int) -> float:
    timing = transport.probe(up_bytes, down_bytes)
    return timing.end_s - timing.send_start_s
