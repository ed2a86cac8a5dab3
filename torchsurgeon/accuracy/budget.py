"""Accuracy budgets: how much a codec or a backend may change a model's answers, and whether a sample shows its extent.

A sample is some of all the calls that the model will get. So a budget holds for a codec when the *bound* of what was
measured keeps the limit, not only the measured value: with the budget's confidence, all calls together keep it, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from torchsurgeon.accuracy.bounds import LEAST_FOR_BOOTSTRAP, least_count, mean_bound, most_events, share_bound
from torchsurgeon.accuracy.finding import Finding
from torchsurgeon.accuracy.scores import likeness, predictions, several_predictions
from torchsurgeon.errors import CodecError, SampleSizeError, short

if TYPE_CHECKING:
    from torchsurgeon.tracing.specs import TensorSpec

_BY_ESTIMATE = "let these calls alone decide (decide by estimate)"
DecideBy = Literal["bound", "estimate"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits on what a lossy codec or a backend changes in a model's answers. None means no such limit.

    Args:
        max_top1_change: highest share of predictions that differ, from 0 to 1. A prediction is the index of the largest
            value along dimension 1 of the first output.
        min_cosine: lowest mean, from -1 to 1, of the cosine similarity of a call's outputs with the model's own.
        accept: a function of the model's own output and of the changed one, both as the model returns them. It
            returns whether the call is acceptable.
        min_accepted: lowest share of calls, from 0 to 1, that ``accept`` accepts.
        score: a function of the same two outputs that returns a number; the higher, the better. ``boxes_matched`` is
            one for detectors, ``pixels_kept`` one for segmentation.
        min_score: lowest mean of that number.
        confidence: how surely a bound holds, from 0.5 to below 1.
        decide_by: ``"bound"``: a limit is met when all calls meet it with this confidence, as far as the sample shows.
            Shares of calls have an exact bound (Clopper and Pearson's), means have one by the bootstrap.
            ``"estimate"``: a limit is met when the sample meets it. With a small sample that says little about others.

    Raises:
        CodecError: no limit is given, or a value is out of its range.
    """

    max_top1_change: float | None = None
    min_cosine: float | None = None
    accept: Callable[[Any, Any], object] | None = None
    min_accepted: float = 0.99
    score: Callable[[Any, Any], float] | None = None
    min_score: float | None = None
    confidence: float = 0.95
    decide_by: DecideBy = "bound"

    def __post_init__(self) -> None:
        if self.max_top1_change is None and self.min_cosine is None and self.accept is None and self.score is None:
            raise CodecError("a budget needs a limit; give max_top1_change, min_cosine, accept or score")
        ranges = ("max_top1_change", 0, 1), ("min_cosine", -1, 1), ("min_accepted", 0, 1), ("confidence", 0.5, 1)
        for name, low, high in ranges:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                percent = f"; {value:g} % is {value / 100:g}" if low == 0 and 1 < value <= 100 else ""
                raise CodecError(f"{name} must be from {low} to {high}; got {value}{percent}")
        if self.confidence == 1:
            raise CodecError("confidence must be below 1, because no sample shows anything for certain; 0.95 is usual")
        if (self.score is None) != (self.min_score is None) or (
            self.min_score is not None and not math.isfinite(self.min_score)
        ):
            raise CodecError(
                f"score and min_score must be given together, min_score as a finite number; got {short(self.score)} "
                f"and {self.min_score}"
            )
        if self.decide_by not in get_args(DecideBy):
            raise CodecError(f"decide_by must be one of {', '.join(get_args(DecideBy))}; got {short(self.decide_by)}")

    def __str__(self) -> str:
        parts = []
        if self.max_top1_change is not None:
            parts.append(f"at most {self.max_top1_change:.2%} of predictions change")
        if self.min_cosine is not None:
            parts.append(f"mean cosine similarity at least {self.min_cosine:g}")
        if self.accept is not None:
            parts.append(f"{_name(self.accept)} accepts {self.min_accepted:.2%} of calls")
        if self.score is not None:
            parts.append(f"mean {_name(self.score)} at least {self.min_score:g}")
        how = f"with {self.confidence:.4g} confidence" if self.decide_by == "bound" else "in the sample itself"
        return f"{', '.join(parts)}; {how}"

    def check_sample(self, calls: int, batch: int = 1, answer: Tensor | TensorSpec | None = None) -> None:
        """Check that a sample is large enough to show that a codec keeps the budget.

        Args:
            calls: how many calls judge.
            batch: how many predictions each of them makes.
            answer: the first output, as it is traced, where it may hold several predictions of each picture. Then each
                call counts once.

        Raises:
            SampleSizeError: it is not, even if nothing changes. The message says how many calls are needed.
        """
        if self.decide_by == "estimate":
            return
        several = self.max_top1_change is not None and answer is not None and several_predictions(answer)
        shares = [("predictions change", self.max_top1_change, 1 if several else batch)]
        shares += [] if self.accept is None else [("calls are unacceptable", 1 - self.min_accepted, 1)]
        for what, share, each in shares:
            if share is None or most_events(calls * each, share, self.confidence) >= 0:
                continue
            none, one = (least_count(share, self.confidence, events) for events in (0, 1))
            if none is None or one is None:
                raise SampleSizeError(
                    f"no sample, however large, shows that none of the {what}; allow more than 0, or {_BY_ESTIMATE}",
                    None,
                )
            needed, with_one = -(-none // each), -(-one // each)
            raise SampleSizeError(
                f"to show with {self.confidence:.4g} confidence that at most {share:.2%} of the {what}, {needed} calls "
                f"are needed that all stay the same, or {with_one} of which one changes; {calls} judge here. Give more "
                f"samples, allow more, or {_BY_ESTIMATE}",
                needed,
            )
        of_means = self.min_cosine is not None or self.score is not None
        if (of_means or several) and calls < LEAST_FOR_BOOTSTRAP:
            what = "a mean" if of_means else "a share of several predictions in each call"
            raise SampleSizeError(
                f"the bound of {what} needs at least {LEAST_FOR_BOOTSTRAP} calls; {calls} judge here. Give more "
                f"samples, or {_BY_ESTIMATE}",
                LEAST_FOR_BOOTSTRAP,
            )


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", "a function"))


class Verdict:
    """Adds up what one codec at one point changes in the answers of a sample, and compares it with a budget.

    Args:
        budget: the limits.
        build: turns output tensors by name into the output as the model returns it, for the budget's functions.
        calls: how many calls will be added.
    """

    def __init__(self, budget: Budget, build: Callable[[Mapping[str, Tensor]], Any], calls: int) -> None:
        self._budget, self._build, self._total = budget, build, calls
        self._calls = self._changed = self._predictions = self._accepted = 0
        self._same: list[float] = []
        self._cosines: list[float] = []
        self._scores: list[float] = []
        self._several = False

    def add(self, reference: Mapping[str, Tensor], output: Mapping[str, Tensor]) -> None:
        """Add one call.

        Args:
            reference: the model's own output tensors by name.
            output: the output tensors behind the codec.

        Raises:
            CodecError: predictions are to be compared, but the first output is a single number, or complex; or the
                budget's score is not a finite number.
        """
        budget = self._budget
        self._calls += 1
        first = next(iter(reference))
        if budget.max_top1_change is not None:
            changed = predictions(reference[first], first) != predictions(output[first], first)
            self._changed += int(changed.sum())
            self._predictions += changed.numel()
            self._several = several_predictions(reference[first])
            self._same.append(1 - float(changed.double().mean()))
        if budget.min_cosine is not None:
            self._cosines.append(likeness(list(reference.values()), list(output.values())))
        if budget.accept is not None:
            self._accepted += bool(budget.accept(self._build(reference), self._build(output)))
        if budget.score is not None:
            score = float(budget.score(self._build(reference), self._build(output)))
            if not math.isfinite(score):
                raise CodecError(f"the score of a call must be a finite number; {_name(budget.score)} gave {score}")
            self._scores.append(score)

    @property
    def hopeless(self) -> bool:
        """Whether a limit will be broken whatever the calls show that are still to come."""
        budget = self._budget
        if budget.max_top1_change is not None and not self._several and self._calls:
            total = self._total * self._predictions // self._calls
            if self._changed > self._most(total, budget.max_top1_change):
                return True
        return budget.accept is not None and self._calls - self._accepted > self._most(
            self._total, 1 - budget.min_accepted
        )

    def _most(self, total: int, share: float) -> int:
        if self._budget.decide_by == "bound":
            return most_events(total, share, self._budget.confidence)
        return math.floor(share * total + 1e-9)

    def findings(self) -> tuple[Finding, ...]:
        """Return what the calls so far show of each limit."""
        budget = self._budget
        found = []
        if budget.max_top1_change is not None:
            bound = self._change_bound()
            share = self._changed / max(1, self._predictions)
            found.append(self._finding("top-1 changed", share, bound, budget.max_top1_change, self._predictions, -1))
        if budget.min_cosine is not None:
            found.append(self._mean("cosine", self._cosines, budget.min_cosine))
        if budget.accept is not None:
            bound = 1 - share_bound(self._calls - self._accepted, self._calls, budget.confidence)
            share = self._accepted / max(1, self._calls)
            found.append(self._finding("accepted", share, bound, budget.min_accepted, self._calls, 1))
        if budget.score is not None and budget.min_score is not None:
            found.append(self._mean(_name(budget.score), self._scores, budget.min_score))
        return tuple(found)

    def _change_bound(self) -> float:
        """Return the share of predictions that change at most, over all calls."""
        confidence = self._budget.confidence
        if not self._several:
            return share_bound(self._changed, self._predictions, confidence)
        if not self._changed:
            # The bootstrap would say that none ever changes. What holds is a bound of the calls in which any does.
            return share_bound(0, self._calls, confidence)
        return 1 - mean_bound(self._same, confidence)

    def _mean(self, measure: str, values: list[float], limit: float) -> Finding:
        bound = mean_bound(values, self._budget.confidence)
        return self._finding(measure, sum(values) / len(values), bound, limit, len(values), 1)

    def _finding(self, measure: str, estimate: float, bound: float, limit: float, count: int, sign: int) -> Finding:
        """Return a finding whose value must be at least the limit with sign 1, at most with -1."""
        decisive = bound if self._budget.decide_by == "bound" else estimate
        # A mean of numbers that are all at the limit may differ from it by rounding.
        kept = sign * (decisive - limit) >= -1e-12
        return Finding(measure, estimate, bound, limit, count, kept)
