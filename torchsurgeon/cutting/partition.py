"""Cut a traced model into the part that runs on the device and the part that runs on the server.

A cut is fully determined by the tensors that cross: the head computes them from the model's inputs, the tail computes
the model's output from them. So one function makes both, and a server can run the right tail from the tensors' names
alone.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.cutting.reach import overwrites, reach, torn
from torchsurgeon.cutting.segment import Feed, Pick, Segment
from torchsurgeon.errors import PartitionError
from torchsurgeon.tracing.flow import Value
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.shape_rules import META
from torchsurgeon.tracing.shapes import MetaModel, dry_run
from torchsurgeon.tracing.specs import PartitionPoint


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model in two parts.

    ``head`` is called like the model and returns the boundary tensors as a tuple, in the order of ``point.tensors``.
    ``tail`` takes those tensors and returns what the model returns. Both share the model's parameters.
    """

    point: PartitionPoint
    head: nn.Module
    tail: nn.Module


class Head(nn.Module):
    """The device's part of a model: called like the model, returns the boundary tensors as a tuple."""

    def __init__(self, graph: LayerGraph, segment: Segment) -> None:
        super().__init__()
        self.training = False
        self.segment = segment
        self._tensors = graph.tensors_of_call

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return self.segment(*self._tensors(args, kwargs))  # type: ignore[no-any-return]


def cut(graph: LayerGraph, point: int | str | PartitionPoint) -> Partition:
    """Cut ``graph`` at a partition point: an index, the name of the last layer on the device, or the point itself.

    Returns two modules in eval mode that give exactly the model's own answer one after the other, at any batch size the
    model takes. Neither changes its inputs. The model is not changed, and its parameters are not copied.

    Raises :class:`~torchsurgeon.errors.PartitionError` when there is no such point.
    """
    if not isinstance(graph, LayerGraph):
        raise PartitionError(f"cut takes a traced model, not {type(graph).__name__}: cut(trace(model, example), point)")
    here = point if isinstance(point, PartitionPoint) else graph.point(point)
    inputs = [graph.value(spec.name) for spec in graph.inputs]
    if here.index == len(graph.layers):
        picks = [Pick(ref.step) for ref in graph.steps[-1].args]
        return Partition(here, Head(graph, _segment(graph, inputs, picks, all_of_it=True)), Result(graph))
    picks = [Pick(value.step, value.path) for value in (graph.value(spec.name) for spec in here.tensors)]
    return Partition(here, Head(graph, _segment(graph, inputs, picks)), tail_for(graph, [s.name for s in here.tensors]))


class Result(nn.Module):
    """The tail when everything runs on the device: puts output tensors back into the model's own structure."""

    def __init__(self, graph: LayerGraph) -> None:
        super().__init__()
        self._build = graph.steps[-1].target.build

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self._build(*tensors)


def tail_for(graph: LayerGraph, names: Sequence[str], *, flat: bool = False) -> Segment:
    """Return the module that turns the tensors ``names`` (in this order) into the model's output.

    With ``flat`` it returns a tuple of the output's tensors, in the order of ``graph.outputs``.

    Raises :class:`~torchsurgeon.errors.PartitionError`: a name the graph does not have, a name twice, or names that do
    not determine the output; the message lists what is wrong or missing.
    """
    picks = [Pick(ref.step) for ref in graph.steps[-1].args] if flat else None
    return _segment(graph, _given(graph, names), picks, all_of_it=True)


def middle_for(graph: LayerGraph, names: Sequence[str], point: PartitionPoint) -> Segment:
    """Return the module that turns the tensors ``names`` (in this order) into those of ``point``, as a tuple.

    Raises :class:`~torchsurgeon.errors.PartitionError` as :func:`tail_for` does, and where the names lie beyond the
    point.
    """
    picks = [Pick(value.step, value.path) for value in (graph.value(spec.name) for spec in point.tensors)]
    return _segment(graph, _given(graph, names), picks)


def _given(graph: LayerGraph, names: Sequence[str]) -> list[Value]:
    for name in names:
        if name not in graph.values:
            near = difflib.get_close_matches(name, graph.values, n=3, cutoff=0.4)
            hint = (
                f"; near it: {', '.join(near)}"
                if near
                else f"; the model's inputs are {', '.join(s.name for s in graph.inputs)}"
            )
            raise PartitionError(f"the graph has no tensor {name!r}{hint}")
        if list(names).count(name) > 1:
            raise PartitionError(f"tensor {name!r} is given twice")
    return [graph.value(name) for name in names]


def check_shapes(graph: LayerGraph, tail: Segment, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Raise :class:`~torchsurgeon.errors.PartitionError` when ``tail`` cannot run on tensors of these shapes.

    For shapes other than the example's (images of another size, longer sequences). Nothing is computed; what only
    values decide is not found out.
    """
    try:
        if set(names) >= {spec.name for spec in graph.inputs}:
            given = dict(zip(names, tensors, strict=True))
            graph.check_sizes([given[spec.name] for spec in graph.inputs])
        if graph.value_dependent:
            return
        values = tail.load([t if graph.value(n).restore else t.to(META) for n, t in zip(names, tensors, strict=True)])
        dry_run([graph.steps[i] for i in tail.steps], values, MetaModel(graph.model))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(names, tensors, strict=True))
        raise PartitionError(f"the model cannot run on tensors of these shapes ({shapes}): {error}") from error


def _segment(
    graph: LayerGraph, given: Sequence[Value], picks: Sequence[Pick] | None, all_of_it: bool = False
) -> Segment:
    wanted = None if picks is None or all_of_it else [(pick.step, pick.path) for pick in picks]
    included, missing = reach(graph.flow, given, wanted)
    if all_of_it and picks is not None:
        included.remove(graph.steps[-1].index)
    if missing:
        raise PartitionError(
            f"the tensors {', '.join(v.name for v in given) or '(none)'} do not determine the output: it also depends "
            f"on the model's inputs {', '.join(sorted(missing))} along paths they do not cut"
        )
    apart = torn(graph.flow, given, included)
    if apart:
        raise PartitionError(
            f"the tensors {', '.join(apart)} share memory that is overwritten later through another of its names; "
            "given apart from each other they do not determine the output. Use the tensors of one of the graph's points"
        )
    feeds = [
        Feed(v.step, v.path, v.restore or graph.layouts.get(v.name), overwrites(graph.flow, included, v)) for v in given
    ]
    return Segment(graph.steps, graph.calls, included, feeds, picks, graph.model)
