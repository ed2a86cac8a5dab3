"""Accuracy budgets as a command line or a file gives them: limits by name, as numbers or as one text."""

from __future__ import annotations

import difflib
import math

from torchsurgeon.accuracy.budget import Budget, DecideBy
from torchsurgeon.accuracy.scores import boxes_matched, pixels_kept
from torchsurgeon.errors import CodecError, short

_NUMBERS = ("max-top1-change", "min-cosine", "min-boxes-matched", "min-pixels-kept", "confidence")
_DECIDE_BY = "decide-by"


def parse_budget(text: str) -> Budget:
    """Return the budget that a text means, such as ``max-top1-change=0.01,min-cosine=0.99``.

    The limits are ``max-top1-change``, ``min-cosine``, ``min-boxes-matched`` for detectors and ``min-pixels-kept`` for
    segmentation. ``confidence`` and ``decide-by`` may stand beside them. ``Budget`` says what each means.

    Raises:
        CodecError: the text has a part that is not NAME=VALUE, an unknown or repeated name, a value that is no number,
            or no limit.
    """
    numbers: dict[str, float] = {}
    decide_by = "bound"
    seen = set()
    for part in text.split(","):
        name, _, value = (one.strip() for one in part.partition("="))
        if name not in (*_NUMBERS, _DECIDE_BY):
            near = difflib.get_close_matches(name.replace("_", "-"), (*_NUMBERS, _DECIDE_BY), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join((*_NUMBERS, _DECIDE_BY))}"
            raise CodecError(f"a limit is given as NAME=VALUE, such as min-cosine=0.99; got {short(part, 60)}; {hint}")
        if name in seen:
            raise CodecError(f"each limit may be given once; {name} is given twice")
        seen.add(name)
        if name == _DECIDE_BY:
            decide_by = value
            continue
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise CodecError(f"{name} must be a finite number; got {short(value, 60)}")
    return budget_of(
        max_top1_change=numbers.get("max-top1-change"),
        min_cosine=numbers.get("min-cosine"),
        min_boxes_matched=numbers.get("min-boxes-matched"),
        min_pixels_kept=numbers.get("min-pixels-kept"),
        confidence=numbers.get("confidence", 0.95),
        decide_by=decide_by,  # type: ignore[arg-type]
    )


def budget_of(
    *,
    max_top1_change: float | None = None,
    min_cosine: float | None = None,
    min_boxes_matched: float | None = None,
    min_pixels_kept: float | None = None,
    confidence: float = 0.95,
    decide_by: DecideBy = "bound",
) -> Budget:
    """Return the budget of limits that are plain numbers.

    Args:
        max_top1_change: as in ``Budget``, like all that are not described here.
        min_cosine: as in ``Budget``.
        min_boxes_matched: of a detector, the lowest mean share of boxes that are kept.
        min_pixels_kept: of a segmentation, the lowest mean share of pixels that keep their class.
        confidence: as in ``Budget``.
        decide_by: as in ``Budget``.

    Raises:
        CodecError: no limit is given, both of the scores are, or a value is out of its range.
    """
    given = [
        (function, lowest)
        for function, lowest in ((boxes_matched, min_boxes_matched), (pixels_kept, min_pixels_kept))
        if lowest is not None
    ]
    if len(given) > 1:
        raise CodecError("min-boxes-matched is for detectors, and min-pixels-kept for segmentation; give one of them")
    score, min_score = given[0] if given else (None, None)
    return Budget(
        max_top1_change=max_top1_change,
        min_cosine=min_cosine,
        score=score,
        min_score=min_score,
        confidence=confidence,
        decide_by=decide_by,
    )
