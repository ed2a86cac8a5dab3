"""What is known of one inference when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchsurgeon.adapting import Decision
from torchsurgeon.planning import Row
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.transport import Answer

_PARTS = ("decide", "head", "encode", "uplink", "queue", "tail", "downlink", "decode", "wait", "local")


@dataclass(frozen=True)
class Inference:
    """Where the time of one inference went, in seconds, and what crossed.

    ``decide_s`` is what choosing the cut took, and waiting for servers to shake hands anew. ``uplink_s`` and
    ``downlink_s`` include half a round trip each; what the server spends beside queue and tail counts to the uplink.
    Where no server's answer was used, ``wait_s`` was spent on waiting for one, and ``local_s`` on the tail here. The
    parts add up to ``total_s``.

    ``degraded`` says why the answer did not come the way it was meant to, such as ``"late: …"``, and is None when it
    did. ``server`` is the one whose answer it is, None when it was made here; ``decision`` what the cut was chosen on,
    None where it is fixed.
    """

    partition: PartitionPoint
    total_s: float
    head_s: float
    encode_s: float = 0.0
    uplink_s: float = 0.0
    queue_s: float = 0.0
    tail_s: float = 0.0
    downlink_s: float = 0.0
    decode_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    decide_s: float = 0.0
    wait_s: float = 0.0
    local_s: float = 0.0
    degraded: str | None = None
    server: str | None = None
    decision: Decision[Row] | None = None

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name + '_s') * 1e3:.2f}" for name in _PARTS if getattr(self, name + "_s")]
        crossed = self.sent_bytes or self.wait_s or self.local_s
        where = f"cut after {self.partition.name}" if crossed else "all on the device"
        why = f"; {self.degraded}" if self.degraded else ""
        return f"{self.total_s * 1e3:.2f} ms ({where}; ms: {', '.join(parts)}; {self.sent_bytes} bytes sent{why})"


@dataclass(frozen=True)
class Moments:
    """When the stages of an inference ended (seconds of ``time.perf_counter``)."""

    begun_s: float
    decided_s: float
    headed_s: float


def of_answer(
    point: PartitionPoint, answer: Answer, moments: Moments, end_s: float, round_trip_s: float, **told: Any
) -> Inference:
    """Return the account of an inference that a server answered."""
    timing, parameters = answer.timing, answer.parameters
    queue_s, tail_s = seconds(parameters.get("queue_s")), seconds(parameters.get("compute_s"))
    way_s = max(0.0, timing.end_s - timing.send_start_s - queue_s - tail_s)
    downlink_s = min(way_s, timing.end_s - timing.first_byte_s + round_trip_s / 2)
    return Inference(
        partition=point,
        total_s=end_s - moments.begun_s,
        decide_s=moments.decided_s - moments.begun_s,
        head_s=moments.headed_s - moments.decided_s,
        encode_s=timing.send_start_s - moments.headed_s,
        uplink_s=way_s - downlink_s,
        queue_s=queue_s,
        tail_s=tail_s,
        downlink_s=downlink_s,
        decode_s=end_s - timing.end_s,
        sent_bytes=timing.sent_bytes,
        received_bytes=timing.received_bytes,
        **told,
    )


def seconds(value: Any) -> float:
    """Return a duration that a server told; 0 for anything that is none."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e6 else 0.0
