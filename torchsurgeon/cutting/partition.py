"""Cut a traced model into the part that runs on the device and the part that runs on the server.

A cut is fully determined by the tensors that cross: the head computes them from the model's inputs, the tail computes
the model's output from them. So one function makes both, and the names of the tensors in a request tell a server which
tail to run.
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
from torchsurgeon.errors import PartitionError, short
from torchsurgeon.tracing.flow import Value
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.shape_rules import META
from torchsurgeon.tracing.shapes import MetaModel, dry_run
from torchsurgeon.tracing.specs import PartitionPoint


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model in two parts, which share its parameters.

    Attributes:
        point: where the model is cut.
        head: is called like the model and returns the boundary tensors as a tuple, in the order of ``point.tensors``.
        tail: takes those tensors and returns what the model returns.
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
        """Return the boundary tensors of a call of the model.

        Args:
            *args: the call's positional arguments.
            **kwargs: the call's keyword arguments.

        Raises:
            TypeError: the call is unlike the traced example.
        """
        return self.segment(*self._tensors(args, kwargs))  # type: ignore[no-any-return]


def cut(graph: LayerGraph, point: int | str | PartitionPoint) -> Partition:
    """Cut a traced model in two.

    Args:
        graph: the traced model, which is not changed and whose parameters are not copied.
        point: where to cut: the index of a partition point, the name of the last layer on the device, or the point
            itself.

    Returns:
        Two modules in eval mode. Run one after the other they give exactly the model's own answer, at any batch size
        that the model takes. Neither changes its inputs.

    Raises:
        PartitionError: the graph has no such point.
    """
    if not isinstance(graph, LayerGraph):
        raise PartitionError(
            f"cut takes a traced model; got {type(graph).__name__}; call cut(trace(model, example), point)"
        )
    place = graph.point(point)
    inputs = [graph.value(spec.name) for spec in graph.inputs]
    if place.index == len(graph.layers):
        picks = [Pick(ref.step) for ref in graph.steps[-1].args]
        return Partition(place, Head(graph, _segment(graph, inputs, picks, to_output=True)), EmptyTail(graph))
    picks = [Pick(value.step, value.path) for value in (graph.value(spec.name) for spec in place.tensors)]
    tail = tail_for(graph, [spec.name for spec in place.tensors])
    return Partition(place, Head(graph, _segment(graph, inputs, picks)), tail)


class EmptyTail(nn.Module):
    """The tail when all layers run on the device: it only puts output tensors into the model's own structure."""

    def __init__(self, graph: LayerGraph) -> None:
        super().__init__()
        self._build = graph.steps[-1].target.build

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Return the model's result from its tensors, in the order of ``graph.outputs``."""
        return self._build(*tensors)


def tail_for(graph: LayerGraph, names: Sequence[str], *, flat: bool = False) -> Segment:
    """Return the module that turns named tensors into the model's output.

    Args:
        graph: the traced model.
        names: the names of the tensors, in the order in which the module takes them.
        flat: whether the module returns a tuple of the output's tensors, in the order of ``graph.outputs``, and not
            the model's own structure.

    Raises:
        PartitionError: the graph has no tensor of one of the names, a name is given twice, or the tensors do not
            determine the output; the message lists what is wrong or missing.
    """
    picks = [Pick(ref.step) for ref in graph.steps[-1].args] if flat else None
    return _segment(graph, _given(graph, names), picks, to_output=True)


def with_inner(graph: LayerGraph, names: Sequence[str]) -> Segment:
    """Return the whole model as a module that also returns tensors inside it, before the output's tensors.

    Args:
        graph: the traced model.
        names: the names of the tensors.

    Raises:
        PartitionError: the graph has no tensor of one of the names, or a name is given twice.
    """
    inner = [Pick(value.step, value.path) for value in _given(graph, names)]
    outputs = [Pick(ref.step) for ref in graph.steps[-1].args]
    return _segment(graph, [graph.value(spec.name) for spec in graph.inputs], [*inner, *outputs])


def middle_for(graph: LayerGraph, names: Sequence[str], point: PartitionPoint) -> Segment:
    """Return the module that turns named tensors into the boundary tensors of a point, as a tuple.

    Args:
        graph: the traced model.
        names: the names of the tensors, in the order in which the module takes them.
        point: where the module ends.

    Raises:
        PartitionError: as ``tail_for()`` raises it, or the tensors lie beyond the point.
    """
    return between(graph, names, [spec.name for spec in point.tensors])


def between(graph: LayerGraph, names: Sequence[str], wanted: Sequence[str]) -> Segment:
    """Return the module that turns named tensors into other named tensors, as a tuple.

    Args:
        graph: the traced model.
        names: the names of the tensors, in the order in which the module takes them.
        wanted: the names of the tensors that it returns. Those that are given are passed on.

    Raises:
        PartitionError: as ``tail_for()`` raises it.
    """
    picks = [Pick(value.step, value.path) for value in map(graph.value, wanted)]
    return _segment(graph, _given(graph, names), picks)


def _given(graph: LayerGraph, names: Sequence[str]) -> list[Value]:
    """Return the values of these names; raise for a name that the graph does not have, or that stands twice."""
    if isinstance(names, str):
        raise PartitionError(f"names must be a sequence of tensor names; got the text {short(names)}; use a tuple")
    for name in names:
        if not isinstance(name, str):
            raise PartitionError(f"the name of a tensor must be a text; got {short(name)}")
        if name not in graph.values:
            # Names come from the network: comparing one of megabytes with all others would take minutes.
            near = difflib.get_close_matches(name[:200], graph.values, n=3, cutoff=0.4)
            hint = (
                f"; near it: {', '.join(near)}"
                if near
                else f"; the model's inputs are {', '.join(s.name for s in graph.inputs)}"
            )
            raise PartitionError(f"the graph has no tensor {short(name)}{hint}")
        if list(names).count(name) > 1:
            raise PartitionError(f"tensor {name!r} is given twice")
    return [graph.value(name) for name in names]


def _listed(names: Sequence[str], most: int = 10) -> str:
    """Return names as a message lists them; a client may have sent hundreds."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_shapes(graph: LayerGraph, tail: Segment, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Check that a tail runs on tensors of shapes other than the example's: images of another size, longer sequences.

    It is run on meta tensors, so nothing is computed. A failure that depends on the values of tensors is not found.

    Args:
        graph: the traced model.
        tail: one of its parts.
        names: the names of the tensors that the tail takes.
        tensors: the tensors, of which only shapes and dtypes matter.

    Raises:
        PartitionError: the model does not run on such tensors; the message holds PyTorch's reason.
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
        shapes = _listed([f"{name} {short(list(t.shape), 100)}" for name, t in zip(names, tensors, strict=True)])
        raise PartitionError(
            f"the model does not run on tensors of these shapes ({shapes}): {short(error)}; give shapes that it takes"
        ) from error


def _segment(
    graph: LayerGraph, given: Sequence[Value], picks: Sequence[Pick] | None, to_output: bool = False
) -> Segment:
    """Return the part of the model that turns ``given`` into ``picks``; into the whole output with ``to_output``."""
    wanted = None if picks is None or to_output else [(pick.step, pick.path) for pick in picks]
    included, missing = reach(graph.flow, given, wanted)
    if to_output and picks is not None:
        # The picks take the output's tensors themselves; the last step would only put them into the model's structure.
        included.remove(graph.steps[-1].index)
    if missing:
        raise PartitionError(
            f"the tensors {_listed([v.name for v in given]) or '(none)'} do not determine the output: it also depends "
            f"on the model's inputs {', '.join(sorted(missing))} along paths they do not cut"
        )
    apart = torn(graph.flow, given, included)
    if apart:
        raise PartitionError(
            f"the tensors {_listed(apart)} share memory that is overwritten later through another of its names; sent "
            "as separate tensors they do not determine the output. Use the tensors of one of the graph's points"
        )
    feeds = [
        Feed(v.step, v.path, v.restore or graph.layouts.get(v.name), overwrites(graph.flow, included, v)) for v in given
    ]
    return Segment(graph.steps, graph.calls, included, feeds, picks, graph.model)
