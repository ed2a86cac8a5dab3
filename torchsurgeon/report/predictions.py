"""Calibrations and predictions as tables, and predictions against measurements as a picture. Computes nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchsurgeon.prediction import Predictor
from torchsurgeon.prediction.operations import layer_kinds
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.report.narrow import BEFORE_NAMES, Column, FittingTable, names
from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, PINK, RED, SKY, new_figure, plain, save_figure
from torchsurgeon.report.tables import energy_column
from torchsurgeon.report.units import seconds_text
from torchsurgeon.tracing.graph import LayerGraph

_LOOKS = tuple((color, marker) for marker in "osD" for color in (BLUE, ORANGE, GREEN, RED, PINK, SKY))


def calibration_table(predictor: Predictor) -> FittingTable:
    """Return how well each kind of layer is predicted, judged by layers of networks that were held out."""
    device = predictor.provenance.get("device", "an unnamed device")
    roofline = predictor.roofline
    fitted = dict(sorted(predictor.fitted.items()))
    columns = [
        Column("kind", list(fitted), left=True),
        Column("samples", [str(known.held_out.samples) for known in fitted.values()], rank=3),
        Column("form", [known.form for known in fitted.values()], rank=2, left=True),
        Column("median error", [f"{known.held_out.median:.1%}" for known in fitted.values()]),
        Column("within 10 %", [f"{known.held_out.within_10:.1%}" for known in fitted.values()], rank=4),
        Column("within 20 %", [f"{known.held_out.within_20:.1%}" for known in fitted.values()], rank=5),
    ]
    energies = [known.energy_held_out for known in fitted.values()]
    if any(energies):
        medians = ["" if energy is None else f"{energy.median:.1%}" for energy in energies]
        columns.append(Column("energy, median error", medians, rank=1))
    return FittingTable(
        f"{device}: how well each kind of layer is predicted",
        columns,
        "Errors are those on layers of networks that were held out when the models were fitted. The device reaches "
        f"{roofline.peak_flop_s / 1e9:.3g} GFLOP/s (multiply and add count as two) and "
        f"{roofline.bandwidth_byte_s / 1e9:.3g} GB/s; a call takes {seconds_text(roofline.overhead_s)}. Layers of "
        "other kinds are bounded by these three figures.",
    )


def prediction_table(
    graph: LayerGraph, predictor: Predictor, predicted: LayerProfile, measured: LayerProfile | None = None
) -> FittingTable:
    """Return the predicted time of each layer with its 90 % interval, its energy where known, and its measured time.

    Args:
        graph: the model's layers.
        predictor: the device that ``predicted`` is for.
        predicted: the prediction.
        measured: a profile of the same model to compare with.
    """
    layers, interval_s, energy = graph.layers, predicted.interval_s, predicted.energy
    columns = [
        Column("#", [*(str(layer.index + 1) for layer in layers), ""], rank=7),
        names("layer", [*(layer.name for layer in layers), "whole model"]),
        Column("type", [*(layer.type for layer in layers), ""], rank=BEFORE_NAMES, left=True),
        Column(
            "at least" if interval_s is None else "predicted",
            [*map(seconds_text, predicted.layer_s), seconds_text(predicted.total_s)],
        ),
    ]
    if interval_s is not None:
        note = "90 %: the interval in which 90 % of such layers lay when the device was calibrated."
        intervals = [*map(_interval, interval_s), _interval(predicted.whole_interval_s)]
        columns.append(Column("90 %", intervals, rank=3, note=note))
    if energy is not None:
        mean_j, *ends_j = energy.whole_j
        means_j, intervals_j = [*energy.layer_j.tolist(), mean_j], [*energy.interval_j.tolist(), ends_j]
        # Beside a measurement it is the times that are compared, so energy is the first of the figures to go.
        columns.append(energy_column(means_j, intervals_j, percent=90, rank=4 if measured is None else 2))
    if measured is not None:
        pairs = [*zip(predicted.layer_s, measured.layer_s, strict=True), (predicted.total_s, measured.total_s)]
        columns.append(Column("measured", [seconds_text(truth_s) for _, truth_s in pairs], rank=6))
        columns.append(
            Column("error", [f"{guess_s / truth_s - 1:+.0%}" if truth_s else "" for guess_s, truth_s in pairs])
        )
    bounded = predictor.bounded(graph)
    if interval_s is not None and (any(bounded) or predicted.warned):
        note = (
            "Layers marked roofline are of kinds without a model, and layers marked outside are unlike the samples; "
            "their times may be off by a factor."
        )
        far = [layer.name in predicted.warned for layer in layers]
        marks = ["roofline" if one else "outside" if other else "" for one, other in zip(bounded, far, strict=True)]
        columns.append(Column("model", [*marks, ""], rank=5, left=True, note=note))
    device = predicted.provenance.get("device", "an unnamed device")
    return FittingTable(
        f"{predicted.model} on {device}: {_whole(predicted)}",
        columns,
        _caption(predictor),
        bold=[len(layers)],
        ends=[len(layers) - 1],
    )


def _interval(ends_s: Sequence[float] | None) -> str:
    return "" if ends_s is None else " … ".join(map(seconds_text, ends_s))


def _whole(predicted: LayerProfile) -> str:
    if predicted.whole_interval_s is None:
        return f"at least {seconds_text(predicted.total_s)}"
    low_s, high_s = map(seconds_text, predicted.whole_interval_s)
    return f"{seconds_text(predicted.total_s)} predicted ({low_s} … {high_s})"


def _caption(predictor: Predictor) -> str:
    if predictor.is_bound:
        return (
            "ALL OF THIS IS A LOWER BOUND: the device was never measured. It follows from peak arithmetic and memory "
            "rates in data sheets (docs/prediction.md names them); real times are longer."
        )
    if predictor.block.is_fitted:
        return "Nothing was run. The whole model's time is corrected for what a sum of its layers' times misses."
    return (
        "Nothing was run. The whole model's time and its interval are sums of the layers', since too few networks were "
        "timed at calibration to correct them."
    )


def prediction_picture(graph: LayerGraph, predicted: LayerProfile, measured: LayerProfile, path: str | Path) -> None:
    """Draw each layer's predicted time over its measured one, and the whole model's.

    Args:
        graph: the model's layers.
        predicted: the prediction.
        measured: a profile of the same model.
        path: the picture's file. Its ending says in which format it is drawn.

    Raises:
        ProfileError: if a profile is of another model.
        TorchSurgeonError: if matplotlib is not installed, or the picture's format is unknown.
    """
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
    """The kinds of layers, those that take most time in all first."""
    total = {kind: sum(s for k, s in zip(kinds, seconds, strict=True) if k == kind) for kind in set(kinds)}
    return sorted(total, key=lambda kind: -total[kind])
