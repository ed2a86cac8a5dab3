"""What the demo prints: the labels, a table of each mode, and a sentence on who won."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.demo.photographs import labels
from torchsurgeon.demo.ways import Result
from torchsurgeon.report import bytes_text, seconds_text
from torchsurgeon.report.narrow import CHOSEN, Column, FittingTable, names
from torchsurgeon.report.units import joules_text, number_text

_TITLES = {"one": "One photograph at a time", "stream": "A stream of photographs"}
_WAY = {"device": "device only", "server": "server only", "ours": "torchsurgeon"}
# Measured times of equal ways differ by about this factor.
_ALIKE = 1.02
# A choice that gains less than this was the wrong one.
_MISSED = 0.95


def label_lines(names_: Sequence[str], answers: Sequence[Tensor]) -> list[str]:
    """Return a line for each photograph: what the model takes it for, and how surely.

    Args:
        names_: the photographs' names.
        answers: the model's answers.
    """
    lines = []
    for name, answer in zip(names_, answers, strict=True):
        likely = answer.softmax(1)[0].topk(3)
        said = (f"{labels()[k]} {share:.0%}" for share, k in zip(likely.values, likely.indices.tolist(), strict=True))
        lines.append(f"{name}: {', '.join(said)}")
    return lines


def best_of(results: Sequence[Result], row: Result) -> Result:
    """Return the quickest way in the mode, over the link and within the budget of a result; of equal ones an end."""
    alike = [r for r in results if (r.mode, r.link, r.budget) == (row.mode, row.link, row.budget)]
    least_s = min(r.measured_s for r in alike)
    return next(r for r in alike if r.measured_s <= least_s * _ALIKE)


def table(results: Sequence[Result], mode: str, slow: float) -> FittingTable:
    """Return the table of one mode.

    Args:
        results: what was measured.
        mode: ``"one"`` or ``"stream"``.
        slow: how many times slower the device is.
    """
    rows = [row for row in results if row.mode == mode]
    best = [best_of(rows, row) == row for row in rows]
    new_link = [k == 0 or rows[k - 1].link != row.link for k, row in enumerate(rows)]
    new_budget = [
        new or rows[k - 1].budget != row.budget for k, (row, new) in enumerate(zip(rows, new_link, strict=True))
    ]
    if mode == "one":
        value = Column("latency", [seconds_text(row.measured_s) for row in rows], note="Latency is the median.")
        predicted = [seconds_text(row.predicted_s) for row in rows]
    else:
        value = Column("frames/s", [number_text(1 / row.measured_s) for row in rows])
        predicted = [number_text(1 / row.predicted_s) for row in rows]
    return FittingTable(
        f"{_TITLES[mode]}; the device is {slow:g}× slower than the server, one thread each",
        [
            Column("link", [row.link if new else "" for row, new in zip(rows, new_link, strict=True)], left=True),
            Column("keeps", [_kept(row) if new else "" for row, new in zip(rows, new_budget, strict=True)], left=True),
            Column(
                "",
                [(CHOSEN if star else "  ") + _WAY[row.way] for row, star in zip(rows, best, strict=True)],
                left=True,
            ),
            names("cut", [row.cut for row in rows]),
            Column("as", [row.codec or "–" for row in rows], rank=2, left=True),
            Column("sent", [bytes_text(round(row.sent_bytes)) if row.sent_bytes else "–" for row in rows], rank=3),
            Column("predicted", predicted, rank=5, note="The planner chooses by what is predicted."),
            value,
            Column(
                "gain",
                [f"{_gain(rows, row):.2f}×" if row.way == "ours" else "" for row in rows],
                rank=6,
                note="Gain is how many times better than the better of both ends.",
            ),
            Column("radio", [_joules(row) for row in rows], rank=4, note="Radio is the energy of the device's radio."),
            Column(
                "answers",
                [_answers(row) for row in rows],
                rank=7,
                note="Answers are the model's own: to the bit, or by their label.",
            ),
        ],
        f"{CHOSEN.strip()} is the best in its group.",
        bold=[i for i, star in enumerate(best) if star],
        ends=[i for i, row in enumerate(rows) if row.way == "ours"],
    )


def verdict(results: Sequence[Result]) -> str:
    """Return in a few sentences where a cut in between won, and where an end did."""
    groups = {(row.mode, row.link, row.budget): best_of(results, row) for row in results}
    cases: dict[str, list[str]] = {}
    for row in groups.values():
        where = row.cut if _is_end(row) else "a cut in between"
        cases.setdefault(where, []).append(_case(row))
    split = cases.pop("a cut in between", [])
    text = (
        f"A cut in between is the best in {len(split)} of {len(groups)} cases{': ' if split else ''}{', '.join(split)}."
    )
    ends = " ".join(f"{where.capitalize()} is the best in {len(found)}." for where, found in cases.items())
    return f"{text} {ends}".rstrip()


def misses(results: Sequence[Result]) -> str:
    """Return where what torchsurgeon chose was clearly slower than the better end, and why; "" where it never was."""
    ours = [row for row in results if row.way == "ours"]
    missed = [row for row in ours if _gain(results, row) < _MISSED]
    if not missed:
        return ""
    cases = "; ".join(
        f"{_case(row)}, where it took {_overrun(row)} times the predicted time, and the better end "
        f"{_overrun(_better_end(results, row))} times"
        for row in missed
    )
    return (
        f"In {len(missed)} of {len(ours)} cases what torchsurgeon chose is at least {1 - _MISSED:.0%} slower than the "
        f"better end: {cases}. It chooses by predicted times, which hold while the machine is as busy as when the "
        "layers were timed; on the slowed-down device an interruption takes longer, too. Close other programs, or give "
        "more --repeats."
    )


def _better_end(results: Sequence[Result], row: Result) -> Result:
    """Return the quicker of both ends in a result's mode, over its link and within its budget."""
    alike = [r for r in results if (r.mode, r.link, r.budget) == (row.mode, row.link, row.budget)]
    return min((r for r in alike if r.way != "ours"), key=lambda r: r.measured_s)


def _gain(results: Sequence[Result], row: Result) -> float:
    return _better_end(results, row).measured_s / row.measured_s


def _overrun(row: Result) -> str:
    return number_text(row.measured_s / row.predicted_s)


def _case(row: Result) -> str:
    what = "one photograph" if row.mode == "one" else "a stream"
    return f"{what} over {row.link}{'' if row.budget == 'lossless' else f' within {row.budget}'}"


def _is_end(row: Result) -> bool:
    return row.cut in ("all on the device", "all on the server")


def _kept(row: Result) -> str:
    return "every bit" if row.budget == "lossless" else "97 % of labels"


def _joules(row: Result) -> str:
    return "?" if row.radio_j is None else "–" if not row.sent_bytes else joules_text(row.radio_j)


def _answers(row: Result) -> str:
    if row.same_bits == row.photographs:
        return "same bits"
    return "same label" if row.same_label == row.photographs else f"{row.same_label} of {row.photographs}"


def own_answers(model: Any, frames: Sequence[Tensor]) -> list[Tensor]:
    """Return the model's own answers."""
    with torch.no_grad():
        return [model(frame) for frame in frames]
