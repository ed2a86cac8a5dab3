"""Accuracy budgets: what a sample shows of all calls, how large it must be, and how alike two answers are."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from torchsurgeon.accuracy.bounds import mean_bound, most_events, share_bound
from torchsurgeon.accuracy.budget import Verdict
from torchsurgeon.accuracy.limits import parse_budget
from torchsurgeon.accuracy.scores import likeness
from torchsurgeon.codec import Budget, Finding, boxes_matched, least_count, pixels_kept
from torchsurgeon.errors import CodecError, SampleSizeError

# --- bounds ---


@pytest.mark.parametrize(("share", "none", "one"), [(0.01, 299, 473), (0.03, 99, 157), (0.5, 5, 8)])
def test_how_many_calls_a_share_needs(share: float, none: int, one: int) -> None:
    assert least_count(share, 0.95) == none
    assert least_count(share, 0.95, events=1) == one
    assert share_bound(0, none, 0.95) <= share < share_bound(0, none - 1, 0.95)
    assert share_bound(1, one, 0.95) <= share < share_bound(1, one - 1, 0.95)
    assert (most_events(none, share, 0.95), most_events(none - 1, share, 0.95)) == (0, -1)
    assert (most_events(one, share, 0.95), most_events(one - 1, share, 0.95)) == (1, 0)


def test_no_sample_shows_that_nothing_ever_changes() -> None:
    assert least_count(0.0, 0.95) is None
    assert most_events(10_000, 0.0, 0.95) == -1


@pytest.mark.parametrize(("events", "count"), [(0, 32), (1, 50), (7, 120), (119, 120)])
def test_a_shares_bound_is_where_so_few_events_become_unlikely(events: int, count: int) -> None:
    bound = share_bound(events, count, 0.95)
    chance = sum(math.comb(count, k) * bound**k * (1 - bound) ** (count - k) for k in range(events + 1))
    assert chance == pytest.approx(0.05)


def test_a_shares_bound_ends_at_one() -> None:
    assert share_bound(5, 5, 0.95) == 1
    assert most_events(5, 1.0, 0.95) == 5


def test_a_means_bound_is_below_the_mean_nearer_with_more_values_and_always_the_same() -> None:
    values = 1 - numpy.random.default_rng(0).exponential(0.01, 400)
    few, many = mean_bound(values[:40], 0.95), mean_bound(values, 0.95)
    assert few < many < values.mean()
    assert many == mean_bound(values, 0.95)
    # By the normal distribution it would be 1.645 standard errors below the mean.
    assert values.mean() - many == pytest.approx(1.645 * values.std() / 20, rel=0.2)


def test_a_means_bound_of_values_without_spread() -> None:
    assert mean_bound([1.0] * 30, 0.95) == 1
    assert mean_bound([1.0] * 29 + [1 - 1e-16], 0.95) == pytest.approx(1)


# --- budgets ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_top1_change": 1.5},
        {"min_cosine": float("nan")},
        {"accept": bool, "min_accepted": -1},
        {"score": boxes_matched},
        {"min_score": 0.9, "min_cosine": 0.9},
        {"score": boxes_matched, "min_score": float("inf")},
        {"min_cosine": 0.9, "confidence": 1},
        {"min_cosine": 0.9, "confidence": 0.2},
        {"min_cosine": 0.9, "decide_by": "luck"},
    ],
)
def test_a_budget_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CodecError):
        Budget(**options)


def test_a_share_in_percent_is_told_how_to_write_it() -> None:
    with pytest.raises(CodecError, match=r"max_top1_change must be from 0 to 1; got 3\.0; 3 % is 0\.03$"):
        Budget(max_top1_change=3.0)
    with pytest.raises(CodecError, match=r"min_cosine must be from -1 to 1; got 3\.0$"):
        Budget(min_cosine=3.0)


def test_a_budget_says_what_it_allows() -> None:
    assert str(Budget(max_top1_change=0.01)) == "at most 1.00% of predictions change; with 0.95 confidence"
    budget = Budget(score=boxes_matched, min_score=0.9, decide_by="estimate")
    assert str(budget) == "mean boxes_matched at least 0.9; in the sample itself"


def test_a_sample_that_is_too_small_is_refused_with_what_it_needs() -> None:
    with pytest.raises(SampleSizeError, match=r"at most 1\.00% of the predictions change, 299 .* 473 .* 32 judge"):
        Budget(max_top1_change=0.01).check_sample(32)
    with pytest.raises(SampleSizeError, match="99 calls are needed") as refused:
        Budget(accept=bool, min_accepted=0.97).check_sample(98)
    assert refused.value.needed == 99
    Budget(accept=bool, min_accepted=0.97).check_sample(99)
    # A call of a batch of 4 makes 4 predictions.
    with pytest.raises(SampleSizeError, match="75 calls are needed that all stay the same, or 119 of which one"):
        Budget(max_top1_change=0.01).check_sample(74, batch=4)
    with pytest.raises(SampleSizeError, match="at least 30 calls; 29 judge"):
        Budget(min_cosine=0.9).check_sample(29)
    # Pixels of one picture count once, and their share has a bound by the bootstrap.
    pixels = torch.zeros(4, 2, 8, 8)
    with pytest.raises(SampleSizeError, match="299 calls are needed"):
        Budget(max_top1_change=0.01).check_sample(298, 4, pixels)
    Budget(max_top1_change=0.01).check_sample(299, 4, pixels)
    for several in (pixels, pixels[:, 0].long()):
        with pytest.raises(SampleSizeError, match="several predictions in each call needs at least 30 calls; 29 judge"):
            Budget(max_top1_change=0.5).check_sample(29, 1, several)
    for one in (pixels[..., :1, :1], pixels[:, 0, 0, 0].long()):
        Budget(max_top1_change=0.5).check_sample(29, 1, one)
    with pytest.raises(
        SampleSizeError, match="no sample, however large, shows that none of the predictions"
    ) as refused:
        Budget(max_top1_change=0.0).check_sample(10**6)
    assert refused.value.needed is None
    Budget(max_top1_change=0.0, min_cosine=0.9, decide_by="estimate").check_sample(1)


def judged(budget: Budget, outputs: list[Tensor], reference: Tensor) -> tuple[bool, tuple[Finding, ...]]:
    """Return whether it was hopeless, and what was found, over outputs that are compared with one reference."""
    verdict = Verdict(budget, lambda tensors: tensors["y"], len(outputs))
    for output in outputs:
        verdict.add({"y": reference}, {"y": output})
    return verdict.hopeless, verdict.findings()


SAME, OTHER = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])


def test_the_bound_decides_and_by_name_the_estimate() -> None:
    outputs = [SAME] * 199 + [OTHER]
    hopeless, (found,) = judged(Budget(max_top1_change=0.01), outputs, SAME)
    assert (hopeless, found.kept) == (True, False)
    assert found.estimate == 0.005
    assert found.bound == share_bound(1, 200, 0.95) > 0.01
    hopeless, (found,) = judged(Budget(max_top1_change=0.01, decide_by="estimate"), outputs, SAME)
    assert (hopeless, found.kept) == (False, True)
    hopeless, (found,) = judged(Budget(max_top1_change=0.03), outputs, SAME)
    assert (hopeless, found.kept, found.count) == (False, True, 200)


def test_a_budget_that_is_broken_for_certain_is_known_early() -> None:
    verdict = Verdict(Budget(max_top1_change=0.03), lambda tensors: tensors["y"], 200)
    verdict.add({"y": SAME}, {"y": OTHER})
    assert not verdict.hopeless
    verdict.add({"y": SAME}, {"y": OTHER})
    assert verdict.hopeless
    assert not verdict.findings()[0].kept


def test_many_predictions_of_one_picture_count_as_one_value() -> None:
    reference = torch.zeros(1, 2, 10, 10)
    reference[:, 1] = 1
    changed = reference.clone()
    changed[:, 0, 0] = 2
    _, (found,) = judged(Budget(max_top1_change=0.1), [reference] * 30 + [changed] * 10, reference)
    assert found.estimate == pytest.approx(0.025)
    # 4,000 independent predictions would have a bound of 0.030.
    assert 0.035 < found.bound < 0.05
    assert found.kept


@pytest.mark.parametrize("batch", [1, 4])
def test_where_no_pixel_changes_the_bound_is_that_of_calls(batch: int) -> None:
    """The bootstrap of pictures that all stay as they are would say that none ever changes."""
    reference = torch.rand(batch, 2, 10, 10)
    _, (found,) = judged(Budget(max_top1_change=0.05), [reference] * 40, reference)
    assert (found.estimate, found.bound, found.kept) == (0, share_bound(0, 40, 0.95), False)
    classes = reference.argmax(1)
    assert judged(Budget(max_top1_change=0.05), [classes] * 40, classes)[1] == (found,)


def test_limits_of_calls_and_of_means() -> None:
    budget = Budget(
        min_cosine=0.99,
        accept=lambda own, changed: torch.equal(own, changed),
        min_accepted=0.9,
        score=lambda own, changed: float((own - changed).abs().max() < 0.5),
        min_score=0.9,
        decide_by="estimate",
    )
    near = torch.tensor([[0.001, 1.0]])
    _, findings = judged(budget, [SAME] * 18 + [near] * 2, SAME)
    assert [finding.kept for finding in findings] == [True, True, True]
    assert [finding.measure for finding in findings] == ["cosine", "accepted", "<lambda>"]
    hopeless, findings = judged(budget, [SAME] * 17 + [OTHER] * 3, SAME)
    assert hopeless
    assert [finding.kept for finding in findings] == [False, False, False]


def test_a_score_that_is_no_number_is_refused() -> None:
    def wrong(own: Tensor, changed: Tensor) -> float:
        return float("nan")

    with pytest.raises(CodecError, match="must be a finite number; wrong gave nan"):
        judged(Budget(score=wrong, min_score=0, decide_by="estimate"), [SAME], SAME)


@pytest.mark.parametrize("answer", [torch.tensor(1.0), torch.ones(4, 1), torch.ones(1), torch.ones(1, 3) * 1j])
def test_predictions_need_classes(answer: Tensor) -> None:
    with pytest.raises(CodecError, match="'y' is"):
        judged(Budget(max_top1_change=1.0, decide_by="estimate"), [answer], answer)


@pytest.mark.parametrize(
    ("own", "changed"),
    [(torch.tensor([3]), torch.tensor([4])), (torch.tensor([True]), torch.tensor([False]))],
)
def test_outputs_that_are_classes_are_compared_themselves(own: Tensor, changed: Tensor) -> None:
    budget = Budget(max_top1_change=0.5, decide_by="estimate")
    _, findings = judged(budget, [changed] * 3 + [own], own)
    assert [finding.estimate for finding in findings] == [0.75]
    assert not findings[0].kept


# --- scores ---


def test_likeness_of_what_has_none() -> None:
    nan, zero, one = torch.tensor([float("nan")]), torch.zeros(3), torch.ones(3)
    assert likeness([zero], [zero]) == 1
    assert likeness([zero], [one]) == 0
    assert likeness([nan], [nan]) == 0
    assert likeness([one], [-one]) == -1
    assert likeness([one, zero], [one, one]) == pytest.approx(0.5**0.5)


def detected(*boxes: tuple[float, ...], labels: list[int] | None = None, scores: list[float] | None = None) -> Any:
    count = len(boxes)
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * count),
        "scores": torch.tensor(scores or [0.9] * count),
    }


LEFT, RIGHT, NEAR_LEFT, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (0, 0, 10, 8), (50, 50, 60, 60)


@pytest.mark.parametrize(
    ("own", "changed", "share"),
    [
        (detected(LEFT, RIGHT), detected(RIGHT, LEFT), 1.0),
        (detected(LEFT), detected(NEAR_LEFT), 1.0),
        (detected(LEFT), detected((0, 0, 10, 4)), 0.0),
        (detected(LEFT, RIGHT), detected(LEFT), 2 / 3),
        (detected(LEFT), detected(LEFT, FAR), 2 / 3),
        (detected(LEFT), detected(LEFT, labels=[2]), 0.0),
        # Two boxes of one answer cannot both match the same box of the other.
        (detected(LEFT, NEAR_LEFT), detected(LEFT), 2 / 3),
        # Boxes that the detector is not sure of do not count.
        (detected(LEFT, FAR, scores=[0.9, 0.3]), detected(LEFT), 1.0),
        (detected(), detected(), 1.0),
        (detected(), detected(LEFT), 0.0),
        ([detected(LEFT), detected(RIGHT)], [detected(LEFT), detected(FAR)], 0.5),
    ],
)
def test_boxes_that_match(own: Any, changed: Any, share: float) -> None:
    assert boxes_matched(own, changed) == pytest.approx(share)


def test_pixels_that_keep_their_class() -> None:
    own = torch.zeros(1, 3, 2, 2)
    own[:, 1] = 1
    changed = own.clone()
    changed[0, 2, 0, 0] = 5
    assert pixels_kept(own, changed) == 0.75
    assert pixels_kept({"out": own, "aux": own}, {"out": changed, "aux": own}) == 0.75
    assert pixels_kept(own.argmax(1), changed.argmax(1)) == 0.75


@pytest.mark.parametrize(("score", "answer"), [(pixels_kept, torch.zeros(1, 5)), (boxes_matched, torch.zeros(1, 5))])
def test_an_answer_of_another_kind_has_no_such_score(score: Any, answer: Tensor) -> None:
    with pytest.raises(CodecError, match=r"needs an answer .* Give a score of your own"):
        score(answer, answer)


# --- limits as a text ---


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("max-top1-change=0.01", Budget(max_top1_change=0.01)),
        (" min-cosine = 0.99 , decide-by=estimate", Budget(min_cosine=0.99, decide_by="estimate")),
        (
            "max-top1-change=0.02,min-boxes-matched=0.9,confidence=0.9",
            Budget(max_top1_change=0.02, score=boxes_matched, min_score=0.9, confidence=0.9),
        ),
        ("min-pixels-kept=0.95", Budget(score=pixels_kept, min_score=0.95)),
    ],
)
def test_a_budget_is_given_as_a_text(text: str, wanted: Budget) -> None:
    assert parse_budget(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a limit is given as NAME=VALUE"),
        ("max_top1_change=0.01", r"did you mean max-top1-change\?"),
        ("qwertz=1", "there are max-top1-change, min-cosine"),
        ("min-cosine", "min-cosine must be a finite number; got ''"),
        ("min-cosine=nan", "min-cosine must be a finite number; got 'nan'"),
        ("min-cosine=2", "min_cosine must be from -1 to 1; got 2"),
        ("min-cosine=0.9,min-cosine=0.8", "min-cosine is given twice"),
        ("confidence=0.9", "a budget needs a limit"),
        ("min-cosine=0.9,decide-by=luck", "decide_by must be one of bound, estimate; got 'luck'"),
        ("min-boxes-matched=1,min-pixels-kept=1", "give one of them"),
    ],
)
def test_a_text_that_is_no_budget_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(CodecError, match=said):
        parse_budget(text)
