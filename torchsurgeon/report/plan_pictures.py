"""Pictures of plans and sweeps, on matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon.planning import Frontier, Objective, Plan, Sweep, Terms
from torchsurgeon.planning.decide import choose
from torchsurgeon.planning.plans import place
from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, new_figure, plain, save_figure
from torchsurgeon.report.runs import MOST_RUNS, CutRun, cut_runs
from torchsurgeon.report.units import bytes_text, flops_text, seconds_text
from torchsurgeon.tracing.graph import LayerGraph

PARTS = (("head", BLUE), ("encode", PINK), ("uplink", ORANGE), ("decode", YELLOW), ("tail", GREEN), ("downlink", SKY))
_MOST_NAMES = 12


def plan_picture(graph: LayerGraph, plan: Plan, path: str | Path) -> None:
    """Draw what the cuts of ``graph`` would cost under a plan's link and load, into a PNG (or whatever format ``path``
    ends in): latency as stacked bars, energy where it is known, compute and what is sent; a star at the plan's choice.

    Cuts inside a run of layers are drawn as one bar where there are more than fit; it is the best of them under the
    plan's objective. Ways that break the plan's constraints are not drawn. Raises ``TorchSurgeonError`` when matplotlib
    is not installed.
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
    labels = [plain(run.label) for run, _ in bars]
    panels[-1].set_xticks(range(len(bars)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    every = len(graph.layers) <= MOST_RUNS
    panels[-1].set_xlabel("cut after" if every else "cut after, or inside: the best of each run of layers")
    figure.suptitle(
        f"{plain(plan.frontier.model)}: the least {plan.objective} over {plain(str(plan.link))}\n"
        f"server load {plan.load:g}, device slow-down {plan.slowdown:g}, constraints: {plan.constraints}",
        fontsize=11,
    )
    save_figure(figure, path)


def _draw_latency(axis: Any, terms: Sequence[Terms], plan: Plan, star: int) -> None:
    _stacked(axis, {name: [getattr(t, f"{name}_s") * 1e3 for t in terms] for name, _ in PARTS}, dict(PARTS))
    if plan.objective.throughput:
        axis.plot([t.interval_s * 1e3 for t in terms], "kD", markersize=4, label="between answers of a stream")
    axis.set_ylabel("latency (ms)")
    text = f"{place(plan.row)}\n{seconds_text(plan.terms.latency_s)}"
    if plan.objective != Objective(latency=1.0):
        text += f", {plan.objective} {plan.value:.4g} {plan.objective.unit}"
    _star(axis, star, plan.terms.latency_s * 1e3, text)
    _legend(axis)


def _draw_energy(axis: Any, terms: Sequence[Terms], star: int) -> None:
    total_j = np.array([t.energy_j or 0.0 for t in terms])
    scale, unit = (1.0, "J") if total_j.max() >= 1 else (1e3, "mJ")
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
    axis.bar(range(len(bars)), np.array(flops) / 1e6, 0.8, color=SKY, label=f"compute of the layers ({whole} in all)")
    axis.set_ylabel("compute (MFLOP)")
    axis.set_ylim(0, max(flops) / 1e6 * 1.3 or 1.0)
    sizes = axis.twinx()
    sent = [np.nan if terms.row.on_device else terms.row.size_bytes / 1e3 for _, terms in bars]
    sizes.plot(sent, "o-", color=ORANGE, markersize=4, label="data sent")
    sizes.set_yscale("log")
    sizes.yaxis.set_major_formatter("{x:g}")
    sizes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    sizes.yaxis.set_minor_formatter("{x:g}")
    sizes.set_ylabel("data sent (kB, logarithmic)")
    low, high = sizes.get_ylim()
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
    axis.plot(at, value, "*", markersize=20, color=RED, markeredgecolor="white", zorder=5)
    left = at < np.mean(axis.get_xlim())
    axis.annotate(
        plain(text),
        (at, value),
        xytext=(at, 0.96),
        textcoords=axis.get_xaxis_transform(),
        va="top",
        ha="left" if left else "right",
        color=RED,
        fontweight="bold",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": RED, "linewidth": 0.8, "relpos": (0.0 if left else 1.0, 0.0)},
    )


def _legend(axis: Any, *twins: Any) -> None:
    handles = [handle for one in (axis, *twins) for handle in one.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False)


def sweep_picture(sweep: Sweep, path: str | Path) -> None:
    """Draw which way is chosen, and what it gains, over uplink rate and load, into a PNG (or whatever format ``path``
    ends in). Raises ``TorchSurgeonError`` when matplotlib is not installed."""
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
        sweep.loads,
        where.reshape(sweep.chosen.shape),
        cmap=ListedColormap(colors),
        norm=BoundaryNorm(edges, len(used)),
        shading="nearest",
    )
    bar = figure.colorbar(mesh, ax=left)
    marked = sorted({round(i) for i in np.linspace(0, len(used) - 1, min(len(used), _MOST_NAMES))})
    bar.set_ticks(marked, labels=[plain(place(sweep.rows[used[i]])).removeprefix("cut ") for i in marked], fontsize=8)
    left.set_title("where to cut")
    gains = right.pcolormesh(rates, sweep.loads, sweep.gain, cmap="magma", shading="nearest", vmin=1.0)
    figure.colorbar(gains, ax=right, label="times better than the better end")
    right.set_title("gain over all on one side")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("uplink (Mbit/s)")
    left.set_ylabel("server load (times its profile)")
    trip = seconds_text(sweep.link.round_trip_s)
    figure.suptitle(f"{plain(sweep.model)}: the least {sweep.objective}, round trip {trip}")
    save_figure(figure, path)
