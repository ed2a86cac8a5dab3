"""From a model to its steps, by whichever way works: torch.fx, then torch.export, then torch.fx around what it cannot
follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.adapters import Adapter, adapter_for
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.capture_export import Guard, capture_export
from torchsurgeon.tracing.capture_fx import UnfollowedError, capture_fx
from torchsurgeon.tracing.step import Step


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model's steps, inputs first and output last, and how they were found.

    ``traced_by`` is ``"fx"``, ``"export"`` or ``"hierarchical"``; ``opaque`` says of each module that stays one layer,
    by path, why; ``guard`` raises ``TypeError`` for input tensors whose sizes would take another path through the
    model.
    """

    steps: list[Step]
    traced_by: str
    opaque: Mapping[str, str]
    guard: Guard | None = None


def capture(
    model: nn.Module, call: Call, tensors: Sequence[torch.Tensor], leaf_modules: Collection[str | type[nn.Module]] = ()
) -> Captured:
    """Return the model's steps. ``tensors`` are the example's.

    ``leaf_modules`` (paths or classes) stay whole, which needs torch.fx. Raises
    :class:`~torchsurgeon.errors.TraceError` naming the line that cannot be followed, and what to try.
    """
    adapter = adapter_for(model)
    if adapter is None or not _applies(adapter, call, tensors):
        adapter = Adapter(type(model).forward)
    opaque = {**adapter.whole, **_chosen(model, leaf_modules)}
    try:
        steps, whole = capture_fx(model, call, opaque, adapter.forward)
        return Captured(steps, "fx", whole)
    except UnfollowedError as error:
        unfollowed = error
    reason = ""
    if not leaf_modules:
        try:
            steps, guard = capture_export(model, call, tensors)
            return Captured(steps, "export", {}, guard)
        except TraceError as error:
            reason = str(error)
    while unfollowed.module_path and unfollowed.module_path not in opaque:
        opaque[unfollowed.module_path] = unfollowed.line
        try:
            steps, whole = capture_fx(model, call, opaque, adapter.forward)
            return Captured(steps, "hierarchical", whole)
        except UnfollowedError as error:
            unfollowed = error
    raise TraceError(f"{unfollowed}\n{reason}".rstrip()) from unfollowed


def _applies(adapter: Adapter, call: Call, tensors: Sequence[torch.Tensor]) -> bool:
    if adapter.applies is None:
        return True
    args, kwargs = call.rebuild(dict(zip(call.paths, tensors, strict=True)))
    return adapter.applies(*args, **kwargs)


def _chosen(model: nn.Module, leaf_modules: Collection[str | type[nn.Module]]) -> dict[str, str]:
    """Paths of the modules the caller wants whole. Raises TraceError for a name the model does not have."""
    modules = dict(model.named_modules())
    for leaf in leaf_modules:
        if isinstance(leaf, str) and leaf not in modules:
            raise TraceError(f"leaf_modules names {leaf!r}, which is not a module of {type(model).__name__}")
    types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
    named = {path for path, module in modules.items() if path in leaf_modules or (types and isinstance(module, types))}
    return dict.fromkeys(sorted(named), "leaf_modules asks for it")
