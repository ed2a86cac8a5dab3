"""Parts of a model cut out of one exported program, so that many parts are there in the time that exporting one takes.

What runs calls is always exported part by part. This is for measuring: a part that is cut out computes the same, by the
same operators, and the runtime that reads it fuses them as it does with a part of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchsurgeon.backends.onnx import write_onnx
from torchsurgeon.backends.part import Part
from torchsurgeon.cutting.partition import between, with_inner
from torchsurgeon.cutting.reach import overwrites
from torchsurgeon.errors import BackendError
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

# Such a model is handed over as one message, of which the format allows 2 GB.
_MOST_BYTES = 1_500_000_000


class Slices:
    """A model in ONNX, out of which heads and tails of its points can be cut.

    Args:
        graph: the traced model.
        points: the points.
        tensors: the model's input tensors.
        until: the layer before which the export ends; None for the whole model.

    Raises:
        BackendError: the model cannot be exported, or is too large.
    """

    def __init__(
        self,
        graph: LayerGraph,
        points: Sequence[PartitionPoint],
        tensors: Sequence[Tensor],
        until: PartitionPoint | None = None,
    ) -> None:
        import onnx
        import onnx.utils

        if until is not None:
            points = [*(point for point in points if point.index < until.index), until]
        known = {spec.name for spec in (*graph.inputs, *graph.outputs)}
        inner = dict.fromkeys(spec.name for point in points for spec in point.tensors if spec.name not in known)
        names = [name for name in inner if self._stays(graph, name)]
        specs = tuple(graph.values[name] for name in names)
        whole = (
            Part(graph, with_inner(graph, names), graph.inputs, (*specs, *graph.outputs), frozenset(), graph.batch_free)
            if until is None
            else Part(
                graph,
                between(graph, [spec.name for spec in graph.inputs], names),
                graph.inputs,
                specs,
                frozenset(),
                graph.batch_free,
            )
        )
        with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as folder:
            path = Path(folder) / "whole.onnx"
            write_onnx(whole, tensors, path, free_batch=False)
            model = onnx.load(str(path))
        if model.ByteSize() > _MOST_BYTES:
            raise BackendError(f"the model takes {model.ByteSize() / 1e9:.1f} GB in ONNX, which is too much to cut up")
        self._names = set(names)
        self._extractor: Any = onnx.utils.Extractor(model)
        # Where two names stand for one tensor, the exporter copies it by this operator; later layers read the first.
        self._same = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Identity"}

    @staticmethod
    def _stays(graph: LayerGraph, name: str) -> bool:
        """Return whether a tensor is the same at the end of a call as where it crosses, and no number of Python's."""
        value = graph.value(name)
        later = (step.index for step in graph.steps if step.index > value.step)
        return value.restore is None and not overwrites(graph.flow, later, value)

    def has(self, point: PartitionPoint) -> bool:
        """Return whether head and tail of a point can be cut out."""
        return all(spec.name in self._names for spec in point.tensors)

    def cut(self, part: Part) -> bytes | None:
        """Return a part as the bytes of an ONNX model; None where it cannot be cut out."""
        if part.numbers:
            return None
        aliases = {self._source(spec.name): spec.name for spec in part.inputs}
        try:
            model = self._extractor.extract_model(list(aliases), list(part.output_names))
        except (AssertionError, KeyError, ValueError):
            return None  # a tensor that is passed on, or that was left out above
        graph = model.graph
        for one in graph.input:
            one.name = aliases[one.name]
        known = {""} | {one.name for one in (*graph.input, *graph.initializer)}
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = aliases.get(name, name)
            if not known.issuperset(node.input):
                return None
            known.update(node.output)
        return model.SerializeToString()  # type: ignore[no-any-return]

    def _source(self, name: str) -> str:
        while name in self._same:
            name = self._same[name]
        return name
