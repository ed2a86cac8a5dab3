"""Pictures of plans and sweeps, drawn by matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon.planning import Frontier, Objective, Plan, Sweep, Terms
from torchsurgeon.planning.decide import choose
from torchsurgeon.planning.plans import place
from torchsurgeon.report.pictures import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    best_unit,
    new_figure,
    plain,
    save_figure,
    tick_label,
)
from torchsurgeon.report.plans import constraint_texts, objective_name
from torchsurgeon.report.runs import MOST_RUNS, CutRun, cut_runs
from torchsurgeon.report.units import bytes_text, flops_text, seconds_text
from torchsurgeon.tracing.graph import LayerGraph

PARTS = (("head", BLUE), ("encode", PINK), ("uplink", ORANGE), ("decode", YELLOW), ("tail", GREEN), ("downlink", SKY))
_BAND = "#fbe3d6"
_MOST_NAMES = 12
# A logarithmic axis over so large a ratio has room for the powers of ten alone.
_MANY_DECADES = 1e4


def plan_picture(graph: LayerGraph, plan: Plan, path: str | Path) -> None:
    """Draw what the cuts of a model would cost over a plan's link, with a star at the plan's choice.

    One below the other: latency as stacked bars, the device's energy where it is known, and what the layers compute and
    the cuts send. In a model with many layers the cuts inside neighbouring ones are drawn as one bar, which is the best
    of them by the plan's objective. Cuts that break a constraint are not drawn.

    Args:
        graph: the model's layers.
        plan: a plan for the model.
        path: the picture's file. Its ending says in which format it is drawn.

    Raises:
        TorchSurgeonError: matplotlib is not installed, or knows no format of this name.
    """
    bars: list[tuple[CutRun, Terms]] = []
    star = 0
    for run in cut_runs(graph, plan.rows):
        terms: Terms | None = plan.terms
        if plan.row in run.rows:
            star = len(bars)
        else:
            best = Frontier.of(graph, list(run.rows))
            terms = choose(best, plan.link, plan.load, plan.slowdown, plan.objective, plan.constraints)
        if terms is not None:
            bars.append((run, terms))
    with_energy = all(terms.energy_j is not None for _, terms in bars)
    figure = new_figure(max(9.0, 0.42 * len(bars) + 3.5), 10.5 if with_energy else 8.0)
    panels = figure.subplots(3 if with_energy else 2, 1, sharex=True)
    panels[0].set_xlim(-0.7, len(bars) - 0.3)
    _draw_latency(panels[0], [terms for _, terms in bars], plan, star)
    if with_energy:
        _draw_energy(panels[1], [terms for _, terms in bars], star)
    _draw_layers(panels[-1], graph, bars, star)
    labels = [tick_label(run.label) for run, _ in bars]
    panels[-1].set_xticks(range(len(bars)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    every = len(graph.layers) <= MOST_RUNS
    several = "" if every else "  (where a name stands for several layers: the best cut among them)"
    panels[-1].set_xlabel(f"cut after{several}")
    limits = "; ".join(constraint_texts(plan.constraints))
    lines = [
        f"{plan.frontier.model}: the best cut by {plan.objective}",
        f"over {plan.link}; server load {plan.load:g}×, device slow-down {plan.slowdown:g}×",
        *textwrap.wrap(f"limits: {limits}" if limits else "", 100),
    ]
    figure.suptitle(plain("\n".join(lines)), fontsize=11)
    save_figure(figure, path)


def _draw_latency(axis: Any, terms: Sequence[Terms], plan: Plan, star: int) -> None:
    _stacked(axis, {name: [getattr(t, f"{name}_s") * 1e3 for t in terms] for name, _ in PARTS}, dict(PARTS))
    if plan.objective.throughput:
        in_flight = plan.objective.in_flight or math.inf
        intervals_ms = [max(t.interval_s, t.latency_s / in_flight) * 1e3 for t in terms]
        axis.plot(intervals_ms, "kD", markersize=4, label="time between answers of a stream")
    axis.set_ylabel("latency (ms)")
    _star(axis, star, plan.terms.latency_s * 1e3, f"{place(plan.row)}\n{_values(plan)}")
    _legend(axis)


def _values(plan: Plan) -> str:
    """The chosen cut's latency, and its value by another objective."""
    latency = f"latency {seconds_text(plan.terms.latency_s)}"
    if plan.objective == Objective(latency=1.0):
        return latency
    unit, name = plan.objective.unit, objective_name(plan.objective)
    return f"{latency}, {name} {seconds_text(plan.value) if unit == 's' else f'{plan.value:.4g} {unit}'.rstrip()}"


def _draw_energy(axis: Any, terms: Sequence[Terms], star: int) -> None:
    total_j = np.array([t.energy_j or 0.0 for t in terms])
    scale, unit = best_unit(total_j.max(), "J")
    joules = {part: [(getattr(t, f"{part}_j") or 0.0) * scale for t in terms] for part in ("device", "radio")}
    _stacked(axis, joules, {"device": BLUE, "radio": ORANGE})
    axis.set_ylabel(f"energy of the device ({unit})")
    _star(axis, star, total_j[star] * scale, f"{total_j[star] * scale:.4g} {unit}")
    least = int(total_j.argmin())
    if total_j[least] < total_j[star]:
        hollow = {"color": "white", "markeredgecolor": RED, "linestyle": "none"}
        axis.plot(least, total_j[least] * scale, "*", markersize=15, label="least energy", **hollow)
    _legend(axis)


def _draw_layers(axis: Any, graph: LayerGraph, bars: Sequence[tuple[CutRun, Terms]], star: int) -> None:
    from matplotlib.ticker import LogLocator

    flops = [sum(graph.layers[i].flops for i in run.layers) for run, _ in bars]
    whole = flops_text(sum(layer.flops for layer in graph.layers))
    scale, unit = best_unit(max(flops), "FLOP")
    label = f"compute of the layers since the cut before ({whole} in all)"
    axis.bar(range(len(bars)), np.array(flops) * scale, 0.8, color=SKY, label=label)
    axis.set_ylabel(f"compute ({unit})")
    axis.set_ylim(0, max(flops) * scale * 1.3 or 1.0)
    sizes = axis.twinx()
    sent = [np.nan if terms.row.on_device else terms.row.size_bytes / 1e3 for _, terms in bars]
    sizes.plot(sent, "o-", color=ORANGE, markersize=4, label="data sent")
    sizes.set_yscale("log")
    sizes.yaxis.set_major_formatter("{x:g}")
    sizes.set_ylabel("data sent (kB, logarithmic)")
    low, high = sizes.get_ylim()
    if high / low < _MANY_DECADES:
        sizes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        sizes.yaxis.set_minor_formatter("{x:g}")
    sizes.set_ylim(low, high * (high / low) ** 0.2)
    if np.isfinite(sent[star]):
        _star(sizes, star, sent[star], bytes_text(sent[star] * 1e3))
    _legend(axis, sizes)


def _stacked(axis: Any, parts: dict[str, list[float]], colors: dict[str, str]) -> None:
    below = np.zeros(max(map(len, parts.values())))
    for name, heights in parts.items():
        if any(heights):
            axis.bar(range(len(heights)), heights, 0.8, bottom=below, label=name, color=colors[name])
            below += heights
    axis.set_ylim(0, float(below.max()) * 1.3 or 1.0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _star(axis: Any, at: int, value: float, text: str) -> None:
    """Put a star above what is chosen, a band behind it and a text at the top, so that neither hides it."""
    from matplotlib.transforms import offset_copy

    axis.axvspan(at - 0.5, at + 0.5, color=_BAND, zorder=0)
    above = offset_copy(axis.transData, axis.figure, y=11, units="points")
    axis.plot(at, value, "*", markersize=18, color=RED, markeredgecolor="white", zorder=5, transform=above)
    left = at < np.mean(axis.get_xlim())
    axis.annotate(
        plain(text),
        (at, 0.97),
        xytext=(12 if left else -12, 0),
        xycoords=axis.get_xaxis_transform(),
        textcoords="offset points",
        va="top",
        ha="left" if left else "right",
        color=RED,
        fontweight="bold",
        fontsize=9,
    )


def _legend(axis: Any, *twins: Any) -> None:
    handles = [handle for one in (axis, *twins) for handle in one.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False)


def sweep_picture(sweep: Sweep, path: str | Path) -> None:
    """Draw which cut is the best, and what it gains, at each uplink rate and server load.

    Args:
        sweep: what is drawn.
        path: the picture's file. Its ending says in which format it is drawn.

    Raises:
        TorchSurgeonError: matplotlib is not installed, or knows no format of this name.
    """
    figure = new_figure(13, 5.4)
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    left, right = figure.subplots(1, 2, sharey=True)
    used, where = np.unique(sweep.chosen, return_inverse=True)
    colors = colormaps["viridis"](np.linspace(0.05, 0.95, len(used)))
    rates = sweep.uplink_bit_s / 1e6
    edges = np.arange(len(used) + 1) - 0.5
    mesh = left.pcolormesh(
        rates,
        sweep.factors,
        where.reshape(sweep.chosen.shape),
        cmap=ListedColormap(colors),
        norm=BoundaryNorm(edges, len(used)),
        shading="nearest",
    )
    bar = figure.colorbar(mesh, ax=left)
    marked = sorted({round(i) for i in np.linspace(0, len(used) - 1, min(len(used), _MOST_NAMES))})
    bar.set_ticks(marked, labels=[plain(place(sweep.rows[used[i]])) for i in marked], fontsize=8)
    left.set_title("best cut")
    # A range of at least a tenth, so that colours tell gains apart and not rounding.
    gains = right.pcolormesh(
        rates,
        sweep.factors,
        sweep.gain,
        cmap="magma",
        shading="nearest",
        vmin=1.0,
        vmax=max(1.1, float(sweep.gain.max())),
    )
    figure.colorbar(gains, ax=right, label="times better than the better of all on device and all on server")
    right.set_title("gain of the best cut")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("uplink (Mbit/s)")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
    left.set_ylabel("server load (× its profile)")
    trip = seconds_text(sweep.link.round_trip_s)
    figure.suptitle(f"{plain(sweep.model)}: the best cuts by {sweep.objective}, with a round trip of {trip}")
    save_figure(figure, path)
