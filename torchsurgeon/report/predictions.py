"""Calibrations and predictions as tables, and predictions against measurements as a picture. Computes nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from torchsurgeon.prediction import Predictor
from torchsurgeon.prediction.operations import layer_kinds
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.report.narrow import Fitting, Name
from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, PINK, RED, SKY, new_figure, plain, save_figure
from torchsurgeon.report.units import joules_text, seconds_text
from torchsurgeon.tracing.graph import LayerGraph

_LOOKS = tuple((color, marker) for marker in "osD" for color in (BLUE, ORANGE, GREEN, RED, PINK, SKY))


def calibration_table(predictor: Predictor) -> Table:
    """Return how well each kind's model predicts layers of networks that it was not fitted to."""
    device = predictor.provenance.get("device", "an unnamed device")
    roofline = predictor.roofline
    table = Table(
        title=f"{device}: what each prediction model is worth",
        caption=(
            f"Errors on layers (of networks) held out. The device reaches {roofline.peak_flop_s / 1e9:.3g} Gflop/s "
            f"(multiply and add are two) and {roofline.bandwidth_byte_s / 1e9:.3g} GB/s; a call takes "
            f"{seconds_text(roofline.overhead_s)}. Layers of other kinds are bounded by these."
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    metered = any(known.energy_held_out for known in predictor.fitted.values())
    for name in ("kind", "samples", "form", "median error", "within 10 %", "within 20 %"):
        table.add_column(name, justify="left" if name in ("kind", "form") else "right", no_wrap=True)
    if metered:
        table.add_column("energy, median error", justify="right", no_wrap=True)
    for kind, known in sorted(predictor.fitted.items()):
        errors, energy = known.held_out, known.energy_held_out
        shares = (f"{share:.1%}" for share in (errors.median, errors.within_10, errors.within_20))
        more = ["" if energy is None else f"{energy.median:.1%}"] if metered else []
        table.add_row(kind, str(errors.samples), known.form, *shares, *more)
    return table


def prediction_table(
    graph: LayerGraph, predictor: Predictor, predicted: LayerProfile, measured: LayerProfile | None = None
) -> Fitting:
    """Return the predicted time of each layer with its 90 % interval, its joules where known, and beside them what was
    measured where that is given. Narrow terminals show no types and no intervals of joules."""
    given = graph, predictor, predicted, measured
    return Fitting(_predictions(*given, brief=False), _predictions(*given, brief=True))


def _predictions(
    graph: LayerGraph, predictor: Predictor, predicted: LayerProfile, measured: LayerProfile | None, *, brief: bool
) -> Table:
    device, interval_s = predicted.provenance.get("device", "an unnamed device"), predicted.interval_s
    table = Table(
        title=f"{predicted.model} on {device}: {_whole(predicted)}",
        caption=_caption(predictor),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("layer")
    if not brief:
        table.add_column("type", no_wrap=True)
    table.add_column("at least" if interval_s is None else "predicted", justify="right", no_wrap=True)
    if interval_s is not None:
        table.add_column("90 %", justify="right", no_wrap=True)
    if predicted.energy is not None:
        table.add_column("energy", justify="right", no_wrap=True)
    if measured is not None:
        for name in ("measured", "error"):
            table.add_column(name, justify="right", no_wrap=True)
    bounded = predictor.bounded(graph)
    if interval_s is not None and any(bounded):
        table.add_column("model", no_wrap=True)
    for layer, seconds, by_roofline in zip(graph.layers, predicted.layer_s, bounded, strict=True):
        types = [] if brief else [layer.type]
        cells: list[str | Name] = [str(layer.index + 1), Name(layer.name), *types, seconds_text(seconds)]
        if interval_s is not None:
            low_s, high_s = interval_s[layer.index]
            cells.append(f"{seconds_text(low_s)} … {seconds_text(high_s)}")
        if predicted.energy is not None:
            interval_j = [] if brief else predicted.energy.interval_j[layer.index].tolist()
            cells.append(joules_text(float(predicted.energy.layer_j[layer.index]), *interval_j))
        if measured is not None:
            truth_s = float(measured.layer_s[layer.index])
            cells += [seconds_text(truth_s), f"{seconds / truth_s - 1:+.0%}" if truth_s else ""]
        if interval_s is not None and by_roofline:
            cells.append("roofline")
        table.add_row(*cells)
    last = ["", "whole model", *[""] * (not brief), seconds_text(predicted.total_s)]
    if predicted.whole_interval_s is not None:
        last.append(" … ".join(map(seconds_text, predicted.whole_interval_s)))
    if predicted.energy is not None:
        last.append(joules_text(*predicted.energy.whole_j[: 1 if brief else 3]))
    if measured is not None:
        last += [seconds_text(measured.total_s), f"{predicted.total_s / measured.total_s - 1:+.0%}"]
    table.add_section()
    table.add_row(*last, style="bold")
    return table


def _whole(predicted: LayerProfile) -> str:
    if predicted.whole_interval_s is None:
        return f"at least {seconds_text(predicted.total_s)}"
    low_s, high_s = map(seconds_text, predicted.whole_interval_s)
    return f"{seconds_text(predicted.total_s)} predicted ({low_s} … {high_s})"


def _caption(predictor: Predictor) -> str:
    if predictor.is_bound:
        return (
            "ALL OF THIS IS A BOUND: the device was never measured. Peak arithmetic and memory rates are from data "
            "sheets (docs/prediction.md names them); real times are longer."
        )
    whole = (
        "The whole model is corrected for what a sum of layers misses."
        if predictor.block.is_fitted
        else "The whole model and its interval are sums of the layers': too few networks were timed to correct them."
    )
    return (
        f"Nothing was run. 90 % of layers lie in their interval, as those held out at calibration did. {whole} "
        "Layers marked roofline have no model and may be off by a factor."
    )


def prediction_picture(graph: LayerGraph, predicted: LayerProfile, measured: LayerProfile, path: str | Path) -> None:
    """Draw each layer's predicted time over its measured one, and the whole model's, into a PNG (or whatever format
    ``path`` ends in). Raises :class:`~torchsurgeon.cli.TorchSurgeonError` when matplotlib is not installed."""
    for profile in (predicted, measured):
        profile.check(graph)
    figure = new_figure(8.6, 6.4)
    axis = figure.add_subplot()
    truth_ms, guess_ms = measured.layer_s * 1e3, predicted.layer_s * 1e3
    everything = np.concatenate([truth_ms, guess_ms, [measured.total_s * 1e3, predicted.total_s * 1e3]])
    everything = everything[everything > 0]
    ends = np.array([everything.min() / 1.6, everything.max() * 1.6])
    for share, alpha in ((0.2, 0.18), (0.1, 0.3)):
        style = {"color": "#888888", "alpha": alpha, "lw": 0, "label": f"within {share * 100:.0f} %"}
        axis.fill_between(ends, ends * (1 - share), ends * (1 + share), **style)
    axis.plot(ends, ends, color="#555555", lw=0.8)
    kinds = layer_kinds(graph)
    for (color, marker), kind in zip(_LOOKS, _by_time(kinds, truth_ms), strict=False):
        here = np.array([found == kind for found in kinds])
        look = {"color": color, "marker": marker, "s": 26, "alpha": 0.8, "edgecolors": "white", "linewidths": 0.4}
        axis.scatter(truth_ms[here], guess_ms[here], label=f"{kind} ({here.sum()})", **look)
    whole = {"marker": "*", "s": 260, "color": "black", "edgecolors": "white", "zorder": 5}
    axis.scatter([measured.total_s * 1e3], [predicted.total_s * 1e3], label="whole model", **whole)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.set_xlabel("measured (ms)")
    axis.set_ylabel("predicted (ms)" if predicted.interval_s is not None else "at least (ms)")
    axis.grid(alpha=0.25, which="major")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    device = predicted.provenance.get("device", "an unnamed device")
    axis.set_title(plain(f"{predicted.model}, predicted for {device}"), fontsize=10)
    save_figure(figure, path)


def _by_time(kinds: Sequence[str], seconds: np.ndarray) -> list[str]:
    """Kinds, those that take most time first."""
    total = {kind: sum(s for k, s in zip(kinds, seconds, strict=True) if k == kind) for kind in set(kinds)}
    return sorted(total, key=lambda kind: -total[kind])
