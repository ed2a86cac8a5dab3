"""The table and the picture of a load test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from torchsurgeon.loadtest.result import Array, LoadReport, LoadRun, quantile
from torchsurgeon.report.narrow import Column, FittingTable, names
from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, PINK, RED, SKY, best_unit, new_figure, plain, save_figure
from torchsurgeon.report.units import bytes_text, number_text, seconds_text

_COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY)
_CLOSED = "as it can"
# Above this share of the 99th percentile, what is shown is no longer the server's.
_OWN = 0.1


def load_table(found: LoadReport) -> FittingTable:
    """Return what became of the requests of a load test, one row for each rate and each kind of request.

    Args:
        found: the load test.
    """
    rows = [(run, kind) for run in found.runs for kind in run.kinds]
    several = len({kind.model for _, kind in rows}) > 1
    columns = [
        Column("rate", [_CLOSED if run.rate_per_s is None else _per_s(run.rate_per_s) for run, _ in rows]),
        *([Column("model", [kind.model for _, kind in rows], left=True)] if several else []),
        names("cut", [kind.cut for _, kind in rows]),
        Column("codec", [kind.codec for _, kind in rows], left=True, rank=4),
        Column("sent", [bytes_text(kind.size_bytes) for _, kind in rows], rank=2),
        Column("answers", [_per_s(len(kind.latencies_s) / max(run.seconds, run.lasted_s)) for run, kind in rows]),
        *(
            Column(f"p{percent:g}", [_at(kind.latencies_s, percent) for _, kind in rows], rank=rank)
            for percent, rank in ((50.0, 0), (90.0, 3), (99.0, 0), (99.9, 5))
        ),
        Column("longest", [_at(kind.latencies_s, 100.0) for _, kind in rows], rank=6),
        Column("queue", [_at(kind.queue_s, 50.0) for _, kind in rows], rank=1),
        Column(
            "compute",
            [_at(kind.compute_s, 50.0) for _, kind in rows],
            rank=1,
            note="Queue and compute are medians of what the server says.",
        ),
        Column("errors", [str(sum(kind.errors.values()) or "–") for _, kind in rows]),
    ]
    ends, row = [], -1
    for run in found.runs[:-1]:
        row += len(run.kinds)
        ends.append(row)
    caption = "Latencies count from the moment at which each request was due."
    if any(run.rate_per_s is None for run in found.runs):
        caption = "Each device sends its next request once it has its answer, so latencies are shorter than real ones."
    title = f"{found.devices} devices at {found.url}"
    return FittingTable(title, columns, caption, ends=ends)


def load_findings(found: LoadReport) -> list[str]:
    """Return what else should be known of a load test: errors by kind, and whether this program held it up.

    Args:
        found: the load test.
    """
    lines = []
    for run in found.runs:
        at = "" if len(found.runs) == 1 else f"at {_rate(run)}: "
        for error, count in sorted(run.errors.items()):
            reason = run.reasons.get(error, "")
            lines.append(f"{at}{count} × {error}" + (f", such as: {reason}" if reason else ""))
        if run.own_share > _OWN:
            lines.append(
                f"{at}this program sent requests {seconds_text(quantile(run.late_s, 99))} late (99th percentile), "
                f"{run.own_share:.0%} of that of the latencies, for want of a processor; run it on another machine, or "
                "choose a lower rate"
            )
    return lines


def load_picture(found: LoadReport, path: str | Path) -> None:
    """Draw latencies over the share of requests that had them, and over the rate where there are several.

    A line is a rate. Where there is one rate only, a line is a kind of request.

    Args:
        found: the load test.
        path: the picture's file. Its ending says in which format it is drawn.

    Raises:
        TorchSurgeonError: matplotlib is not installed, or knows no format of this name.
    """
    rates = [run for run in found.runs if run.rate_per_s is not None]
    lines: Mapping[str, Array]
    if len(found.runs) > 1:
        lines = {_rate(run): run.latencies_s for run in found.runs}
    else:
        lines = {f"{kind.cut}, {kind.codec}": kind.latencies_s for kind in found.runs[0].kinds}
    lines = {label: values for label, values in lines.items() if len(values)}
    scale, unit = best_unit(max((float(values[-1]) for values in lines.values()), default=1e-3), "s")
    panels = 2 if len(rates) > 1 else 1
    figure = new_figure(6.5 * panels, 4.6)
    axes = np.atleast_1d(figure.subplots(1, panels, sharey=True))
    for n, (label, values) in enumerate(lines.items()):
        # The share of requests that took longer: the interesting end of a latency is its tail.
        longer = 1 - (np.arange(len(values)) + 0.5) / len(values)
        axes[0].plot(1 / longer, values * scale, color=_COLORS[n % len(_COLORS)], label=plain(label), linewidth=1.6)
    axes[0].set_xscale("log")
    most = max((len(values) for values in lines.values()), default=10)
    ticks = [10.0**power for power in range(math.ceil(math.log10(max(most, 10))) + 1)]
    axes[0].set_xticks([1, 2, *ticks[1:]], ["0", "50", *(f"{100 - 100 / tick:.6g}" for tick in ticks[1:])])
    axes[0].set_xlim(1, ticks[-1])
    axes[0].minorticks_off()
    axes[0].set_xlabel("percentile of the requests")
    axes[0].set_ylabel(f"latency ({unit})")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    if 0 < len(lines) <= 12:
        axes[0].legend(frameon=False, fontsize=9)
    if panels > 1:
        for n, percent in enumerate((50.0, 99.0)):
            told = [(run.rate_per_s, quantile(run.latencies_s, percent) * scale) for run in rates if _answered(run)]
            if told:
                axes[1].plot(*zip(*told, strict=True), "o-", color=_COLORS[n], label=f"p{percent:g}")
        axes[1].set_xlabel("requests per second")
        if any(map(_answered, rates)):
            axes[1].legend(frameon=False, fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.suptitle(plain(f"{found.devices} devices, arrivals: {found.arrivals}"))
    save_figure(figure, path)


def _answered(run: LoadRun) -> bool:
    return bool(len(run.latencies_s))


def _rate(run: LoadRun) -> str:
    return "as fast as it can" if run.rate_per_s is None else _per_s(run.rate_per_s)


def _per_s(rate_per_s: float) -> str:
    return f"{number_text(rate_per_s)}/s"


def _at(ascending: Array, percent: float) -> str:
    return seconds_text(quantile(ascending, percent)) if len(ascending) else "–"
