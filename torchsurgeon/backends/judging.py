"""Whether a part that a backend runs keeps an accuracy budget on a user's own sample."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.accuracy.budget import Budget, Verdict
from torchsurgeon.accuracy.sample import check_calls, halves, image_sample, inputs_of
from torchsurgeon.backends.part import Part
from torchsurgeon.errors import BackendError, short
from torchsurgeon.tracing.graph import LayerGraph

Sample = Sequence[Any] | str | Path
Calls = list[list[Tensor]]

# More calls hardly change the ranges of values that are found, and each costs a run of the part.
_CALIBRATING = 100


class Judge:
    """Calls of a user's own, which judge what a backend builds, and calibrate it where it has to be.

    Where a backend has to be calibrated, one half of the calls is for that and the other half judges, since what is
    calibrated on some calls does well on them.

    Args:
        sample: calls like the traced example (a tensor, a tuple of positional arguments or a dict of keyword arguments
            each), or a folder of images.
        budget: how much the answers may change.
        calibrates: whether the backend has to be calibrated.

    Raises:
        CodecError: the sample is no list of calls, and no folder.
    """

    def __init__(self, sample: Sample, budget: Budget, calibrates: bool) -> None:
        if not isinstance(sample, str | Path):
            check_calls(sample)
        self.budget = budget
        self._sample, self._calibrates = sample, calibrates
        self._known: weakref.WeakKeyDictionary[LayerGraph, tuple[Calls, Calls]] = weakref.WeakKeyDictionary()

    def check(self, graph: LayerGraph) -> None:
        """Check that the sample fits a model, and is large enough to show that the budget is kept.

        Raises:
            CodecError: it does not fit; ``SampleSizeError``: it is too small.
        """
        self._calls(graph)

    def calibrating(self, part: Part) -> Iterator[list[Tensor]]:
        """Yield a part's tensors in the calls that calibrate it, computed by eager PyTorch, numbers included."""
        return self._inputs(part, self._calls(part.graph)[0][:_CALIBRATING])

    def example(self, part: Part) -> list[Tensor]:
        """Return a part's tensors in one call of the sample."""
        return next(self._inputs(part, self._calls(part.graph)[1]))

    def judge(self, part: Part, run: Callable[..., Sequence[Tensor]], example: Sequence[Tensor]) -> None:
        """Compare the model's answers with those that it gives where a backend runs one of its parts.

        Args:
            part: the part. Eager PyTorch runs the rest of the model.
            run: the part as the backend has built it.
            example: the tensors that it was built for, whose numbers are fixed in it.

        Raises:
            BackendError: the budget is broken; the message says what was measured and what is allowed.
        """
        graph, calls = part.graph, self._calls(part.graph)[1]
        after = part.after()
        names = [spec.name for spec in graph.outputs]
        verdict = Verdict(self.budget, graph.unflatten_output, len(calls))

        def answer(outputs: Sequence[Tensor]) -> dict[str, Tensor]:
            return dict(zip(names, outputs if after is None else after(*outputs), strict=True))

        for tensors in self._inputs(part, calls):
            own = answer(part.segment(*tensors))
            # Calls with other numbers run in eager PyTorch.
            other = any(not torch.equal(tensors[i], example[i]) for i in part.numbers)
            verdict.add(own, own if other else answer(run(*part.computed(tensors))))
            if verdict.hopeless:
                break
        broken = [one for one in verdict.findings() if not one.kept]
        if broken:
            measured = ", ".join(f"{one.measure} {one}, limit {one.text(one.limit)}" for one in broken)
            ends = " and ".join(short(", ".join(spec.name for spec in end), 60) for end in (part.inputs, part.outputs))
            raise BackendError(
                f"between {ends} it changes more answers than the accuracy budget allows: {measured}, over "
                f"{broken[0].count} of the sample ({self.budget})"
            )

    def _inputs(self, part: Part, calls: Calls) -> Iterator[list[Tensor]]:
        before = part.before()
        for call in calls:
            yield list(before(*call))

    def _calls(self, graph: LayerGraph) -> tuple[Calls, Calls]:
        """Return the calls that calibrate, and those that judge."""
        known = self._known.get(graph)
        if known is None:
            sample = self._sample
            samples = image_sample(graph, sample) if isinstance(sample, str | Path) else sample
            setting_up, judging = halves(samples) if self._calibrates else ([], list(samples))
            self.budget.check_sample(len(judging), graph.batch, graph.outputs[0])
            device = next((tensor.device for tensor in graph.model.parameters()), torch.device("cpu"))
            known = inputs_of(graph, setting_up, device), inputs_of(graph, judging, device)
            if not all([known[1], known[0] or not self._calibrates]):
                raise BackendError(
                    f"{'two calls or more calibrate and judge' if self._calibrates else 'one call or more judges'} a "
                    f"backend; the sample has {len(samples)}; give more"
                )
            self._known[graph] = known
        return known
