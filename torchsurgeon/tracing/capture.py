"""From a model to its steps, by each way that works, one after the other.

A model is recorded first, then followed by torch.export, then recorded with the modules kept whole that cannot be
followed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.adapters import Adapter, adapter_for
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.capture_export import Guard, capture_export
from torchsurgeon.tracing.gradients import asked_in
from torchsurgeon.tracing.program import NOTHING, Assumed
from torchsurgeon.tracing.questions import asked_of_inputs
from torchsurgeon.tracing.recording import Recording, record
from torchsurgeon.tracing.replaced import has_another_forward
from torchsurgeon.tracing.results import Settled
from torchsurgeon.tracing.shapes import MetaModel, RealModel, Shapes
from torchsurgeon.tracing.state import State, functions_of
from torchsurgeon.tracing.step import Step
from torchsurgeon.tracing.unfollowed import UnfollowedError

_MOST_WHOLE = 50


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model's steps and how they were found.

    Attributes:
        steps: the program, inputs first and output last.
        traced_by: ``"recorded"``, ``"export"`` or ``"hierarchical"`` (recorded, with modules kept whole that cannot be
            followed).
        opaque: by path, each module that stays one layer, and why.
        guard: raises ``TypeError`` for input tensors whose sizes would take another path through the model's source;
            None where sizes decide nothing.
        shapes: what the steps give for the example, where that is known already.
        source: the model that gave it.
        values_decide: whether shapes depend on values.
        stored: the names of the model's own tensors whose elements its path depends on.
        constants: other tensors whose elements it depends on.
        formed: the names of the model's own tensors whose dtype or sizes its code reads.
        asked: what it asks of its caller's gradient mode; see ``gradients``.
        asked_of_inputs: what it may ask of its input tensors; see ``questions``.
        check_values: raises ``TypeError`` for input tensors whose values would take another path; None where values
            decide nothing.
        settled: what its first call changes for good; see ``Left.settled``.
        as_compiled: whether the model was told that it is compiled or exported.
    """

    steps: list[Step]
    traced_by: str
    opaque: Mapping[str, str]
    guard: Guard | None = None
    shapes: Shapes | None = None
    source: MetaModel | None = None
    values_decide: bool = False
    stored: frozenset[str] = frozenset()
    constants: tuple[torch.Tensor, ...] = ()
    formed: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()
    asked_of_inputs: frozenset[str] = frozenset()
    check_values: Guard | None = None
    settled: Settled = dataclasses.field(default_factory=dict)
    as_compiled: bool = False


class Ways:
    """The ways to capture a model, in the order in which they are tried.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        tensors: the example's tensors, in the order of ``call.names``.
        leaf_modules: modules to keep whole, by path or class. torch.export cannot do that, so with any of these it is
            not tried.
        state: what the model holds now, and is made to hold again after each attempt.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        tensors: Sequence[torch.Tensor],
        leaf_modules: Collection[str | type[nn.Module]],
        state: State,
    ) -> None:
        self._model, self._call, self._tensors, self._state = model, call, tensors, state
        adapter = None if has_another_forward(model) else adapter_for(model)
        self._adapter = adapter if adapter is not None and _applies(adapter, call, tensors) else None
        self._whole = {**(self._adapter.whole if self._adapter else {}), **_chosen(model, leaf_modules)}
        self._export = not leaf_modules
        self._unfollowed: UnfollowedError | None = None
        self.reasons: list[str] = []
        # Where a test was left out, and how many modules have been kept whole for that.
        self._left_out_in, self._tests_whole = "", 0

    def __iter__(self) -> Iterator[Captured]:
        asked = asked_of_inputs(self._state.functions)
        for captured in self._tried():
            yield dataclasses.replace(captured, asked_of_inputs=asked)

    def _tried(self) -> Iterator[Captured]:
        recorded = self._attempt("recorded")
        if recorded is not None:
            yield recorded
        if recorded is None and self._unfollowed is not None and self._unfollowed.asks_whether_compiling:
            # Models that test the values of a mask leave that out where they are compiled, and so here.
            yield from self._as_compiled()
        if self._export:
            try:
                steps, guard = capture_export(self._model, self._call, self._tensors)
            except TraceError as error:
                self._state.restore()
                self.reasons.append(str(error))
            else:
                self._state.restore()
                asked = asked_in(self._state.functions, whole=False)
                yield Captured(steps, "export", {}, guard, asked=asked, as_compiled=True)
        # Each round keeps one more module whole: the innermost one that could not be followed.
        for _ in range(_MOST_WHOLE):
            if self._unfollowed is None or not self._keep_whole(self._unfollowed.module_path, self._unfollowed.line):
                break
            recorded = self._attempt("hierarchical")
            if recorded is not None:
                yield recorded
        tested = self._attempt("recorded", Assumed(values=True)) if self._unfollowed is not None else None
        if tested is not None:
            yield tested

    def _as_compiled(self) -> Iterator[Captured]:
        """Record the model as it is where it is compiled, with modules kept whole that test more where they are not."""
        while True:
            self._left_out_in = ""
            compiled = self._attempt("hierarchical" if self._tests_whole else "recorded", Assumed(compiling=True))
            if compiled is None:
                return
            yield dataclasses.replace(compiled, as_compiled=True)
            if not self._keep_whole(self._left_out_in, self.reasons[-1]):
                return
            self._tests_whole += 1

    def failed(self, module_path: str, reason: str, *, leaves_out: bool = False) -> None:
        """Tell that what was captured last gives another answer than the model.

        Args:
            module_path: the module in which it first differs.
            reason: what differs.
            leaves_out: whether it leaves out a test that the module makes where it is not compiled.
        """
        self.reasons.append(reason)
        self._left_out_in = module_path if leaves_out else ""
        # Where the recorder could not follow the model, it knows that place; torch.export fails elsewhere.
        self._unfollowed = self._unfollowed or UnfollowedError(reason, module_path, reason)

    def _keep_whole(self, path: str, why: str) -> bool:
        if not path or path in self._whole or path not in dict(self._model.named_modules()):
            return False
        self._whole[path] = why
        return True

    def _attempt(self, traced_by: str, assumed: Assumed = NOTHING) -> Captured | None:
        try:
            found = record(self._model, self._call, self._tensors, self._whole, self._adapter, self._state, assumed)
        except UnfollowedError as error:
            if assumed is NOTHING:
                self._unfollowed = error
                self.reasons[:0] = [str(error)]
            return None
        if assumed is NOTHING:
            self._unfollowed = None
        # A function that was imported by its own name is only seen by that name.
        mode = asked_in(self._state.functions, whole=False) & {"is_inference_mode_enabled"}
        return _captured(found, traced_by, self._model, mode)


def _captured(found: Recording, traced_by: str, model: nn.Module, asked: frozenset[str]) -> Captured:
    guards = found.guards
    meta = MetaModel(model)

    def guard(tensors: Sequence[torch.Tensor]) -> None:
        guards.check(meta, tensors)

    def check_values(tensors: Sequence[torch.Tensor]) -> None:
        guards.check_values(model, tensors)

    return Captured(
        found.steps,
        traced_by,
        found.whole,
        guard if guards else None,
        found.shapes,
        found.source,
        isinstance(found.source, RealModel) and not found.only_settings,
        stored=frozenset(guards.stored),
        constants=tuple(guards.constants.values()),
        formed=frozenset(guards.formed),
        asked=asked | guards.asked | _asked_in_whole(found, model),
        check_values=check_values if guards.values else None,
        settled=found.settled,
    )


def _asked_in_whole(found: Recording, model: nn.Module) -> frozenset[str]:
    """Return what the modules that stay one layer each may ask of their caller's gradient mode."""
    modules = [module for path, module in model.named_modules() if path in found.whole]
    return frozenset().union(*(asked_in(functions_of(module), whole=True) for module in modules))


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
