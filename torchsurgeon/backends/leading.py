"""What a backend runs of a part in which it refuses a layer: all that comes before, with eager PyTorch behind it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchsurgeon.backends.backend import Backend, Run
from torchsurgeon.backends.part import Part
from torchsurgeon.cutting.partition import between, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import BackendError, PartitionError
from torchsurgeon.tracing.graph import LayerGraph

_refused: weakref.WeakKeyDictionary[LayerGraph, dict[str, dict[str, str]]] = weakref.WeakKeyDictionary()


def refused(graph: LayerGraph, backend: Backend) -> Mapping[str, str]:
    """Return the layers of a graph that a backend is known not to take, each with the reason.

    Finding that out takes an export that fails, so it is done once for all parts of a model.
    """
    return _refused.get(graph, {}).get(backend.name, {})


def note_refusal(graph: LayerGraph, backend: Backend, error: BackendError) -> None:
    """Remember that a backend does not take a layer, if the error names one."""
    if error.layer is not None:
        _refused.setdefault(graph, {}).setdefault(backend.name, {})[error.layer] = str(error)


@dataclass(frozen=True)
class Leading:
    """A part of a model of which a backend runs the layers before one that it refuses.

    Attributes:
        whole: the part.
        part: what the backend runs; the same where it takes all.
        rest: what eager PyTorch runs behind it; None where the backend takes all.
        layer: the layer with which the rest begins; None likewise.
    """

    whole: Part
    part: Part
    rest: Segment | None = None
    layer: str | None = None

    @classmethod
    def of(cls, part: Part, refused: Sequence[str] = ()) -> Leading | None:
        """Return all of a part, or what comes before the layers that are known to be refused; None where nothing does.

        Args:
            part: the part.
            refused: the layers.
        """
        leading: Leading | None = cls(part, part)
        for layer in refused:
            steps = {part.graph.steps[step].name for step in part.segment.steps}
            if leading is not None and layer in steps:
                leading = leading.before(layer)
        return leading

    def before(self, layer: str | None) -> Leading | None:
        """Return what remains where a backend refuses a layer of ``part``; None where nothing does.

        Args:
            layer: the layer; None where it is not known.
        """
        graph, whole = self.whole.graph, self.whole
        rank = next((rank for rank, one in enumerate(graph.layers) if one.name == layer), None)
        # Of a student, which is another program than the graph's, a backend takes all or nothing.
        if rank is None or not whole.own:
            return None
        mine = {step for step in self.part.segment.steps if step in graph.flow.rank}
        if not mine or min(map(graph.flow.rank.__getitem__, mine)) >= rank:
            return None
        point = max((point for point in graph.points if point.index <= rank), key=lambda point: point.index)
        names, boundary = ([spec.name for spec in some] for some in (whole.inputs, point.tensors))
        try:
            part = Part.middle(graph, names, point)
            if whole.outputs == graph.outputs:
                rest = tail_for(graph, boundary, flat=True)
            else:
                rest = between(graph, boundary, [spec.name for spec in whole.outputs])
        except PartitionError:
            return None
        if len(part.segment.steps) >= len(self.part.segment.steps) or not part.segment.steps:
            return None
        return Leading(whole, part, rest, layer)

    def build(self, backend: Backend, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Return what runs the whole part, built by a backend as far as it goes.

        Args:
            backend: the backend.
            example: the part's tensors, numbers included.
            free_batch: as in ``Backend.build()``.

        Raises:
            Exception: as ``Backend.build()`` raises it.
        """
        return self.followed(backend.build(self.part, example, free_batch=free_batch))

    def followed(self, run: Run) -> Run:
        """Return a run of ``part`` with the rest behind it."""
        rest = self.rest
        return run if rest is None else lambda *tensors: rest(*run(*tensors))
