"""Accuracy budgets: how much a lossy codec may change a model's answers, and whether a codec stays within that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.errors import CodecError, short


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits on what a lossy codec changes in a model's outputs, over all samples. None means no such limit.

    Args:
        max_top1_change: highest share of predictions that differ, from 0 to 1. A prediction is the index of the largest
            value along dimension 1 of the first output.
        min_cosine: lowest cosine similarity, from -1 to 1, of any sample's outputs with the model's own outputs.
        accept: a function of the model's own output and of the output behind the codec, both as the model returns them.
            It returns whether the sample is acceptable.
        min_accepted: lowest share of samples, from 0 to 1, that ``accept`` accepts.

    Raises:
        CodecError: no limit is given, or a limit is out of its range.
    """

    max_top1_change: float | None = None
    min_cosine: float | None = None
    accept: Callable[[Any, Any], object] | None = None
    min_accepted: float = 1.0

    def __post_init__(self) -> None:
        if self.max_top1_change is None and self.min_cosine is None and self.accept is None:
            raise CodecError("a budget needs a limit; give max_top1_change, min_cosine or accept")
        for name, low, high in (("max_top1_change", 0, 1), ("min_cosine", -1, 1), ("min_accepted", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise CodecError(f"{name} must be from {low} to {high}; got {value}")

    def __str__(self) -> str:
        parts = []
        if self.max_top1_change is not None:
            parts.append(f"at most {self.max_top1_change:.2%} of predictions change")
        if self.min_cosine is not None:
            parts.append(f"cosine similarity at least {self.min_cosine:g}")
        if self.accept is not None:
            parts.append(f"{getattr(self.accept, '__name__', 'a function')} accepts {self.min_accepted:.2%} of samples")
        return ", ".join(parts)


class Verdict:
    """Adds up what one codec at one point changes in the outputs of samples, and compares it with a budget.

    Args:
        budget: the limits.
        build: turns output tensors by name into the output as the model returns it, for the budget's ``accept``.
    """

    def __init__(self, budget: Budget, build: Callable[[Mapping[str, Tensor]], Any]) -> None:
        self._budget, self._build = budget, build
        self._changed = self._predictions = self._samples = self._accepted = 0
        self._cosine = 1.0

    def add(self, reference: Mapping[str, Tensor], output: Mapping[str, Tensor]) -> None:
        """Add one sample.

        Args:
            reference: the model's own output tensors by name.
            output: the output tensors behind the codec.

        Raises:
            CodecError: predictions are to be compared, but the first output is a single number, or complex.
        """
        self._samples += 1
        first = next(iter(reference))
        if self._budget.max_top1_change is not None:
            changed = _top1(reference[first], first) != _top1(output[first], first)
            self._changed += int(changed.sum())
            self._predictions += changed.numel()
        if self._budget.min_cosine is not None:
            self._cosine = min(self._cosine, likeness(list(reference.values()), list(output.values())))
        if self._budget.accept is not None:
            self._accepted += bool(self._budget.accept(self._build(reference), self._build(output)))

    @property
    def top1_change(self) -> float | None:
        """The share of predictions that differ; None where the budget does not limit it."""
        return None if self._budget.max_top1_change is None else self._changed / max(1, self._predictions)

    @property
    def cosine(self) -> float | None:
        """The lowest cosine similarity of any sample's outputs; None where the budget does not limit it."""
        return None if self._budget.min_cosine is None else self._cosine

    @property
    def accepted(self) -> float | None:
        """The share of samples that the budget's function accepted; None where it has none."""
        return None if self._budget.accept is None else self._accepted / max(1, self._samples)

    @property
    def kept(self) -> bool:
        """Whether all limits of the budget are met."""
        budget = self._budget
        return (
            (budget.max_top1_change is None or (self.top1_change or 0.0) <= budget.max_top1_change)
            and (budget.min_cosine is None or self._cosine >= budget.min_cosine)
            and (budget.accept is None or (self.accepted or 0.0) >= budget.min_accepted)
        )


def likeness(ones: list[Tensor], others: list[Tensor]) -> float:
    """Return the cosine similarity of two lists of tensors, each taken as one vector.

    It is 1 for equal lists, whatever they hold, and 0 where it is not defined, because one is all zeros or not finite.
    """
    vectors = [(as_real_numbers(one), as_real_numbers(other)) for one, other in zip(ones, others, strict=True)]
    if all(torch.equal(a, b) for a, b in vectors):
        return 1.0
    dot = norm = other_norm = 0.0
    for a, b in vectors:
        dot, norm, other_norm = dot + float(a @ b), norm + float(a @ a), other_norm + float(b @ b)
    length = (norm * other_norm) ** 0.5
    cosine = dot / length if length else 0.0
    return max(-1.0, min(1.0, cosine)) if abs(cosine) < float("inf") else 0.0


def as_real_numbers(tensor: Tensor) -> Tensor:
    """Return a tensor's values as a vector of ``float64``; a complex value is two of them."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.double().flatten()


def _top1(output: Tensor, name: str) -> Tensor:
    if not output.dim() or output.is_complex():
        what = "complex" if output.is_complex() else "one number"
        raise CodecError(
            f"max_top1_change needs an output with classes; output {short(name)} is {what}. Give min_cosine or accept "
            "in its place"
        )
    return output.argmax(1 if output.dim() > 1 else 0)
