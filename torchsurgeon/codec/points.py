"""The partition points at which a codec can pay off."""

from __future__ import annotations

from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

_MOST_POINTS = 24
# Cuts whose layers differ by less than this share of the model's operations cost the same.
_SAME_COST = 0.005


def promising(graph: LayerGraph, most: int = _MOST_POINTS) -> list[PartitionPoint]:
    """Return the partition points at which a codec can pay off.

    These are the points at which no more bytes cross than at any point before. Where more bytes cross, an earlier cut
    is better. Of points with the same bytes between which next to nothing is computed, such as those before and behind
    a normalization and its activation, only the last is kept. The last point of all, with everything on the device, is
    left out.

    Args:
        graph: the traced model.
        most: how many points of equal size to keep. Where a model keeps one size through many layers, as transformers
            do, the first point of each size is kept, and the others are thinned out evenly.
    """
    least = float("inf")
    falling: list[PartitionPoint] = []
    for point in graph.points[:-1]:
        if point.size_bytes <= least:
            falling.append(point)
        least = min(least, point.size_bytes)
    smaller: list[PartitionPoint] = []
    equal: list[PartitionPoint] = []
    for point in _apart(graph, falling):
        (equal if smaller and point.size_bytes == smaller[-1].size_bytes else smaller).append(point)
    room = max(0, most - len(smaller))
    if len(equal) > room:
        equal = [equal[(2 * k + 1) * len(equal) // (2 * room)] for k in range(room)]
    return sorted([*smaller, *equal], key=lambda point: point.index)


def work_before(graph: LayerGraph) -> list[float]:
    """Return the share of the model's operations that the first layers take, for none, one, two and so on."""
    flops = [0.0]
    for layer in graph.layers:
        flops.append(flops[-1] + layer.flops)
    # Where no layer counts operations, all count the same.
    return [(x / flops[-1]) if flops[-1] else k / max(1, len(graph.layers)) for k, x in enumerate(flops)]


def _apart(graph: LayerGraph, points: list[PartitionPoint]) -> list[PartitionPoint]:
    """Return the points without those that have the bytes and the cost of the next one."""
    work = work_before(graph)
    kept: list[PartitionPoint] = []
    start = 0.0
    for point in points:
        same = kept and kept[-1].index and kept[-1].size_bytes == point.size_bytes
        if same and work[point.index] - start < _SAME_COST:
            kept[-1] = point
        else:
            kept.append(point)
            start = work[point.index]
    return kept
