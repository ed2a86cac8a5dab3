"""Pictures of a model's layers, on matplotlib. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.report.runs import layer_runs, run_labels
from torchsurgeon.report.units import seconds_text
from torchsurgeon.tracing.graph import LayerGraph

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"


def new_figure(width_in: float, height_in: float) -> Any:
    """Return an empty matplotlib figure of a size in inches, drawn without a display.

    Raises ``TorchSurgeonError`` when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TorchSurgeonError(f"drawing needs matplotlib ({error}): pip install 'torchsurgeon[plot]'") from None
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Draw a figure into the format that ``path`` ends in.

    Raises ``TorchSurgeonError`` for one that matplotlib does not know, and ``OSError`` where nothing can be written.
    """
    known = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in known:
        raise TorchSurgeonError(f"{path}: there is no picture format {ending!r}; end it in one of {', '.join(known)}")
    figure.savefig(path, dpi=130)


def plain(text: str) -> str:
    """Return ``text``, which may be any model's name of a layer, so that matplotlib takes no formula from it."""
    return text.replace("$", r"\$")


def profile_picture(graph: LayerGraph, profile: LayerProfile, path: str | Path) -> None:
    """Draw a bar for each layer's time, with its quartiles, into a PNG (or whatever format ``path`` ends in); beside
    them its memory, and its joules where they are known.

    Runs of layers are drawn together when there are more than fit; their time is the sum, their memory the most. Raises
    ``TorchSurgeonError`` when matplotlib is not installed.
    """
    profile.check(graph)
    groups = layer_runs(graph)
    names = [plain(label) for label in run_labels(graph, groups)]
    labels = [name + (f" ({len(g)} layers)" if len(g) > 1 else "") for name, g in zip(names, groups, strict=True)]
    runs_ms = np.stack([profile.samples_s[:, g].sum(axis=1) for g in groups], axis=1) * 1e3
    median, (low, high) = np.median(runs_ms, axis=0), np.quantile(runs_ms, [0.25, 0.75], axis=0)
    panels: list[tuple[str, str, np.ndarray, np.ndarray | None]] = [
        ("time (ms)", BLUE, median, np.stack([median - low, high - median]))
    ]
    if profile.memory_bytes is not None:
        most = np.array([profile.memory_bytes[g].max() for g in groups]) / 1e6
        panels.append(("tensors in memory (MB)", GREEN, most, None))
    if profile.energy is not None:
        joules = np.array([profile.energy.layer_j[g].sum() for g in groups])
        panels.append(("energy above idle (mJ)", ORANGE, joules * 1e3, None))
    figure = new_figure(4.5 + 3.5 * len(panels), max(3.0, 0.27 * len(groups) + 1.6))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True, width_ratios=[1.6] + [1.0] * (len(panels) - 1)))
    y = np.arange(len(groups))
    for axis, (name, color, values, errors) in zip(axes, panels, strict=True):
        axis.barh(y, values, xerr=errors, color=color, error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"})
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(y, labels, fontsize=9)
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    right = float((median + (high - median)).max())
    for at, value, end in zip(y, median, high, strict=True):
        axes[0].annotate(f"{value / median.sum():.0%}", (end + right * 0.02, at), va="center", fontsize=8)
    axes[0].set_xlim(0, right * 1.12)
    device = profile.provenance.get("device", "an unnamed device")
    figure.suptitle(f"{plain(profile.model)} on {plain(str(device))}: {seconds_text(profile.total_s)} a run")
    save_figure(figure, path)


def layer_picture(
    title: str,
    graph: LayerGraph,
    profiles: Iterable[tuple[str, LayerProfile]],
    stars: Sequence[tuple[str, int]],
    path: str | Path,
) -> None:
    """Draw each layer's latency on each device as bars, the size of what crosses after it as a line, and a star for
    each named partition index, into a PNG (or whatever format ``path`` ends in).

    Runs of layers are drawn together when there are more than fit. Raises ``TorchSurgeonError`` when matplotlib is not
    installed.
    """
    groups = layer_runs(graph, [index for _, index in stars])
    labels = ["input", *(plain(label) for label in run_labels(graph, groups))]
    x = np.arange(len(labels))
    figure = new_figure(max(8.0, 0.42 * len(labels) + 3), 6.2)
    times = figure.add_subplot()
    named = list(profiles)
    width = 0.8 / len(named)
    for n, (name, profile) in enumerate(named):
        heights = [0.0] + [float(profile.layer_s[g].sum()) * 1e3 for g in groups]
        color = (BLUE, GREEN, PINK)[n % 3]
        times.bar(x + (n - (len(named) - 1) / 2) * width, heights, width, label=f"latency, {name}", color=color)
    times.set_ylabel("latency of the layer (ms)")
    times.set_xticks(x, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    times.set_xlim(-0.7, len(labels) - 0.3)
    sizes = times.twinx()
    points = {point.index: point.size_bytes for point in graph.points}
    ends = [0] + [g[-1] + 1 for g in groups]
    kilobytes = [points.get(end, math.nan) / 1e3 for end in ends]
    sizes.plot(x, kilobytes, color=ORANGE, marker="o", markersize=4, label="data that crosses after it")
    sizes.set_yscale("log")
    sizes.set_ylabel("size of what crosses (kB, logarithmic)")
    for name, index in stars:
        at = ends.index(index)
        sizes.plot(at, kilobytes[at], "*", markersize=22, color=RED, markeredgecolor="white")
        sizes.annotate(
            name,
            (at, kilobytes[at]),
            xytext=(0, 16),
            textcoords="offset points",
            ha="center",
            color=RED,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    low, high = sizes.get_ylim()
    sizes.set_ylim(low / 2, high * 4)
    handles = [*times.get_legend_handles_labels()[0], *sizes.get_legend_handles_labels()[0]]
    times.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(handles), frameon=False)
    times.set_title(f"{title}: where time goes and what would cross", pad=42)
    save_figure(figure, path)
