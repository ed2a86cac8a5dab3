"""Measuring codecs at a model's partition points, on a user's own samples."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon import _allocator
from torchsurgeon.accuracy.budget import Budget, Verdict
from torchsurgeon.accuracy.finding import Finding
from torchsurgeon.accuracy.sample import check_calls, inputs_of
from torchsurgeon.codec.boundaries import Tails, Walk
from torchsurgeon.codec.codec import Codec, find_codec, measured_names
from torchsurgeon.codec.fitted.codec import RatedCodec
from torchsurgeon.codec.points import promising, work_before
from torchsurgeon.codec.table import CodecRow, CodecTable
from torchsurgeon.codec.trial import StudentRun, Trial
from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.errors import CodecError, UnfinishedWarning, short
from torchsurgeon.profiling.origin import device_of, provenance
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

# Sizes and times are taken on so many calls, the same ones for every codec. More would hardly change a mean.
_SIZED = 32
# Of the work that the progress counts, what encoding and decoding take beside one run of the whole model for each call.
_ENCODING = 0.05


def measure(
    graph: LayerGraph,
    samples: Sequence[Any],
    codecs: Sequence[str] | None = None,
    *,
    points: Sequence[int | str | PartitionPoint] | None = None,
    across: Sequence[PartitionPoint] = (),
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[float, float, str], object] | None = None,
) -> CodecTable:
    """Return size, time and error of every codec at the partition points where a cut can pay off.

    With a ``budget``, the tail runs on the tensors that each lossy codec decoded. Codecs of one kind are tested from
    the finest to the coarsest; the first that breaks the budget ends the test of its kind at this point, so that no
    codec keeps a budget only because many were tried. Without a budget, no lossy codec counts as within it.

    Ctrl-C ends the measurement early: the table holds the points that were measured until then, ``unfinished`` names
    the others, and an ``UnfinishedWarning`` says so.

    Args:
        graph: the traced model.
        samples: calls like the traced example. Each is a tensor, a tuple of positional arguments or a dict of keyword
            arguments. All of them judge. Where a codec was set up on some, give the others: ``halves()`` makes the two.
        codecs: names of the codecs; ``measured_names()`` by default. ``raw`` is always measured. A codec that encodes
            no tensor at a point (``int8`` on integers, ``jpeg`` on a feature map) has no row there, and neither has a
            lossy one that encodes none of the samples' tensors.
        points: indices or layer names; those of ``promising()`` by default. By default, too, a lossy codec is judged
            only where it makes the boundary smaller than finer codecs of its kind do there, and than lossless ones do
            there or at an earlier point.
        across: cuts across branches that are measured as well: ``row.point(graph)`` of a frontier's rows.
        budget: how much lossy codecs may change.
        device: where the model runs, and where values are packed and unpacked; the device of its parameters by default.
        progress: called as ``progress(done, total, what)`` now and then, with ``what`` the point that is measured.

    Raises:
        CodecError: a codec is unknown, there are no samples, a sample is not like the example, or a point is the last,
            at which nothing crosses.
        SampleSizeError: the samples are too few to show that a codec keeps the budget.
        PartitionError: the graph has no such point.
    """
    check_calls(samples)
    if not samples:
        raise CodecError("codecs are measured on samples of your own, and samples is empty; give calls, [image, …]")
    target = device_of(graph, device)
    known = [find_codec(name) for name in dict.fromkeys(("raw", *(measured_names() if codecs is None else codecs)))]
    chosen = promising(graph) if points is None else [graph.point(ref) for ref in dict.fromkeys(points)]
    rated = [one.fitted for one in known if isinstance(one, RatedCodec)]
    made_for = {fitted.point[0]: fitted for fitted in rated if fitted.student is not None}
    if points is None:
        across = [*across, *map(graph.point, made_for)]
    chosen = list(dict.fromkeys([*chosen, *map(graph.point, across)]))
    missed = made_for.keys() - {point.index for point in chosen}
    if missed:
        fitted = made_for[min(missed)]
        raise CodecError(
            f"the student of {fitted.name} computes what crosses at {short(fitted.point[1])}, which is not measured; "
            "add this point, or leave the codec out"
        )
    if any(point.index == len(graph.layers) for point in chosen):
        raise CodecError(f"point {len(graph.layers)} is the last, at which nothing crosses; leave it out of points")
    if budget is not None:
        budget.check_sample(len(samples), graph.batch, graph.outputs[0])
    _allocator.keep_freed_memory()
    calls = inputs_of(graph, samples, target)
    measuring = _Measuring(graph, calls, known, sorted(chosen, key=lambda point: point.index), budget, target, progress)
    measuring.prunes = points is None
    rows: list[CodecRow] = []
    missing = [point.name for point in measuring.points]
    with torch.no_grad():
        try:
            for found in measuring.rows():
                rows += found
                missing.pop(0)
        except KeyboardInterrupt:
            if not rows:
                raise
            warnings.warn(
                f"measuring codecs was interrupted; {len(chosen) - len(missing)} of {len(chosen)} points were measured "
                "before, and the table holds only these",
                UnfinishedWarning,
                stacklevel=2,
            )
    measured = type(graph.model).__name__, graph.fingerprint, graph.batch, len(calls), str(budget or "")
    return CodecTable(*measured, tuple(rows), provenance(target), tuple(missing))


class _Measuring:
    """Measures point after point."""

    def __init__(
        self,
        graph: LayerGraph,
        calls: list[list[Tensor]],
        codecs: list[Codec],
        points: list[PartitionPoint],
        budget: Budget | None,
        device: torch.device,
        progress: Callable[[float, float, str], object] | None,
    ) -> None:
        self.graph, self.calls, self.codecs, self.points = graph, calls, codecs, points
        self.budget, self.device = budget, device
        self.prunes = True
        self._students: dict[str, StudentRun] = {}
        self._progress = progress
        self._work = work_before(graph)
        self._expected = [self._work_of(point) for point in points]
        self._answering = 0.0 if budget is None else 1.0
        self._done = 0.0
        # The smallest lossless boundary so far, and what and where it is.
        self._least: tuple[float, str] = (float("inf"), "")

    def rows(self) -> Iterator[list[CodecRow]]:
        """Give the rows of each point."""
        walk = Walk(self.graph, self.calls)
        answers: list[dict[str, Tensor]] = []
        if self.budget is not None:
            for answer in walk.answers():
                answers.append(answer)
                self._advance(self._answering / len(self.calls), "the model's own answers")
        for point, expected in zip(self.points, self._expected, strict=True):
            before = self._done
            walk.to(point)
            yield self._rows(walk, answers)
            self._advance(before + expected - self._done, point.name)

    def _work_of(self, point: PartitionPoint) -> float:
        """Return about how much is to do at a point, in runs of the whole model for each call."""
        lossy = {one.changes_as for one in self._suiting(point) if not one.lossless}
        return _ENCODING * (1 + len(lossy)) + len(lossy) * (1 - self._work[point.index]) * (self.budget is not None)

    def _suiting(self, point: PartitionPoint) -> list[Codec]:
        """Return the codecs for a point; one whose student computes the tensors of another point is none."""
        return [
            one
            for one in self.codecs
            if any(one.suits(s.dtype, s.shape, s.name) for s in point.tensors)
            and not (isinstance(one, RatedCodec) and one.fitted.student and not one.student_at(point))
        ]

    def _trial(self, codec: Codec, point: PartitionPoint) -> Trial:
        fitted = codec.student_at(point) if isinstance(codec, RatedCodec) else None
        student = None
        if fitted is not None and fitted.student is not None:
            if fitted.name not in self._students:
                segment = fitted.student.segment(self.graph, point.index)
                whole = tail_for(self.graph, [spec.name for spec in self.graph.inputs], flat=True)
                self._students[fitted.name] = StudentRun(segment, whole, self.device)
            student = self._students[fitted.name]
        return Trial(codec, [spec.name for spec in point.tensors], self.device, student)

    def _advance(self, work: float, what: str) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(self._done, self._answering + sum(self._expected), what)

    def _rows(self, walk: Walk, answers: list[dict[str, Tensor]]) -> list[CodecRow]:
        point, boundaries = walk.point, walk.boundaries
        trials = [self._trial(one, point) for one in self._suiting(point)]
        every = max(1, -(-len(boundaries) // _SIZED))
        for index, (boundary, inputs) in enumerate(zip(boundaries[::every], walk.calls[::every], strict=True)):
            for trial in trials:
                trial.measure(boundary, inputs, first=index == 0, calls=-(-len(boundaries) // every))
        # Codecs of numbers leave alone what has none that they can write, such as tensors with NaN. What a codec that
        # encoded none of these calls' tensors loses on others is not known, unless other calls of the sample tell.
        for trial in trials:
            if trial.unused and every > 1:
                trial.unused = all(map(trial.exact, boundaries, walk.calls))
        trials = [trial for trial in trials if not trial.unused]
        self._advance(_ENCODING, point.name)
        if self.budget is not None:
            self._judge(walk, trials, answers)
        raw_bytes = statistics.mean(sum(tensor.nbytes for tensor in one) for one in boundaries)
        return [trial.row(point, raw_bytes) for trial in trials]

    def _judge(self, walk: Walk, trials: list[Trial], answers: list[dict[str, Tensor]]) -> None:
        """Test the lossy codecs at a point, each kind from the finest to the coarsest."""
        # Another point's cut across branches may leave the device less to do, so neither is compared with the other.
        prunes = self.prunes and walk.point.layers is None
        for trial in trials:
            if trial.lossless and walk.point.layers is None:
                self._least = min(self._least, (trial.size_bytes, f"{trial.codec.name} at {walk.point.name}"))
        # "+zstd" compresses without loss, so a codec with it and the same codec without it give the same answers.
        alike: dict[str, list[Trial]] = {}
        for trial in trials:
            if not trial.lossless:
                alike.setdefault(trial.codec.changes_as, []).append(trial)
        tails = Tails(walk, answers) if alike else None
        failed: dict[str, str] = {}
        finer: dict[str, tuple[float, str]] = {}
        for some in sorted(alike.values(), key=lambda some: some[0].codec.coarseness):
            kind = some[0].codec.kind
            smallest = min((trial.size_bytes, trial.codec.name) for trial in some)
            least, what = min(self._least, finer.get(kind, self._least))
            finer[kind] = min(smallest, finer.get(kind, smallest))
            reason = ""
            findings: tuple[Finding, ...] = ()
            # A student leaves the device less to do than the layers before any of these points.
            if prunes and smallest[0] >= least and some[0].student is None:
                reason = f"not smaller than {what}"
            elif kind in failed:
                reason = f"after {failed[kind]}"
            else:
                assert tails is not None
                findings = self._verdict(walk, some[0], tails, answers).findings()
            for trial in some:
                trial.untested, trial.findings = reason, findings
            if findings and not some[0].kept:
                failed[kind] = some[0].codec.changes_as

    def _verdict(self, walk: Walk, trial: Trial, tails: Tails, answers: list[dict[str, Tensor]]) -> Verdict:
        """Run tails until all calls have judged, or enough of them to break the budget for certain."""
        assert self.budget is not None
        point, boundaries = walk.point, walk.boundaries
        verdict = Verdict(self.budget, self.graph.unflatten_output, len(boundaries))
        work = _ENCODING + 1 - self._work[point.index]
        for start in range(0, len(boundaries), tails.together):
            some = boundaries[start : start + tails.together]
            decoded = list(map(trial.decoded, some, walk.calls[start:]))
            for answer, output in zip(answers[start:], tails(decoded), strict=False):
                verdict.add(answer, output)
            self._advance(work * len(some) / len(boundaries), point.name)
            if verdict.hopeless:
                break
        return verdict
