"""The account of one inference on a device without PyTorch: where its time went, and what crossed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchsurgeon._place import ALL_ON_DEVICE
from torchsurgeon.adapting import Decision
from torchsurgeon.edge.message import ArrayAnswer
from torchsurgeon.planning.row import Row

_PARTS = ("decide", "head", "encode", "uplink", "queue", "tail", "downlink", "decode", "wait", "local")


@dataclass(frozen=True)
class EdgeInference:
    """Where the time of one inference went, in seconds, and what crossed. The parts add up to ``total_s``.

    Attributes:
        partition: the name of the point where the model was cut; ``"device"`` where nothing crossed.
        codec: how the boundary was encoded; None where nothing crossed.
        total_s: from the call to its result.
        head_s: the head on the device, or the whole model where nothing crossed.
        encode_s: encoding the boundary, and handing it to the thread that sends it.
        uplink_s: sending, with half a round trip, opening a connection where none is open, and what the server spends
            beside queue and tail.
        queue_s: waiting in the server's queue.
        tail_s: the tail on the server.
        downlink_s: receiving the answer, with half a round trip.
        decode_s: decoding the answer.
        decide_s: choosing the cut, and waiting for the server to be made ready.
        wait_s: waiting in vain for the server's answer.
        local_s: the whole model on the device, where the server's answer was not used.
        sent_bytes: bytes sent.
        received_bytes: bytes received.
        degraded: why the answer was not made as planned, such as ``"late: …"``; None if it was.
        server: the server whose answer it is; None if the device made it.
        decision: what the cut was chosen on; None where it is fixed.
        where: where the model ran, in words: ``all on the server``, ``cut after features.5`` or ``all on the device``.
    """

    partition: str
    codec: str | None
    total_s: float
    head_s: float = 0.0
    encode_s: float = 0.0
    uplink_s: float = 0.0
    queue_s: float = 0.0
    tail_s: float = 0.0
    downlink_s: float = 0.0
    decode_s: float = 0.0
    decide_s: float = 0.0
    wait_s: float = 0.0
    local_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    degraded: str | None = None
    server: str | None = None
    decision: Decision[Row] | None = None
    where: str = ALL_ON_DEVICE

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name + '_s') * 1e3:.2f}" for name in _PARTS if getattr(self, name + "_s")]
        why = f"; {self.degraded}" if self.degraded else ""
        return f"{self.total_s * 1e3:.2f} ms ({self.where}; ms: {', '.join(parts)}; {self.sent_bytes} bytes sent{why})"


def times_of(answer: ArrayAnswer, headed_s: float, end_s: float, round_trip_s: float) -> dict[str, float]:
    """Return the times and bytes of a call that the server answered, as fields of ``EdgeInference``.

    Args:
        answer: the server's answer.
        headed_s: when the head had run (``time.perf_counter``).
        end_s: when the result was ready.
        round_trip_s: the link's round trip.
    """
    timing, told = answer.timing, answer.parameters
    queue_s, tail_s = seconds(told.get("queue_s")), seconds(told.get("compute_s"))
    way_s = max(0.0, timing.end_s - timing.ready_s - queue_s - tail_s)
    downlink_s = min(way_s, timing.end_s - timing.first_byte_s + round_trip_s / 2)
    return {
        "encode_s": timing.ready_s - headed_s,
        "uplink_s": way_s - downlink_s,
        "queue_s": queue_s,
        "tail_s": tail_s,
        "downlink_s": downlink_s,
        "decode_s": end_s - timing.end_s,
        "sent_bytes": timing.sent_bytes,
        "received_bytes": timing.received_bytes,
    }


def seconds(value: Any) -> float:
    """Return a duration from a server's answer; 0 for anything that is not a plausible one, since servers may lie."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e6 else 0.0
