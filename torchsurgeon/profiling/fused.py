"""Measure what heads and tails of a model take by a backend of torchsurgeon in place of eager PyTorch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends import Backend, Part
from torchsurgeon.backends.backend import Run
from torchsurgeon.backends.exporting import in_turn
from torchsurgeon.backends.leading import Leading, note_refusal, refused
from torchsurgeon.backends.slicing import Slices
from torchsurgeon.errors import BackendError
from torchsurgeon.profiling.parts import Curve, PartTimes
from torchsurgeon.profiling.record import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

_WARM_UPS = 2
# A point is not worth measuring where head and tail change by less than this share of the whole model around it.
_NEAR = 0.02

Progress = Callable[[int, int], None]


def fused_profile(
    graph: LayerGraph,
    backend: Backend,
    eager: LayerProfile,
    tensors: Sequence[Tensor],
    *,
    repeats: int,
    budget_s: float,
    points: Sequence[int] | None = None,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> LayerProfile:
    """Return what each head and tail takes by a backend, with no joules and no memory.

    The whole model is measured, and then heads and tails at one partition point after the other, each in turns with the
    whole model, by the backend and in eager PyTorch. What counts is their relation to the latter, whose seconds are
    known. So a machine whose speed drifts, or that does something else meanwhile, spoils little. The first points are
    those at which less crosses than at every earlier one: without a codec, no other cut can be the best.

    Args:
        graph: the traced model.
        backend: what runs the parts.
        eager: what each layer takes in eager PyTorch on the same device.
        tensors: the model's input tensors.
        repeats: how many runs of each part are measured.
        budget_s: no further point is begun once it would not be done within this time.
        points: the indices to measure, whatever they take; None to choose them.
        progress: is called with the number of points that are done, and of all that may be measured, after each.
        stopped: is asked before each point whether to measure no more.
    """
    keep_freed_memory()
    begun_s = time.perf_counter()
    measuring = _Measuring(graph, backend, tensors, repeats, eager.total_s)
    curve = Curve(graph, eager.layer_s, measuring.measure_whole())
    inside = [point for point in graph.points if 0 < point.index < len(graph.layers)]
    among = [point for point in inside if measuring.has(point)] if points is None else inside
    chosen = None if points is None else {point.index: point for point in among if point.index in set(points)}
    errors: dict[int, tuple[float, float]] = {}
    longest_s = 0.0
    total = len(among) if chosen is None else len(chosen)
    while not stopped():
        if chosen is not None:
            point = next((p for index, p in chosen.items() if index not in errors), None)
        else:
            spent_s = time.perf_counter() - begun_s
            point = _next(among, curve) if spent_s + longest_s <= budget_s else None
        if point is None:
            break
        started_s = time.perf_counter()
        head_s, tail_s = measuring.measure(point)
        foreseen = float(curve.heads_s()[point.index]), float(curve.tails_s()[point.index])
        errors[point.index] = (abs(foreseen[0] / head_s - 1), abs(foreseen[1] / tail_s - 1))
        curve.add(point.index, head_s, tail_s)
        longest_s = max(longest_s, time.perf_counter() - started_s)
        if progress is not None:
            progress(len(errors), total)
    whole_s = np.array(measuring.whole_s)
    # The whole model has been run beside every part, so all of these together say best how long it takes.
    factor = float(np.median(whole_s)) / curve.whole_s
    return LayerProfile(
        eager.model,
        eager.fingerprint,
        eager.batch,
        eager.layers,
        curve.layer_s[None, :] * factor,
        whole_s,
        {**eager.provenance, "backend": backend.name, "meter": "none", "not_by_backend": measuring.not_built},
        parts=PartTimes(
            tuple(curve.points),
            curve.heads_s() * factor,
            curve.tails_s() * factor,
            np.array([errors[index] for index in curve.points]).reshape(-1, 2),
        ),
    )


def _next(among: Sequence[PartitionPoint], curve: Curve) -> PartitionPoint | None:
    """Return the point to measure next: in the longest gap between measured ones, the one nearest to its middle."""
    heads_s, last = curve.heads_s(), len(curve.layer_s)
    known = [0, *curve.points, last]
    least_bytes, few = float("inf"), set()
    for point in among:
        if point.size_bytes < least_bytes:
            least_bytes = point.size_bytes
            few.add(point.index)
    for first in (True, False):
        gaps = []
        for a, b in itertools.pairwise(known):
            inside = [p for p in among if a < p.index < b and (p.index in few or not first)]
            span_s = float(heads_s[b] - heads_s[a])
            if inside and span_s > _NEAR * curve.whole_s:
                middle_s = float(heads_s[a] + heads_s[b]) / 2
                gaps.append((span_s, min(inside, key=lambda p: abs(float(heads_s[p.index]) - middle_s))))
        if gaps:
            return max(gaps, key=lambda gap: gap[0])[1]
    return None


class _Measuring:
    """Builds parts by a backend, and times them, where the whole model takes ``eager_s`` seconds in eager PyTorch.

    Attributes:
        whole_s: seconds of all runs of the whole model.
        not_built: the names of the measured points of which a part is not run by the backend, or not to its end, but in
            eager PyTorch.
    """

    def __init__(
        self, graph: LayerGraph, backend: Backend, tensors: Sequence[Tensor], repeats: int, eager_s: float
    ) -> None:
        self._graph, self._backend, self._repeats, self._eager_s = graph, backend, repeats, eager_s
        self._tensors = [tensor.detach() for tensor in tensors]
        self.whole_s: list[float] = []
        self.not_built: list[str] = []
        self._slices = self._sliced()
        whole = Part.head(graph, graph.points[-1])
        self._always: list[tuple[Run, Sequence[Tensor]]] = [
            (whole.segment, self._tensors),
            (self._built(whole, self._tensors, "the whole model"), self._tensors),
        ]

    def _sliced(self) -> Slices | None:
        """Return what parts are cut out of; None where the backend builds each part by itself."""
        if type(self._backend).load_onnx is Backend.load_onnx:
            return None
        graph = self._graph
        inside = [point for point in graph.points if 0 < point.index < len(graph.layers)]
        leading = Leading.of(Part.head(graph, graph.points[-1]))
        until: PartitionPoint | None = None
        while leading is not None:
            try:
                with torch.no_grad(), in_turn(graph, self._tensors):
                    return Slices(graph, inside, self._tensors, until)
            except Exception as error:  # a package is missing, another project's exporter fails
                if by_signal_handler(error):
                    raise
                layer = error.layer if isinstance(error, BackendError) else None
                leading = leading.before(layer)
                if isinstance(error, BackendError):
                    note_refusal(graph, self._backend, error)
                if leading is not None:
                    until = next((point for point in inside if point.tensors == leading.part.outputs), None)
                    if until is None:
                        return None
        return None

    def has(self, point: PartitionPoint) -> bool:
        """Return whether head and tail of a point are quickly there."""
        return self._slices is None or self._slices.has(point)

    def measure_whole(self) -> float:
        """Return the median seconds of the whole model."""
        self._measure([])
        return float(np.median(self.whole_s))

    def measure(self, point: PartitionPoint) -> tuple[float, float]:
        """Return the seconds of the head and of the tail of a point."""
        head = Part.head(self._graph, point)
        with torch.no_grad():
            boundary = [tensor.clone() for tensor in head.segment(*self._tensors)]
        tail = Part.tail(self._graph, [spec.name for spec in point.tensors])
        head_s, tail_s = self._measure(
            [
                (self._built(head, self._tensors, point.name), self._tensors),
                (self._built(tail, boundary, point.name), boundary),
            ]
        )
        return head_s, tail_s

    def _measure(self, parts: Sequence[tuple[Run, Sequence[Tensor]]]) -> list[float]:
        times_s = np.array(self._runs([*self._always, *parts]))
        relations = times_s[:, 1:] / times_s[:, :1] * self._eager_s
        self.whole_s += relations[:, 0].tolist()
        return [float(seconds) for seconds in np.median(relations[:, 1:], axis=0)]

    def _built(self, part: Part, tensors: Sequence[Tensor], name: str) -> Run:
        """Return what runs a part: the backend, and eager PyTorch from the layer on that the backend does not take."""
        if not part.segment.steps:
            return part.segment
        leading = Leading.of(part, list(refused(self._graph, self._backend)))
        while leading is not None:
            try:
                run = self._run_of(leading, tensors)
            except Exception as error:  # another project's compiler may fail in any way
                if by_signal_handler(error):
                    raise
                if isinstance(error, BackendError):
                    note_refusal(self._graph, self._backend, error)
                leading = leading.before(error.layer if isinstance(error, BackendError) else None)
                continue
            if leading.rest is not None:
                self._note(name)
            return lambda *given: run(*part.computed(given))
        self._note(name)
        return part.segment

    def _run_of(self, leading: Leading, tensors: Sequence[Tensor]) -> Run:
        model = None if self._slices is None else self._slices.cut(leading.part)
        run = None if model is None else self._backend.load_onnx(model, leading.part)
        if run is not None:
            return leading.followed(run)
        # For these shapes only: for a free batch it may have to be exported twice.
        with torch.no_grad(), in_turn(self._graph, tensors):
            return leading.build(self._backend, tensors, free_batch=False)

    def _note(self, name: str) -> None:
        if name not in self.not_built:
            self.not_built.append(name)

    def _runs(self, parts: Sequence[tuple[Run, Sequence[Tensor]]]) -> list[list[float]]:
        """Run the parts in turns, and return their seconds, run by run."""
        found = []
        with torch.no_grad():
            for repeat in range(_WARM_UPS + self._repeats):
                row = []
                for part, tensors in parts:
                    begin_s = time.perf_counter()
                    part(*tensors)
                    self._wait()
                    row.append(time.perf_counter() - begin_s)
                if repeat >= _WARM_UPS:
                    found.append(row)
        return found

    def _wait(self) -> None:
        if self._tensors and self._tensors[0].is_cuda:
            torch.cuda.synchronize(self._tensors[0].device)
