"""A part of a model that a backend runs, and eager PyTorch where the backend does not."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends.backend import Backend, Run
from torchsurgeon.backends.exporting import in_turn
from torchsurgeon.backends.leading import Leading, note_refusal, refused
from torchsurgeon.backends.part import Part
from torchsurgeon.errors import BackendError, BackendWarning, short
from torchsurgeon.models.watching import WatchedWeights
from torchsurgeon.tracing.reading import plain_tensors

# Of so many kinds of calls it is remembered that they are taken.
_MOST_KINDS = 64


class BuiltPart:
    """A part that runs by a backend once ``build()`` was called, and in eager PyTorch before that.

    It also runs in eager PyTorch for calls that what was built does not take: other shapes, other numbers, NaN, and any
    call after the weights have changed. So no call waits for a compiler without having asked for it. Thread-safe.

    Args:
        part: the part.
        backend: what runs it.
        said: the reasons of which the user has been told, for all parts of one model together; None to tell none.
        watch: returns the model's weights, which somebody compares with their bytes from then on. By default only the
            writes that PyTorch counts are noticed.

    Attributes:
        tried: whether building was tried.
        reason: why the backend does not run it; None if it does, or has not been tried.
        rest: the layer from which on eager PyTorch runs it, since the backend refuses that layer; None where it runs
            all or nothing.
        free_batch: whether what was built takes any batch size.
        outdated: whether a call has found that the weights have changed since, so that eager PyTorch runs it.
    """

    def __init__(
        self,
        part: Part,
        backend: Backend,
        said: set[str] | None,
        watch: Callable[[], WatchedWeights] | None = None,
    ) -> None:
        self.part, self.backend, self._watch = part, backend, watch
        self.tried = self.free_batch = self.outdated = False
        self.reason: str | None = None
        self.rest: str | None = None
        self._said = said
        self._run: Run | None = None
        self._example: Sequence[Tensor] = ()
        # Shapes, dtypes and places of calls that the backend takes.
        self._taken: set[Any] = set()
        self._weights: WatchedWeights | None = None
        self._building = threading.Lock()

    def build(self, *tensors: Tensor) -> None:
        """Build it for tensors like these, once, which takes seconds to minutes, and compare it with eager PyTorch.

        If the backend does not take it, or its answers deviate, a ``BackendWarning`` says why. What the model itself
        raises for these tensors is raised.
        """
        # In this order, since a thread that traces a model in which another split stands builds while it traces.
        with in_turn(self.part.graph, tensors), self._building:
            if self.tried:
                return
            said = None
            if self.part.segment.steps:
                try:
                    refused = self._try(tensors)
                    if refused is not None:
                        said = (
                            f"backend {self.backend.name!r} runs a part of the model up to the layer that it does not "
                            f"take, and eager PyTorch the rest: {refused}"
                        )
                except BackendError as error:
                    self.reason = str(error)
                    said = (
                        f"backend {self.backend.name!r} does not run a part of the model, which runs in eager PyTorch: "
                        f"{self.reason}"
                    )
            self.tried = True
        if said is not None and self._said is not None and said not in self._said:
            self._said.add(said)
            warnings.warn(said, BackendWarning, stacklevel=2)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        run = self._run
        if run is not None and self.takes(tensors):
            return run(*(self.part.computed(tensors) if self.part.numbers else tensors))
        return self.part.segment(*tensors)  # type: ignore[no-any-return]

    def _try(self, tensors: Sequence[Tensor]) -> BackendError | None:
        """Build it, all of it or up to a layer that the backend refuses; return the refusal, or None.

        Raises:
            BackendError: the backend takes nothing of it, or its answers deviate.
        """
        part, backend = self.part, self.backend
        # What is judged on a sample takes calls like these.
        tensors = tensors if backend.judge is None else backend.judge.example(part)
        tensors = [tensor.detach().clone() for tensor in tensors]
        # Before the weights are read, so that a write during the build is noticed.
        weights = self._watched() if backend.copies_weights else None
        expected = part.segment(*tensors)
        own = {part.graph.steps[step].name for step in part.segment.steps}
        known = {layer: why for layer, why in refused(part.graph, backend).items() if layer in own}
        leading, refusal = Leading.of(part, list(known)), None
        while True:
            if leading is None:
                raise refusal or BackendError(next(iter(known.values())))
            try:
                run = self._built(leading, tensors, expected)
                break
            except BackendError as error:
                note_refusal(part.graph, backend, error)
                refusal = refusal or error
                leading = leading.before(error.layer)
        if backend.judge is not None:
            backend.judge.judge(part, run, tensors)
        self.rest = leading.layer
        self._example, self._weights, self._run = tensors, weights, run
        return refusal or (None if leading.layer is None else BackendError(known[leading.layer], leading.layer))

    def _watched(self) -> WatchedWeights:
        part, graph = self.part, self.part.graph
        if not part.own:
            # A student's layers are not the model's.
            return WatchedWeights(part.segment)
        if self._watch is not None:
            return self._watch()
        # Of the whole model, since a part keeps what it was cut with: a parameter that is replaced stays in the part.
        return WatchedWeights(graph.model, plain_tensors(graph.model, graph.reading).values())

    def _built(self, leading: Leading, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> Run:
        """Return what runs the part: for any batch, where that is possible, or else for these shapes."""
        part, backend = self.part, self.backend
        if part.batch_free and backend.free_batch and any(any(spec.batch_step) for spec in part.inputs):
            # Exporters take a batch of one for a size that is always one, so they are given another.
            try:
                more = part.with_another_sample(tensors)
                run = leading.build(backend, more, free_batch=True)
                check(part, backend, run, more, part.segment(*more))
                check(part, backend, run, tensors, expected)
                self.free_batch = True
                return run
            except Exception as error:
                if by_signal_handler(error):
                    raise
        try:
            run = leading.build(backend, tensors, free_batch=False)
            check(part, backend, run, tensors, expected)
        except BackendError:
            raise
        except Exception as error:
            if by_signal_handler(error):
                raise
            raise BackendError(f"{type(error).__name__}: {first_line(error)}") from error
        return run

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the backend runs a call with these tensors, once it has built the part."""
        if self._run is None:
            return False
        if self._weights is not None and not self._weights.same(quickly=True):
            self.outdated = True
            return False
        kinds = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if kinds not in self._taken:
            if not self._fits(tensors):
                return False
            if len(self._taken) < _MOST_KINDS:
                self._taken.add(kinds)
        if not self.backend.keeps_nan and any(map(_holds_nan, tensors)):
            return False
        return all(torch.equal(tensors[i], self._example[i]) for i in self.part.numbers)

    def _fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether what was built takes tensors of these shapes and dtypes, at these places."""
        batch: int | None = None
        for i, (spec, example, tensor) in enumerate(zip(self.part.inputs, self._example, tensors, strict=True)):
            if tensor.dtype != example.dtype or tensor.device != example.device:
                return False
            if i in self.part.numbers or (
                tensor.shape == example.shape and not (self.free_batch and any(spec.batch_step))
            ):
                continue
            if not self.free_batch or tensor.dim() != example.dim():
                return False
            if batch is None:
                dim = next((dim for dim, step in enumerate(spec.batch_step) if step), None)
                if dim is None:
                    return False
                batch = spec.example_batch + (tensor.shape[dim] - spec.shape[dim]) // spec.batch_step[dim]
            if batch < 1 or tuple(tensor.shape) != spec.at_batch(batch):
                return False
        return True


def _holds_nan(tensor: Tensor) -> bool:
    """Return whether a tensor holds NaN; now and then also where it holds both infinities."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    total = tensor.detach().sum()
    return bool((total != total).item())


def check(part: Part, backend: Backend, run: Run, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Run what was built and compare it with eager PyTorch; shapes and dtypes only where a budget decides.

    Raises:
        BackendError: a result deviates by more than the backend's tolerance.
    """
    for spec, found, wanted in zip(part.outputs, run(*part.computed(tensors)), expected, strict=True):
        if backend.judge is not None and (found.dtype, found.shape) == (wanted.dtype, wanted.shape):
            continue
        far = deviation(found, wanted)
        if not far <= backend.tolerance:
            raise BackendError(
                f"its tensor {short(spec.name, 100)} deviates from eager PyTorch by {far:.1e} of the largest value; "
                f"{backend.tolerance:.0e} is allowed"
            )


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Return how far one tensor is from another, as a share of the largest finite magnitude in ``wanted``.

    It is infinite where shapes, dtypes, whole numbers, truth values or non-finite elements differ.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if not wanted.numel() or torch.equal(found, wanted):
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float("inf")
    found, wanted = found.to(wanted.device), wanted.detach()
    finite = torch.isfinite(wanted)
    same = torch.isfinite(found) == finite
    if not bool(same.all()) or not torch.equal(found[~finite].nan_to_num(), wanted[~finite].nan_to_num()):
        return float("inf")
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    there = wanted[finite].to(wide)
    scale = float(there.abs().max()) if there.numel() else 0.0
    far = float((found[finite].to(wide) - there).abs().max()) if there.numel() else 0.0
    return far / scale if scale else far


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
