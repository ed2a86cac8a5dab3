"""Where to cut: the partition point with the lowest latency, from both sides' profiles and the link.

Pure arithmetic on profiles; nothing is run here.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from torchsurgeon.errors import PartitionError
from torchsurgeon.link import Link
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The predicted latency of one inference cut at ``point``, term by term.

    ``uplink_s`` and ``downlink_s`` each hold half the round trip; all terms but ``head_s`` are 0 when everything runs
    on the device.
    """

    point: PartitionPoint
    head_s: float
    uplink_s: float
    tail_s: float
    downlink_s: float

    @property
    def latency_s(self) -> float:
        """Seconds from call to answer."""
        return self.head_s + self.uplink_s + self.tail_s + self.downlink_s


def estimate(graph: LayerGraph, device: LayerProfile, server: LayerProfile, link: Link) -> list[Estimate]:
    """Return the predicted latency of every partition point, in their order.

    Raises :class:`~torchsurgeon.errors.ProfileError` when a profile is of another graph.
    """
    for profile in (device, server):
        profile.check(graph)
    head_s, tail_s = device.head_s, server.tail_s
    answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
    half_s = link.round_trip_s / 2
    downlink_s = half_s + link.downlink_s(answer_bytes)
    last = len(graph.layers)
    return [
        Estimate(
            point,
            float(head_s[point.index]),
            0.0 if point.index == last else half_s + link.uplink_s(point.size_bytes),
            float(tail_s[point.index]),
            0.0 if point.index == last else downlink_s,
        )
        for point in graph.points
    ]


def best(estimates: list[Estimate]) -> Estimate:
    """Return the estimate with the lowest latency; of equal ones the one with the least work on the device."""
    if not estimates:
        raise PartitionError("there is no partition point to choose from")
    return estimates[int(np.argmin([e.latency_s for e in estimates]))]
