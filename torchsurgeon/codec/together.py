"""Codecs at several cuts of one inference, measured together: what they change in the model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchsurgeon.accuracy.budget import Budget, Verdict
from torchsurgeon.accuracy.finding import Finding
from torchsurgeon.accuracy.sample import check_calls, inputs_of
from torchsurgeon.codec.boundaries import named
from torchsurgeon.codec.codec import find_codec
from torchsurgeon.codec.fitted.codec import RatedCodec
from torchsurgeon.codec.trial import StudentRun, Trial
from torchsurgeon.cutting.partition import middle_for, tail_for
from torchsurgeon.errors import CodecError, short
from torchsurgeon.profiling.origin import device_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint


def measure_together(
    graph: LayerGraph,
    samples: Sequence[Any],
    ways: Sequence[tuple[int | str | PartitionPoint, str]],
    budget: Budget,
    *,
    device: str | torch.device | None = None,
) -> tuple[Finding, ...]:
    """Return what codecs change in a model's answers when a chain of machines uses one behind the other.

    Every call is encoded and decoded at each of the cuts, with the layers between them run on what was decoded.

    Args:
        graph: the traced model.
        samples: calls like the traced example, as ``measure()`` takes them. All of them judge.
        ways: for each link of the chain, the cut and the name of the codec, in the order of the model. A chain's plan
            has them as ``zip(plan.points, plan.codecs)``.
        budget: how much may change; each finding says whether its limit is met.
        device: where the model runs; the device of its parameters by default.

    Raises:
        CodecError: there are no samples or ways, a codec is unknown, a sample is not like the example, or a cut is the
            last, at which nothing crosses.
        SampleSizeError: the samples are too few to show that the budget is kept.
        PartitionError: the graph has no such point, or a cut lies before the one in front of it.
    """
    check_calls(samples)
    if not samples or not ways:
        raise CodecError(
            "codecs are measured together on samples of your own, at cuts with a codec for each; got "
            f"{len(samples)} samples and {len(ways)} cuts"
        )
    target = device_of(graph, device)
    budget.check_sample(len(samples), graph.batch, graph.outputs[0])
    crossing = [spec.name for spec in graph.points[0].tensors]
    whole = tail_for(graph, crossing, flat=True)
    parts: list[tuple[Any, Trial]] = []
    for ref, name in ways:
        point = graph.point(ref)
        if point.index == len(graph.layers):
            raise CodecError(f"nothing crosses at the last point, {short(point.name)}; leave it out of the cuts")
        names = [spec.name for spec in point.tensors]
        # A machine that runs no layer passes on what it has decoded.
        middle = None if names == crossing else middle_for(graph, crossing, point)
        codec, student = find_codec(name), None
        fitted = codec.student_at(point) if isinstance(codec, RatedCodec) else None
        if fitted is not None and fitted.student is not None:
            if parts:
                raise CodecError(
                    f"the student of {short(name)} takes the model's input, so it is used at the first cut only; name "
                    f"another codec at {short(point.name)}"
                )
            student = StudentRun(fitted.student.segment(graph, point.index), whole, target)
        parts.append((middle, Trial(codec, names, target, student)))
        crossing = names
    tail = tail_for(graph, crossing, flat=True)
    calls = inputs_of(graph, samples, target)
    verdict = Verdict(budget, graph.unflatten_output, len(calls))
    with torch.no_grad():
        for call in calls:
            tensors = call
            for middle, trial in parts:
                tensors = trial.decoded(tensors if middle is None else list(middle(*tensors)), call)
            verdict.add(named(graph.outputs, whole(*call)), named(graph.outputs, tail(*tensors)))
    return verdict.findings()
