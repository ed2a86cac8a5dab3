"""The account of one inference: where its time went, and what crossed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchsurgeon._place import ALL_ON_DEVICE
from torchsurgeon.adapting import Decision
from torchsurgeon.planning import Row
from torchsurgeon.runtime.bits import SAME
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.transport.base import Timing

_PARTS = ("decide", "head", "encode", "uplink", "queue", "tail", "downlink", "decode", "wait", "local")


@dataclass(frozen=True)
class Inference:
    """Where the time of one inference went, in seconds, and what crossed. The parts add up to ``total_s``.

    Attributes:
        partition: where the model was cut.
        total_s: from the call to its result.
        head_s: the head on the device, or the whole model where nothing crossed.
        encode_s: encoding the boundary tensors.
        uplink_s: sending, with half a round trip, opening a connection where none is open, and what the server spends
            beside queue and tail.
        queue_s: waiting in the server's queue.
        tail_s: the tail on the server.
        downlink_s: receiving the answer, with half a round trip.
        decode_s: decoding the answer.
        sent_bytes: bytes sent.
        received_bytes: bytes received.
        decide_s: choosing the cut, and waiting for servers to be made ready.
        wait_s: waiting in vain for a server's answer.
        local_s: the tail on the device, where no server's answer was used.
        degraded: why the answer was not made as planned, such as ``"late: …"``; None if it was.
        server: the server whose answer it is; None if the device made it.
        decision: what the cut was chosen on; None where it is fixed.
        bits: ``"same bits"`` if the answer is the model's own on this device, bit for bit; ``"same to rounding"``; or
            ``"changed by a lossy codec"``.
        inexact_because: why it is not ``"same bits"``; empty if it is.
        backend: what ran the head, or the whole model where nothing crossed: ``"eager"``, the name of a backend, or
            ``"own"`` for ``compile=`` and a function.
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
    bits: str = SAME
    inexact_because: tuple[str, ...] = ()
    backend: str = "eager"

    @property
    def where(self) -> str:
        """Where the model ran, in words: ``all on the server``, ``cut after features.5`` or ``all on the device``."""
        return self.partition.where if self.sent_bytes or self.wait_s or self.local_s else ALL_ON_DEVICE

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name + '_s') * 1e3:.2f}" for name in _PARTS if getattr(self, name + "_s")]
        where = self.where if self.backend == "eager" else f"{self.where}, by {self.backend}"
        why = "" if self.bits == SAME else f"; {self.bits}"
        why += f"; {self.degraded}" if self.degraded else ""
        return f"{self.total_s * 1e3:.2f} ms ({where}; ms: {', '.join(parts)}; {self.sent_bytes} bytes sent{why})"


class Moments(NamedTuple):
    """When a call began, its cut was decided and its head had run (``time.perf_counter``), and what ran that."""

    begun_s: float
    decided_s: float
    headed_s: float
    backend: str = "eager"


def of_answer(
    point: PartitionPoint,
    timing: Timing,
    parameters: Mapping[str, Any],
    moments: Moments,
    end_s: float,
    round_trip_s: float,
    **known: Any,
) -> Inference:
    """Return the account of an inference that a server answered.

    Args:
        point: where the model was cut.
        timing: when the request was exchanged for the answer.
        parameters: the answer's parameters.
        moments: when the call's stages on the device ended.
        end_s: when its result was ready (``time.perf_counter``).
        round_trip_s: the link's round trip.
        **known: further fields of ``Inference``.
    """
    queue_s, tail_s = seconds(parameters.get("queue_s")), seconds(parameters.get("compute_s"))
    way_s = max(0.0, timing.end_s - timing.ready_s - queue_s - tail_s)
    downlink_s = min(way_s, timing.end_s - timing.first_byte_s + round_trip_s / 2)
    return Inference(
        partition=point,
        total_s=end_s - moments.begun_s,
        decide_s=moments.decided_s - moments.begun_s,
        head_s=moments.headed_s - moments.decided_s,
        encode_s=timing.ready_s - moments.headed_s,
        uplink_s=way_s - downlink_s,
        queue_s=queue_s,
        tail_s=tail_s,
        downlink_s=downlink_s,
        decode_s=end_s - timing.end_s,
        sent_bytes=timing.sent_bytes,
        received_bytes=timing.received_bytes,
        backend=moments.backend,
        **known,
    )


def seconds(value: Any) -> float:
    """Return a duration from a server's answer; 0 for anything that is not a plausible one, since servers may lie."""
    if type(value) is float or type(value) is int:
        return float(value) if 0 <= value < 1e6 else 0.0
    return 0.0
