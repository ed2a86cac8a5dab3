"""Pictures of a model's layers, drawn by matplotlib. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.report.runs import brief_label, layer_runs, run_labels
from torchsurgeon.report.units import seconds_text
from torchsurgeon.tracing.graph import LayerGraph

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
# Longer names at an axis would leave no room for what is drawn.
_MOST_CHARACTERS = 36


def new_figure(width_in: float, height_in: float) -> Any:
    """Return an empty matplotlib figure, which needs no display.

    Args:
        width_in: its width in inches.
        height_in: its height in inches.

    Raises:
        TorchSurgeonError: matplotlib is not installed.
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
    """Draw a figure into a file.

    Args:
        figure: a figure from ``new_figure()``.
        path: the file. Its ending says in which format the figure is drawn.

    Raises:
        TorchSurgeonError: matplotlib knows no format of this name.
        OSError: the file cannot be written.
    """
    known = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in known:
        raise TorchSurgeonError(f"{path}: there is no picture format {ending!r}; end it in one of {', '.join(known)}")
    figure.savefig(path, dpi=130)


def plain(text: str) -> str:
    """Return a text that may hold names of layers so that matplotlib does not take a part of it for a formula."""
    return text.replace("$", r"\$")


def tick_label(label: str) -> str:
    """Return a name from ``run_labels()`` as it stands at an axis."""
    return plain(brief_label(label, _MOST_CHARACTERS))


def best_unit(largest: float, unit: str) -> tuple[float, str]:
    """Return what values are multiplied with to be easy to read, and the unit that they then have.

    Args:
        largest: the largest of the values.
        unit: the unit that the values are in: ``"B"``, ``"FLOP"``, ``"s"`` or ``"J"``.
    """
    powers = ((9, "G"), (6, "M"), (3, "k")) if unit in ("B", "FLOP") else ((0, ""), (-3, "m"))
    power, prefix = next((one for one in powers if largest >= 10.0 ** one[0]), powers[-1])
    return 10.0**-power, prefix + unit


def profile_picture(graph: LayerGraph, profile: LayerProfile, path: str | Path) -> None:
    """Draw each layer's time with its quartiles, the memory of its tensors, and its energy where that is known.

    In a model with many layers neighbouring ones are drawn as one bar: the sum of their times and energies, and the
    largest of their memory.

    Args:
        graph: the model's layers.
        profile: a profile of the model.
        path: the picture's file. Its ending says in which format it is drawn.

    Raises:
        ProfileError: the profile is of another model.
        TorchSurgeonError: matplotlib is not installed, or knows no format of this name.
    """
    profile.check(graph)
    groups = layer_runs(graph)
    names = [tick_label(label) for label in run_labels(graph, groups)]
    labels = [name + (f" ({len(g)} layers)" if len(g) > 1 else "") for name, g in zip(names, groups, strict=True)]
    runs_s = np.stack([profile.samples_s[:, g].sum(axis=1) for g in groups], axis=1)
    median_s, (low_s, high_s) = np.median(runs_s, axis=0), np.quantile(runs_s, [0.25, 0.75], axis=0)
    scale, unit = best_unit(float(high_s.max()), "s")
    median, low, high = scale * median_s, scale * low_s, scale * high_s
    panels: list[tuple[str, str, np.ndarray, np.ndarray | None]] = [
        (f"median time ({unit}) with quartiles, and share", BLUE, median, np.stack([median - low, high - median]))
    ]
    if profile.memory_bytes is not None:
        most = np.array([profile.memory_bytes[g].max() for g in groups])
        scale, unit = best_unit(float(most.max()), "B")
        panels.append((f"tensors in memory ({unit})", GREEN, most * scale, None))
    if profile.energy is not None:
        joules = np.array([profile.energy.layer_j[g].sum() for g in groups])
        scale, unit = best_unit(float(np.nanmax(joules, initial=0.0)), "J")
        panels.append((f"energy above idle ({unit})", ORANGE, joules * scale, None))
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
    """Draw each layer's latency on each device, how much is sent when the model is cut after it, and chosen cuts.

    In a model with many layers neighbouring ones are drawn together. Their latency is the sum.

    Args:
        title: the model's name.
        graph: the model's layers.
        profiles: the devices, each with its name and its profile of the model.
        stars: the chosen cuts, each with its name and its partition index.
        path: the picture's file. Its ending says in which format it is drawn.

    Raises:
        TorchSurgeonError: matplotlib is not installed, or knows no format of this name.
    """
    groups = layer_runs(graph, [index for _, index in stars])
    labels = ["input", *map(tick_label, run_labels(graph, groups))]
    x = np.arange(len(labels))
    figure = new_figure(max(8.0, 0.42 * len(labels) + 3), 6.2)
    times = figure.add_subplot()
    named = list(profiles)
    width = 0.8 / len(named)
    for n, (name, profile) in enumerate(named):
        heights = [0.0] + [float(profile.layer_s[g].sum()) * 1e3 for g in groups]
        color = (BLUE, GREEN, PINK)[n % 3]
        times.bar(x + (n - (len(named) - 1) / 2) * width, heights, width, label=f"latency on the {name}", color=color)
    times.set_ylabel("latency of the layer (ms)")
    times.set_xticks(x, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    times.set_xlim(-0.7, len(labels) - 0.3)
    sizes = times.twinx()
    points = {point.index: point.size_bytes for point in graph.points}
    ends = [0] + [g[-1] + 1 for g in groups]
    kilobytes = [points.get(end, math.nan) / 1e3 for end in ends]
    sizes.plot(x, kilobytes, color=ORANGE, marker="o", markersize=4, label="data sent when cut after it")
    sizes.set_yscale("log")
    sizes.yaxis.set_major_formatter("{x:g}")
    sizes.set_ylabel("data sent (kB, logarithmic)")
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
    sizes.set_ylim(low / 2, high * 6)
    handles = [*times.get_legend_handles_labels()[0], *sizes.get_legend_handles_labels()[0]]
    times.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False)
    figure.suptitle(plain(f"{title}: how long each layer takes, and how much is sent when the model is cut after it"))
    save_figure(figure, path)
