"""Record a model: on tensors without elements, or with them where it must be; again where a call leaves something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.adapters import Adapter
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.guards import Guards
from torchsurgeon.tracing.recorder import Recorder
from torchsurgeon.tracing.shapes import MetaModel, RealModel, Shapes, propagate, tensors_in
from torchsurgeon.tracing.state import State
from torchsurgeon.tracing.step import Constant, Step
from torchsurgeon.tracing.unfollowed import NeedsDevice, NeedsElements, keeps_state


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
    """

    def __init__(
        self, steps: list[Step], shapes: Shapes, source: MetaModel, whole: Mapping[str, str], guards: Guards
    ) -> None:
        self.steps, self.shapes, self.source, self.whole, self.guards = steps, shapes, source, whole, guards
        self.only_settings = False


def record(
    model: nn.Module,
    call: Call,
    tensors: Sequence[torch.Tensor],
    whole: Mapping[str, str],
    adapter: Adapter | None,
    state: State,
) -> Recording:
    """Record a model.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        tensors: the example's tensors, in the order of ``call.names``.
        whole: by path, the modules to keep as one layer each, and why.
        adapter: what is recorded in place of the model's own ``forward``; None for the model itself.
        state: what the model holds now, and is made to hold again.

    Raises:
        UnfollowedError: something the model does leaves no trace.
    """
    try:
        return _recorded(model, call, tensors, whole, adapter, MetaModel(model), state)
    except NeedsElements as needed:
        recording = _recorded(model, call, tensors, whole, adapter, RealModel(model), state)
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


def _recorded(
    model: nn.Module,
    call: Call,
    tensors: Sequence[torch.Tensor],
    whole: Mapping[str, str],
    adapter: Adapter | None,
    source: MetaModel,
    before: State,
) -> Recording:
    try:
        first = Recorder(model, call, whole, adapter, source)
        first.run(tensors)
        changed = before.changed()
        if changed:
            # What the model left behind is there in the next call. If that does the same, it reads none of it.
            second = Recorder(model, call, whole, adapter, source, earlier=first)
            second.run(tensors)
            if not _alike(first.steps, second.steps):
                # A cache that was filled may be read instead of being computed again, but always the same one.
                third = Recorder(model, call, whole, adapter, source, earlier=second)
                third.run(tensors)
                if not second.read_cache or not _alike(second.steps, third.steps):
                    raise TraceError(keeps_state(model, changed))
        return Recording(first.steps, first.propagation.shapes, source, first.whole, first.guards)
    finally:
        before.restore()


def _alike(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    """Return whether two programs are the same."""

    def same(a: Step, b: Step) -> bool:
        if isinstance(a.target, Constant) and isinstance(b.target, Constant):
            x, y = a.target.tensor, b.target.tensor
            known = x.shape == y.shape and x.dtype == y.dtype and x.device.type != "meta" != y.device.type
            return x is y or (known and torch.equal(x, y))
        if a.kind == "output":
            return bool(a.args == b.args and a.target.paths == b.target.paths)
        targets = a.target is b.target or a.target == b.target or a.target.__class__ is b.target.__class__
        return (a.name, a.kind, repr(a.args), repr(a.kwargs)) == (
            b.name,
            b.kind,
            repr(b.args),
            repr(b.kwargs),
        ) and targets

    return len(steps) == len(others) and all(map(same, steps, others))
