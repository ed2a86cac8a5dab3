"""Record a model: on tensors without elements, or with them where it must be; again where a call leaves something."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.adapters import Adapter
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.guards import Guards
from torchsurgeon.tracing.program import NOTHING, Assumed
from torchsurgeon.tracing.python_numbers import tables_of
from torchsurgeon.tracing.recorder import Recorder
from torchsurgeon.tracing.results import Settled
from torchsurgeon.tracing.shape_rules import META
from torchsurgeon.tracing.shapes import MetaModel, RealModel, Shapes, propagate, tensors_in
from torchsurgeon.tracing.state import State
from torchsurgeon.tracing.step import Constant, Ref, Step, map_refs
from torchsurgeon.tracing.unfollowed import NeedsDevice, NeedsElements, UnfollowedError, keeps_state

_NOBODYS_BATCH = 113


@dataclasses.dataclass
class Recording:
    """A model's steps, and what was found out while it was recorded.

    Attributes:
        steps: the program, inputs first and output last.
        shapes: what every step gave for the example.
        source: the model that gave it: with meta tensors, or the real one.
        whole: by path, the modules that stayed one layer each, and why.
        guards: what the model's path depends on, besides values.
        only_settings: whether the real model was needed only for autocast, which does not act on meta tensors, so that
            no shape depends on values.
        settled: what the first call changed for good; see ``Left.settled``.
    """

    steps: list[Step]
    shapes: Shapes
    source: MetaModel
    whole: Mapping[str, str]
    guards: Guards
    only_settings: bool = False
    settled: Settled = dataclasses.field(default_factory=dict)


def record(
    model: nn.Module,
    call: Call,
    tensors: Sequence[torch.Tensor],
    whole: Mapping[str, str],
    adapter: Adapter | None,
    state: State,
    assumed: Assumed = NOTHING,
) -> Recording:
    """Record a model.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        tensors: the example's tensors, in the order of ``call.names``.
        whole: by path, the modules to keep as one layer each, and why.
        adapter: what is recorded in place of the model's own ``forward``; None for the model itself.
        state: what the model holds now, and is made to hold again.
        assumed: what is taken for granted, so that values decide nothing.

    Raises:
        UnfollowedError: something the model does leaves no trace.
    """

    tables = tables_of(state.functions, {kind: None for module in model.modules() for kind in type(module).__mro__})

    def begun(source: MetaModel, earlier: Recorder | None = None) -> Recorder:
        made = Recorder(model, call, whole, adapter, source, earlier, tables, assumed)
        recorders.append(made)
        return made

    recorders: list[Recorder] = []
    try:
        return _with_elements_where_needed(begun, model, tensors, state)
    except UnfollowedError as error:
        error.asks_whether_compiling = any(made.asked_whether_compiling for made in recorders)
        raise


def _with_elements_where_needed(
    begun: Callable[..., Recorder], model: nn.Module, tensors: Sequence[torch.Tensor], state: State
) -> Recording:

    try:
        return _recorded(functools.partial(begun, MetaModel(model)), tensors, state)
    except NeedsElements as needed:
        recording = _recorded(functools.partial(begun, RealModel(model)), tensors, state)
        recording.only_settings = isinstance(needed, NeedsDevice) and _runs_on_meta(recording, tensors, model)
        return recording


def _runs_on_meta(recording: Recording, tensors: Sequence[torch.Tensor], model: nn.Module) -> bool:
    try:
        shapes = propagate(recording.steps, tensors, MetaModel(model), count_flops=False)
    except Exception:
        return False
    return all(
        [t.shape for t in tensors_in(a)] == [t.shape for t in tensors_in(b)]
        for a, b in zip(shapes.values, recording.shapes.values, strict=True)
    )


def _recorded(begun: Callable[..., Recorder], tensors: Sequence[torch.Tensor], state: State) -> Recording:
    """Record a model, and see whether its calls depend on earlier ones.

    Args:
        begun: makes a recorder, which is told of the one before.
        tensors: the example's tensors.
        state: what the model holds now, and is made to hold again.
    """
    try:
        first = _of_many_sizes(begun, tensors, state)
        first.left = changed = state.changed()
        settling = state.settling() if changed else {}
        if changed:
            # What the model left behind is there in the next call. If that does the same, it reads none of it.
            second = begun(earlier=first)
            second.run(tensors)
            second.left = changed
            now = state.settling()
            settling = {place: _if_still(pair, now.get(place)) for place, pair in settling.items()}
            if not _alike(first, second):
                # A cache that was filled may be read instead of being computed again, but always the same one.
                third = begun(earlier=second)
                third.run(tensors)
                if not second.read_cache or not _alike(second, third):
                    raise TraceError(keeps_state(first.model, changed))
        return Recording(
            first.steps, first.propagation.shapes, first.source, first.whole, first.guards, settled=settling
        )
    finally:
        state.restore()


def _if_still(one: tuple[Any, Any] | None, other: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
    """Return what was before and after a call, if it is the same after the next one; None otherwise."""
    same = one is not None and other is not None and type(one[1]) is type(other[1]) and one[1] == other[1]
    return one if same else None


def _of_many_sizes(begun: Callable[..., Recorder], tensors: Sequence[torch.Tensor], state: State) -> Recorder:
    """Return a recording that holds for as many sizes as can be.

    A model that has run may remember for which sizes it did, and compute something anew for others (the anchors of a
    detector). A recording of the sizes that it remembers would hold for these alone. So where another batch would take
    another path, the model is first made to remember a batch that nobody has.
    """
    first = begun()
    first.run(tensors)
    if first.real or not any(t.dim() for t in tensors) or _holds(first, tensors):
        return first
    state.restore()
    odd = begun()
    # A model that does not take such a batch is recorded as it was.
    with contextlib.suppress(Exception):
        odd.run([_with_batch(t, _NOBODYS_BATCH) for t in tensors])
        odd.left = state.changed()
        if odd.left:
            again = begun(earlier=odd)
            again.run(tensors)
            if not again.read_cache and _holds(again, tensors):
                return again
    # What it left must be what the recording that is used left.
    state.restore()
    first = begun()
    first.run(tensors)
    return first


def _with_batch(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.empty((batch, *tensor.shape[1:]) if tensor.dim() else (), dtype=tensor.dtype, device=META)


def _holds(recorder: Recorder, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a batch of one sample more takes the recorded path."""
    try:
        recorder.guards.check(recorder.source, [_with_batch(t, len(t) + 1 if t.dim() else 0) for t in tensors])
    except TypeError:
        return False
    return True


def _alike(one: Recorder, other: Recorder) -> bool:
    """Return whether two recordings compute the same."""
    mine, others = _computing(one), _computing(other)
    return len(mine) == len(others) and all(map(_same_step, mine, others))


def _computing(recorder: Recorder) -> list[Step]:
    """Return the steps that the output depends on, numbered anew; what only decided the path is left out."""
    overwrites = recorder.propagation.shapes.overwrites
    needed = {step.index for step in recorder.steps if step.kind in ("input", "output") or overwrites[step.index]}
    for step in reversed(recorder.steps):
        if step.index in needed:
            needed.update(step.uses())
    place = {index: i for i, index in enumerate(sorted(needed))}

    def renumbered(ref: Ref) -> Ref:
        return Ref(place[ref.step])

    return [
        dataclasses.replace(
            step,
            args=map_refs(renumbered, step.args),
            kwargs=map_refs(renumbered, step.kwargs),
            index=place[step.index],
        )
        for step in recorder.steps
        if step.index in needed
    ]


def _same_step(one: Step, other: Step) -> bool:
    if isinstance(one.target, Constant) and isinstance(other.target, Constant):
        x, y = one.target.tensor, other.target.tensor
        known = x.shape == y.shape and x.dtype == y.dtype and x.device.type != "meta" != y.device.type
        return x is y or (known and torch.equal(x, y))
    if one.kind == "output":
        return bool(one.args == other.args and one.target.paths == other.target.paths)
    same = one.target is other.target or one.target == other.target or one.target.__class__ is other.target.__class__
    return same and (one.kind, one.module_path, repr(one.args), repr(one.kwargs)) == (
        other.kind,
        other.module_path,
        repr(other.args),
        repr(other.kwargs),
    )
