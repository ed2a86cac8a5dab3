"""Tables of simulated datacenters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torchsurgeon._place import place_text
from torchsurgeon.planning.row import Row
from torchsurgeon.report.narrow import Column, FittingTable, names
from torchsurgeon.report.units import number_text, seconds_text
from torchsurgeon.simulate import Estimate, Sustained

_OVERLOADED = "ever longer"
_CAPTION = "Times and rates are simulated, with 95 % intervals; times are those at the servers."


def simulation_table(ways: Sequence[Sustained], percentile: float = 99.0) -> FittingTable:
    """Return what servers sustain, one row for each way to run the model.

    Args:
        ways: from ``torchsurgeon.simulate.sustained()``.
        percentile: the percentile of the times that is shown.
    """
    columns = [
        Column("way", [way.name for way in ways], left=True),
        names("cut", [_cut(way.row) for way in ways]),
        Column(
            "latency", [seconds_text(way.latency_s) for way in ways], rank=2, note="Latency is that of idle servers."
        ),
        Column("on server", [seconds_text(way.server_s) if way.server_s else "–" for way in ways], rank=3),
    ]
    if any(way.times is not None for way in ways):
        columns += [
            Column("busy", [f"{100 * way.times.utilization:.0f} %" if way.times else "–" for way in ways], rank=1),
            Column("load", [_load(way) for way in ways], rank=1, note="Load is what torchsurgeon plan --load takes."),
            _figures("median", [_percentile(way, 50) for way in ways], rank=4, last=7),
            _figures(f"p{percentile:g}", [_percentile(way, percentile) for way in ways], rank=5),
        ]
    if any(way.capacity is not None for way in ways):
        columns.append(_figures("rate", [_rate(way) for way in ways], rank=6, note="Rate is the highest in the limit."))
    return FittingTable("What the servers sustain", columns, _CAPTION)


def _cut(row: Row) -> str:
    return place_text(row.index, row.name, on_device=row.on_device, before="")


def _figures(header: str, cells: Sequence[tuple[str, str]], rank: int, last: int = 0, note: str = "") -> Column:
    """Return a column of figures with their intervals, which a narrow terminal shows without them.

    Args:
        header: what stands above.
        cells: each figure and its interval.
        rank: when the intervals are left out.
        last: when the figures are, too; 0 for never.
        note: what stands below the table.
    """
    brief = Column(header, [figure for figure, _ in cells], rank=last, note=note)
    texts = [f"{figure} {interval}".rstrip() for figure, interval in cells]
    return Column(header, texts, rank=rank, instead=brief, note=note)


def _percentile(way: Sustained, percentile: float) -> tuple[str, str]:
    if way.times is None:
        return "–", ""
    if way.times.utilization >= 1:
        return _OVERLOADED, ""
    return _interval(way.times.percentile_s(percentile), seconds_text)


def _rate(way: Sustained) -> tuple[str, str]:
    return ("–", "") if way.capacity is None else _interval(way.capacity.rate_per_s, _rate_text)


def _rate_text(rate_per_s: float) -> str:
    return f"{number_text(rate_per_s)}/s"


def _load(way: Sustained) -> str:
    if way.load is None or way.times is None:
        return "–"
    return _OVERLOADED if way.times.utilization >= 1 else f"{way.load:.2f}"


def _interval(estimate: Estimate, text: Callable[[float], str]) -> tuple[str, str]:
    if math.isinf(estimate.value):
        return "any", ""
    return text(estimate.value), f"({text(max(estimate.low, 0.0))} … {text(estimate.high)})"
