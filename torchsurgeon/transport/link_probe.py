"""Measure the link to a server before anything has been sent over it."""

from __future__ import annotations

from collections.abc import Callable

from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.link import Link
from torchsurgeon.transport.base import ByteTransport

_PROBE_BYTES = (16 << 10, 128 << 10, 1 << 20)
_PROBE_ENOUGH_S = 0.05
_TRANSFERS = 2


def measure_link(
    transport: ByteTransport,
    *,
    name: str = "measured",
    repeats: int = 5,
    spend: Callable[[int], bool] = lambda size_bytes: True,
) -> Link:
    """Measure the link to a tail server with a few small exchanges.

    The round trip is the shortest of ``repeats`` empty exchanges. Each rate is that of a transfer of 16 KiB; where that
    is too quick to be timed, of 128 KiB or 1 MiB.

    Args:
        transport: the way to the server.
        name: the name of the returned link.
        repeats: how many round trips to measure.
        spend: asked before bytes are sent, with how many, for a link on which they cost money. Returns whether they may
            be sent. Where it does not let larger transfers be, the rate is that of the largest before.

    Raises:
        ServerUnavailableError: the server gave no complete answer in time, or ``spend`` lets nothing be sent.
        RequestRefusedError: the server answered with an error.
    """
    trips = [_exchange_s(transport, 0, 0) for _ in range(repeats)]
    round_trip_s = min(trips)
    rates = []
    for up in (True, False):
        rate_bit_s = None
        for size in _PROBE_BYTES:
            if up and not spend(_TRANSFERS * size):
                break
            sizes = (size, 0) if up else (0, size)
            taken_s = min(_exchange_s(transport, *sizes) for _ in range(_TRANSFERS)) - round_trip_s
            rate_bit_s = min(size * 8 / max(taken_s, 1e-6), 1e12)
            if taken_s >= _PROBE_ENOUGH_S:
                break
        if rate_bit_s is None:
            raise ServerUnavailableError(
                f"measuring the link would send {_TRANSFERS * _PROBE_BYTES[0]} bytes, which are more than may be sent "
                "now; give link=, wait, or give a larger hourly_bytes"
            )
        rates.append(rate_bit_s)
    return Link(name, rates[0], rates[1], round_trip_s, source="probes of this connection")


def _exchange_s(transport: ByteTransport, up_bytes: int, down_bytes: int) -> float:
    timing = transport.probe(up_bytes, down_bytes)
    return timing.end_s - timing.send_start_s
