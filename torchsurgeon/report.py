"""Tables for the terminal and pictures for people. Converts units for printing; computes nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from torchsurgeon.codec import CodecTable
from torchsurgeon.doctor import Diagnosis
from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.graph import LayerGraph, PartitionPoint, TensorSpec
from torchsurgeon.plan import Estimate
from torchsurgeon.profile import LayerProfile

# Okabe and Ito's palette, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_BARS = 28


def bytes_text(size_bytes: float) -> str:
    """Return a size for people, in decimal units."""
    return _scaled(size_bytes, "B", 1000)


def flops_text(flops: float) -> str:
    """Return a number of floating-point operations for people."""
    return _scaled(flops, "FLOP", 1000)


def seconds_text(seconds: float) -> str:
    """Return a duration for people, in milliseconds or seconds."""
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.1f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.0f} µs"
    )


def _scaled(value: float, unit: str, base: int) -> str:
    if value < base:
        return f"{value:g} {unit}"
    power = min(int(math.log(value, base)), 4)
    return f"{value / base**power:.3g} {' kMGT'[power]}{unit}"


def graph_table(graph: LayerGraph) -> Table:
    """Return the layers of a graph, and what crosses when it is cut after each."""
    table = Table(
        title=f"{type(graph.model).__name__}: {len(graph.layers)} layers, {len(graph.points)} partition points",
        caption=(
            "FLOP counts multiply and add as two, as PyTorch's flop counter does. Tensors are float32 unless named; N "
            f"is the batch size, and bytes are for N={graph.batch}. Crosses: what is sent when this is the last layer "
            "on the device, and in how many tensors if not one."
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("#", justify="right", no_wrap=True)
    for column in ("layer", "type", "output"):
        table.add_column(column, no_wrap=True)
    for column in ("FLOP", "weights", "crosses"):
        table.add_column(column, justify="right", no_wrap=True)
    points = {point.index: point for point in graph.points}
    table.add_row("0", "(all on the server)", "", "", "", "", _crossing(points[0]))
    for layer in graph.layers:
        index = layer.index + 1
        last = index == len(graph.layers)
        table.add_row(
            str(index),
            layer.name,
            layer.type,
            "\n".join(_shape(spec) for spec in layer.outputs),
            flops_text(layer.flops).removesuffix("FLOP") if layer.flops else "",
            bytes_text(layer.parameter_bytes) if layer.parameter_bytes else "",
            "nothing" if last else _crossing(points[index]) if index in points else "no cut",
        )
    return table


def _crossing(point: PartitionPoint) -> str:
    count = len(point.tensors)
    return bytes_text(point.size_bytes) + (f" in {count}" if count > 1 else "")


def _shape(spec: TensorSpec) -> str:
    return str(spec).rpartition(" ")[2].removeprefix("float32").strip("[]") or "one number"


def codec_table(measured: CodecTable) -> Table:
    """Return what each codec costs and changes at the points where it was measured."""
    budget = measured.budget or "none given, so nothing that loses something is used (--min-cosine, …)"
    table = Table(
        title=f"{measured.model}: codecs of what crosses, on {measured.samples} samples",
        caption=(
            f"Sizes for a batch of {measured.batch}, against the plain tensors. Error: root mean square of what the "
            f"tail gets. Budget: {budget}."
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("point", "codec"):
        table.add_column(column, no_wrap=True)
    for column in ("crosses", "ratio", "encode", "decode", "error", "answers", "use"):
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in measured.rows:
        cost = row.cost
        changes = {"{:.1%} changed": row.top1_change, "cosine {:.5f}": row.output_cosine, "{:.0%} fine": row.accepted}
        table.add_row(
            f"{row.point} {row.name}" if row.point != last else "",
            cost.codec,
            bytes_text(round(cost.size_bytes)),
            f"{row.ratio:.2f}",
            seconds_text(cost.encode_s),
            seconds_text(cost.decode_s),
            "" if row.boundary is None else f"{row.boundary.rmse:.2g}",
            ", ".join(text.format(value) for text, value in changes.items() if value is not None),
            "lossless" if cost.lossless else "yes" if cost.within_budget else "no",
        )
        last = row.point
    return table


def diagnosis_text(diagnosis: Diagnosis) -> Group:
    """Return what :func:`torchsurgeon.doctor.examine` found, for people."""
    graph = diagnosis.graph
    how = {
        "fx": "torch.fx",
        "export": "torch.export (its Python could not be followed by torch.fx); layers are ATen operators",
        "hierarchical": "torch.fx, around modules that it cannot follow",
    }[graph.traced_by]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("traced by", how)
    facts.add_row("in", seconds_text(diagnosis.trace_s))
    facts.add_row("layers", f"{len(graph.layers)}, {len(graph.points)} partition points")
    flops = sum(layer.flops for layer in graph.layers)
    weights = sum(p.numel() * p.element_size() for p in graph.model.parameters())
    facts.add_row("compute", f"{flops_text(flops)} (multiply and add count as two), {bytes_text(weights)} of weights")
    uncounted = [layer.name for layer in graph.layers if layer.uncounted]
    if uncounted:
        facts.add_row("not counted", f"operators inside {_listed(uncounted)}")
    for path, why in graph.opaque.items():
        facts.add_row("kept whole", f"{path}: {why}")
    if not graph.opaque:
        facts.add_row("kept whole", "nothing")
    for spec, free in zip(graph.inputs, diagnosis.free_sizes.values(), strict=True):
        sizes = "×".join(f"{n}{' (free)' if ok else ''}" for n, ok in zip(spec.shape, free, strict=True))
        facts.add_row("input", f"{spec.name} {str(spec.dtype).removeprefix('torch.')}[{sizes}]")
    if graph.value_dependent:
        facts.add_row("sizes", "depend on values, so which input sizes are free is not known")
    facts.add_row("batch", "free" if graph.batch_free else "fixed at the example's")
    again = "the same bits twice" if diagnosis.repeatable else "DIFFERENT from run to run: no cut can give the same"
    facts.add_row("answers", again)
    for note in diagnosis.notes:
        facts.add_row("note", note)
    blocks = Table(title="Partition points by block", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    blocks.add_column("block")
    blocks.add_column("points", justify="right")
    for block, count in diagnosis.points_per_block.items():
        blocks.add_row(block, str(count))
    start_bytes = graph.points[0].size_bytes
    cuts = Table(
        title=f"Cuts that can pay: each sends less than the input ({bytes_text(start_bytes)}) and all before it",
        caption=f"{diagnosis.too_big} of {max(len(graph.points) - 2, 0)} points send more than the input.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    cuts.add_column("#", justify="right")
    cuts.add_column("cut after")
    for column in ("crosses", "compute before"):
        cuts.add_column(column, justify="right")
    done = np.cumsum([0] + [layer.flops for layer in graph.layers])
    for point in diagnosis.worthwhile:
        share = f"{done[point.index] / flops:.0%}" if flops else ""
        cuts.add_row(str(point.index), point.name, bytes_text(point.size_bytes), share)
    return Group(facts, blocks, cuts if diagnosis.worthwhile else "No cut sends less than the input does.")


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def profile_table(graph: LayerGraph, profile: LayerProfile) -> Table:
    """Return the measured time of each layer with quartiles and share, and its memory and joules where known."""
    profile.check(graph)
    device = profile.provenance.get("device", "an unnamed device")
    table = Table(
        title=f"{profile.model} on {device}: {seconds_text(profile.total_s)}",
        caption=(
            f"Medians of {len(profile.whole_s)} runs. Layers sum to {profile.sum_to_whole:.3f} of the whole model's "
            "time, which is measured by itself; shares are of the layers' sum."
            + (" Joules are above idle, with their 95 % interval." if profile.energy else "")
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("#", justify="right")
    table.add_column("layer", overflow="fold")
    table.add_column("type")
    for name in ("median", "quartiles", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    if profile.memory_bytes is not None:
        table.add_column("memory", justify="right", no_wrap=True)
    if profile.energy is not None:
        table.add_column("energy", justify="right", no_wrap=True)
    low, high = profile.quartiles_s()
    total_s = profile.layer_s.sum()
    for layer, median_s, low_s, high_s in zip(graph.layers, profile.layer_s, low, high, strict=True):
        cells = [
            str(layer.index + 1),
            layer.name,
            layer.type,
            seconds_text(median_s),
            f"{seconds_text(low_s)} … {seconds_text(high_s)}",
            f"{median_s / total_s:.1%}",
        ]
        if profile.memory_bytes is not None:
            cells.append(bytes_text(float(profile.memory_bytes[layer.index])))
        if profile.energy is not None:
            low_j, high_j = profile.energy.interval_j[layer.index]
            cells.append(joules_text(float(profile.energy.layer_j[layer.index]), float(low_j), float(high_j)))
        table.add_row(*cells)
    return table


def joules_text(mean_j: float, low_j: float, high_j: float) -> str:
    """Return an energy and its interval for people, in one unit; "?" where it is unknown."""
    if math.isnan(mean_j):
        return "?"
    size = max(abs(mean_j), abs(high_j) if math.isfinite(high_j) else 0.0)
    factor, unit = (1.0, "J") if size >= 1 else (1e3, "mJ") if size >= 1e-3 else (1e6, "µJ")
    if not math.isfinite(high_j - low_j):
        return f"{mean_j * factor:.3g} {unit}"
    return f"{mean_j * factor:.3g} ({low_j * factor:.3g} … {high_j * factor:.3g}) {unit}"


def profile_picture(graph: LayerGraph, profile: LayerProfile, path: str | Path) -> None:
    """Draw a bar for each layer's time, with its quartiles, into a PNG (or whatever format ``path`` ends in); beside
    them its memory, and its joules where they are known.

    Runs of layers are drawn together when there are more than fit; their time is the sum, their memory the most.
    Raises :class:`~torchsurgeon.errors.TorchSurgeonError` when matplotlib is not installed.
    """
    profile.check(graph)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TorchSurgeonError(f"drawing needs matplotlib ({error}): pip install 'torchsurgeon[plot]'") from None
    groups = _groups(graph, [])
    labels = [_label([graph.layers[i].name for i in g]) + (f" ({len(g)} layers)" if len(g) > 1 else "") for g in groups]
    runs_ms = np.stack([profile.samples_s[:, g].sum(axis=1) for g in groups], axis=1) * 1e3
    median, (low, high) = np.median(runs_ms, axis=0), np.quantile(runs_ms, [0.25, 0.75], axis=0)
    panels: list[tuple[str, str, np.ndarray, np.ndarray | None]] = [
        ("time (ms)", _BLUE, median, np.stack([median - low, high - median]))
    ]
    if profile.memory_bytes is not None:
        most = np.array([profile.memory_bytes[g].max() for g in groups]) / 1e6
        panels.append(("tensors in memory (MB)", _GREEN, most, None))
    if profile.energy is not None:
        joules = np.array([profile.energy.layer_j[g].sum() for g in groups])
        panels.append(("energy above idle (mJ)", _ORANGE, joules * 1e3, None))
    figure = Figure(figsize=(4.5 + 3.5 * len(panels), max(3.0, 0.27 * len(groups) + 1.6)), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.suptitle(f"{profile.model} on {device}: {seconds_text(profile.total_s)} a run")
    figure.savefig(path, dpi=130)


def estimate_table(title: str, estimates: Sequence[Estimate], chosen: Estimate) -> Table:
    """Return the predicted latency of the two ends, the chosen point, and the best others."""
    others = sorted((e for e in estimates[1:-1] if e is not chosen), key=lambda e: e.latency_s)[:5]
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("cut after", "sent", "head", "uplink", "tail", "downlink", "latency"):
        table.add_column(name, justify="left" if name == "cut after" else "right")
    rows = sorted({e.point.index: e for e in (estimates[0], chosen, *others, estimates[-1])}.items())
    for _, e in rows:
        times = [seconds_text(t) if t else "–" for t in (e.head_s, e.uplink_s, e.tail_s, e.downlink_s, e.latency_s)]
        sent = bytes_text(e.point.size_bytes) if e.uplink_s else "–"
        star = "★ " if e is chosen else ""
        table.add_row(star + point_text(e, estimates), sent, *times, style="bold" if e is chosen else None)
    return table


def point_text(chosen: Estimate, estimates: Sequence[Estimate]) -> str:
    """Return where an estimate cuts, in words."""
    if chosen.point.index == 0:
        return "all on server"
    if chosen.point.index == estimates[-1].point.index:
        return "all on device"
    return chosen.point.name


def layer_picture(
    title: str,
    graph: LayerGraph,
    profiles: Iterable[tuple[str, LayerProfile]],
    stars: Sequence[tuple[str, int]],
    path: str | Path,
) -> None:
    """Draw each layer's latency on each device as bars, the size of what crosses after it as a line, and a star for
    each named partition index, into a PNG (or whatever format ``path`` ends in).

    Runs of layers are drawn together when there are more than fit. Raises
    :class:`~torchsurgeon.errors.TorchSurgeonError` when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TorchSurgeonError(f"drawing needs matplotlib ({error}): pip install 'torchsurgeon[plot]'") from None
    groups = _groups(graph, [index for _, index in stars])
    labels = ["input"] + [_label([graph.layers[i].name for i in g]) for g in groups]
    x = np.arange(len(labels))
    figure = Figure(figsize=(max(8.0, 0.42 * len(labels) + 3), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    times = figure.add_subplot()
    named = list(profiles)
    width = 0.8 / len(named)
    for n, (name, profile) in enumerate(named):
        heights = [0.0] + [float(profile.layer_s[g].sum()) * 1e3 for g in groups]
        color = (_BLUE, _GREEN, "#CC79A7")[n % 3]
        times.bar(x + (n - (len(named) - 1) / 2) * width, heights, width, label=f"latency, {name}", color=color)
    times.set_ylabel("latency of the layer (ms)")
    times.set_xticks(x, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    times.set_xlim(-0.7, len(labels) - 0.3)
    sizes = times.twinx()
    points = {point.index: point.size_bytes for point in graph.points}
    ends = [0] + [g[-1] + 1 for g in groups]
    kilobytes = [points.get(end, math.nan) / 1e3 for end in ends]
    sizes.plot(x, kilobytes, color=_ORANGE, marker="o", markersize=4, label="data that crosses after it")
    sizes.set_yscale("log")
    sizes.set_ylabel("size of what crosses (kB, logarithmic)")
    for name, index in stars:
        at = ends.index(index)
        sizes.plot(at, kilobytes[at], "*", markersize=22, color=_RED, markeredgecolor="white")
        sizes.annotate(
            name,
            (at, kilobytes[at]),
            xytext=(0, 16),
            textcoords="offset points",
            ha="center",
            color=_RED,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    low, high = sizes.get_ylim()
    sizes.set_ylim(low / 2, high * 4)
    handles = [*times.get_legend_handles_labels()[0], *sizes.get_legend_handles_labels()[0]]
    times.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(handles), frameon=False)
    times.set_title(f"{title}: where time goes and what would cross", pad=42)
    figure.savefig(path, dpi=130)


def _groups(graph: LayerGraph, keep: Sequence[int]) -> list[list[int]]:
    """Split the layers into at most about ``_BARS`` runs, along modules; a run ends at every index in ``keep``."""
    count = len(graph.layers)
    if count <= _BARS:
        return [[i] for i in range(count)]
    for depth in (3, 2, 1):
        groups: list[list[int]] = []
        previous = None
        for layer in graph.layers:
            prefix = layer.name.split(".")[:depth]
            if groups and prefix == previous and layer.index not in keep:
                groups[-1].append(layer.index)
            else:
                groups.append([layer.index])
            previous = prefix
        if len(groups) <= _BARS or depth == 1:
            break
    return groups


def _label(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = [p[0] for p in zip(*parts, strict=False) if len(set(p)) == 1]
    return ".".join(shared) or f"{names[0]} … {names[-1]}"
