"""From a model to its steps, by the first way that works.

torch.fx is tried first, then torch.export, then torch.fx with the modules it cannot follow kept whole.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.adapters import Adapter, adapter_for
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.capture_export import Guard, capture_export
from torchsurgeon.tracing.capture_fx import UnfollowedError, capture_fx
from torchsurgeon.tracing.step import Step


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model's steps and how they were found.

    Attributes:
        steps: the program, inputs first and output last.
        traced_by: ``"fx"``, ``"export"`` or ``"hierarchical"`` (fx around modules that it cannot follow).
        opaque: by path, each module that stays one layer, and why.
        guard: raises ``TypeError`` for input tensors whose sizes would take another path through the model's source;
            None where sizes decide nothing.
    """

    steps: list[Step]
    traced_by: str
    opaque: Mapping[str, str]
    guard: Guard | None = None


def capture(
    model: nn.Module, call: Call, tensors: Sequence[torch.Tensor], leaf_modules: Collection[str | type[nn.Module]] = ()
) -> Captured:
    """Find the model's steps.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        tensors: the example's tensors, in the order of ``call.names``.
        leaf_modules: modules to keep whole, by path or class. Only torch.fx can do that, so with any of these
            torch.export is not tried.

    Raises:
        TraceError: none of the ways can follow the model; the message names the line and what to try.
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
    # Each round keeps one more module whole: the innermost one that torch.fx failed in.
    while unfollowed.module_path and unfollowed.module_path not in opaque:
        opaque[unfollowed.module_path] = unfollowed.line
        try:
            steps, whole = capture_fx(model, call, opaque, adapter.forward)
            return Captured(steps, "hierarchical", whole)
        except UnfollowedError as error:
            unfollowed = error
    raise TraceError(f"{unfollowed}\n{reason}".rstrip()) from unfollowed


def _applies(adapter: Adapter, call: Call, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the adapter can stand in for the model's forward in this call."""
    if adapter.applies is None:
        return True
    args, kwargs = call.rebuild(dict(zip(call.paths, tensors, strict=True)))
    return adapter.applies(*args, **kwargs)


def _chosen(model: nn.Module, leaf_modules: Collection[str | type[nn.Module]]) -> dict[str, str]:
    """Return the paths of the modules that the caller wants whole, with the reason that the user reads."""
    modules = dict(model.named_modules())
    if isinstance(leaf_modules, (str, type)):
        raise TraceError(f"leaf_modules must be a list; write leaf_modules=[{short(leaf_modules)}]")
    for leaf in leaf_modules:
        if not isinstance(leaf, (str, type)):
            raise TraceError(f"leaf_modules takes names and classes of modules; got {short(leaf)}")
        if isinstance(leaf, str) and leaf not in modules:
            near = difflib.get_close_matches(leaf[:200], modules, n=3)
            hint = f"near it: {', '.join(near)}" if near else "model.named_modules() lists them"
            raise TraceError(
                f"leaf_modules names {short(leaf)}, which is not a module of {type(model).__name__}; {hint}"
            )
    types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
    named = {path for path, module in modules.items() if path in leaf_modules or (types and isinstance(module, types))}
    return dict.fromkeys(sorted(named), "leaf_modules asks for it")
