"""Which backend runs which part of the model on this device, where several may."""

from __future__ import annotations

from collections.abc import Sequence

from torchsurgeon.backends import Backend
from torchsurgeon.planning.sides import Side
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint


class AutoBackend:
    """Chooses for each part the backend that runs it quickest here, by what has been measured so far. Thread-safe.

    Args:
        candidates: the backends that may be chosen, besides eager PyTorch. Their answers deviate by no more than the
            user allows.
    """

    def __init__(self, candidates: Sequence[Backend]) -> None:
        self.candidates = {backend.name: backend for backend in candidates}
        self._sides: tuple[Side, Side] | None = None
        self._index: dict[tuple[str, ...], int] = {}

    @property
    def keeps_bits(self) -> bool:
        """Whether all backends that may be chosen keep the bits of eager PyTorch."""
        return all(backend.keeps_bits for backend in self.candidates.values())

    def learn(self, graph: LayerGraph, profiles: Sequence[LayerProfile]) -> None:
        """Choose by these profiles of the device from now on."""
        self._index = {tuple(sorted(spec.name for spec in point.tensors)): point.index for point in graph.points}
        known = [profile for profile in profiles if profile.backend == "eager" or profile.backend in self.candidates]
        if known:
            heads = Side(graph, known, "device", tails=False)
            self._sides = heads, Side(graph, known, "device", tails=True)

    def of_head(self, point: PartitionPoint) -> Backend | None:
        """Return what runs the head of a point, which is the whole model at the last one; None for eager PyTorch."""
        if self._sides is None:
            return None
        side = self._sides[0]
        cost = side.at(point.index) if point.layers is None else side.of(point.layers)
        return self.candidates.get(side.backend(cost.place))

    def of_tail(self, names: Sequence[str]) -> Backend | None:
        """Return what runs the rest of the model after some tensors; None for eager PyTorch."""
        if self._sides is None:
            return None
        side, index = self._sides[1], self._index.get(tuple(sorted(names)))
        return self.candidates.get(side.backend(side.usual if index is None else side.at(index).place))
