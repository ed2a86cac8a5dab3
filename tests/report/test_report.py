"""Figures are printed in units people read, and pictures show every layer group and star."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import torchsurgeon as ts
from torchsurgeon import report
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.profiling import LayerEnergy
from torchsurgeon.report import pictures, plan_pictures, units
from torchsurgeon.report.narrow import FittingTable
from torchsurgeon.report.runs import MOST_RUNS, cut_runs, layer_runs, run_labels


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (42e-6, "42 µs"),
        (0.9999, "999.9 ms"),
        (0.99996, "1.00 s"),
        (999.4e-6, "999 µs"),
        (999.6e-6, "1.0 ms"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("bit_s", "text"), [(5e3, "0.005 Mbit/s"), (5.85e6, "5.85 Mbit/s"), (999.6e6, "1 Gbit/s"), (2.94e9, "2.94 Gbit/s")]
)
def test_rates_have_no_exponents(bit_s: float, text: str) -> None:
    assert report.rate_text(bit_s) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (150_528, "151 kB"),
        (3_000_000, "3 MB"),
        (999_400, "999 kB"),
        (999_999, "1 MB"),
        (999_999_999_999, "1 TB"),
        (10**6, "1 MB"),
        (10**9, "1 GB"),
        (10**18, "1e+06 TB"),
    ],
)
def test_bytes(size: int, text: str) -> None:
    assert report.bytes_text(size) == text


@pytest.mark.parametrize(
    ("joules", "text"), [(0.9996, "1 J"), (0.0123, "12.3 mJ"), (999.6e-6, "1 mJ"), (4e-6, "4 µJ"), (math.nan, "?")]
)
def test_joules(joules: float, text: str) -> None:
    assert units.joules_text(joules) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (123_456, "123000"), (999_999, "1000000"), (2e7, "2e+07")]
)
def test_numbers_have_no_exponent_up_to_a_million(value: float, text: str) -> None:
    assert units.number_text(value) == text


def test_long_models_are_drawn_in_groups_that_end_at_the_stars() -> None:
    blocks = nn.Sequential(*(nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))) for _ in range(8))).eval()
    graph = ts.trace(blocks, torch.rand(1, 4))
    groups = layer_runs(graph, keep=[15])
    assert [i for g in groups for i in g] == list(range(80))
    assert len(groups) <= MOST_RUNS + 1
    assert any(g[-1] == 14 for g in groups)


def test_a_long_flat_model_is_drawn_in_even_runs_with_names_of_their_own() -> None:
    graph = ts.trace(nn.Sequential(*(nn.ReLU() for _ in range(200))).eval(), torch.rand(1, 4))
    runs = layer_runs(graph)
    assert [i for run in runs for i in run] == list(range(200))
    assert len(runs) == MOST_RUNS
    assert {len(run) for run in runs} <= {7, 8}
    assert len(set(run_labels(graph, runs))) == len(runs)


@pytest.mark.parametrize("layers", [1, 2, 5, 60])
def test_every_cut_has_one_place_in_a_picture_and_both_ends_their_own(layers: int) -> None:
    graph = ts.trace(nn.Sequential(*(nn.ReLU() for _ in range(layers))).eval(), torch.rand(1, 4))
    profile = even_profile(graph)
    rows = LayerCosts(graph, profile, profile).rows()
    runs = cut_runs(graph, rows)
    assert [row for run in runs for row in run.rows] == rows
    assert [i for run in runs for i in run.layers] == list(range(layers))
    assert (runs[0].label, [row.index for row in runs[0].rows]) == ("all on server", [0])
    assert (runs[-1].label, [row.index for row in runs[-1].rows]) == ("all on device", [layers])


def even_profile(graph: ts.LayerGraph, joules: bool = False) -> ts.LayerProfile:
    count = len(graph.layers)
    names = tuple(layer.name for layer in graph.layers)
    samples = np.full((1, count), 1e-3)
    energy = LayerEnergy("recorded", 0.0, np.ones(count), np.ones((count, 2)), (count,) * 3) if joules else None
    return ts.LayerProfile("Sequential", graph.fingerprint, 1, names, samples, samples.sum(1), {}, energy=energy)


@pytest.mark.parametrize(
    ("objective", "limits"),
    [
        ("latency", {}),
        ("energy", {}),
        ("throughput", {"latency_s": 0.2}),
        ("latency", {"server_allowed": False}),
        ({"latency": 1, "energy": 0.1}, {"raw_input": False}),
    ],
)
@pytest.mark.parametrize("joules", [True, False])
def test_plans_are_drawn(objective: Any, limits: dict[str, Any], joules: bool, tmp_path: Path) -> None:
    if not joules and "energy" in objective:
        return
    model = nn.Sequential()
    for i in range(40):
        model.add_module(f"a${i}_{{$", nn.MaxPool1d(2) if i % 8 == 7 else nn.ReLU())  # no formula of matplotlib's
    graph = ts.trace(model.eval(), torch.rand(1, 3, 2048))
    link = ts.Link("a $link", 2e6, 2e6, 0.01, radio=ts.Radio(1e-7, 1e-7, 1.0))
    device = even_profile(graph, joules)
    plan = ts.plan(graph, device=device, server=device.scaled(0.1), link=link, objective=objective, **limits)
    report.plan_picture(graph, plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    graph = ts.trace(nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 2)).eval(), torch.rand(1, 4))
    samples = np.array([[1e-3, 1e-4, 2e-3]])
    profile = ts.LayerProfile("Sequential", graph.fingerprint, 1, ("0", "1", "2"), samples, samples.sum(1), {})
    path = tmp_path / "layers.png"
    report.layer_picture("test", graph, [("device", profile)], [("lte", 0), ("3g", 3)], path)
    assert path.stat().st_size > 10_000


def test_an_unknown_picture_format_is_named_with_those_there_are(tmp_path: Path) -> None:
    graph = ts.trace(nn.Sequential(nn.ReLU()).eval(), torch.rand(1, 4))
    profile = even_profile(graph)
    with pytest.raises(ts.TorchSurgeonError, match=r"'xyz'; end it in one of .*png"):
        report.profile_picture(graph, profile, tmp_path / "picture.xyz")


def test_the_best_way_and_its_objective_fit_a_narrow_terminal() -> None:
    graph = ts.trace(nn.Sequential(*(nn.ReLU() for _ in range(3))).eval(), torch.rand(1, 4))
    profile = even_profile(graph)
    wish = {"latency": 1.0, "server_time": 0.5}
    found = ts.plan(graph, device=profile, server=profile, link=ts.Link.parse("lte"), objective=wish)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.plan_table(found))
    text = console.export_text()
    assert "★ all on" in text
    assert "sum" in text
    assert "…" not in text


def deep(name: str, times: int) -> nn.Module:
    """Layers whose names only differ at their ends."""
    model: nn.Module = nn.Sequential(nn.ReLU(), nn.Hardswish(), nn.ReLU6())
    for _ in range(times):
        model = nn.Sequential(OrderedDict([(name, model)]))
    return model.eval()


def shown(table: FittingTable, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("joules", [False, True])
def test_a_narrow_terminal_cuts_names_in_their_middle_and_no_figure(joules: bool, tmp_path: Path) -> None:
    graph = ts.trace(deep("encoder_layer", 5), torch.rand(1, 4))
    profile = even_profile(graph, joules)
    predicted = dataclasses.replace(profile, interval_s=np.array([[1.23e-4, 4.56e-4]] * 3))
    lines = [f"{3 + i},8,{64 + i},36,9,{1 + i / 100}" for i in range(30)]
    (tmp_path / "conv.csv").write_text("\n".join(["in_channels,out_channels,in_size,out_size,kernel,ms", *lines]))
    predictor = ts.Predictor.from_csv({"conv": tmp_path / "conv.csv"}, "a board")
    for table, figures in (
        (report.prediction_table(graph, predictor, predicted, profile), ["123 µs … 456 µs", "+0%", "roofline"]),
        (report.profile_table(graph, profile), ["33.3%"]),
        (report.graph_table(graph), ["N×4"]),
    ):
        for width, cut in ((80, True), (160, False)):
            text = shown(table, width)
            rows = [line for line in text.splitlines() if line.split() and line.split()[0] in ("1", "2", "3")]
            assert len(rows) == 3
            for index, (row, layer) in enumerate(zip(rows, graph.layers, strict=True)):
                name = row.split()[1]
                assert name.endswith(str(index))
                assert name.startswith("e")
                assert (name != layer.name) == ("…" in name) == cut, name
                assert (layer.type in row) != cut
                for figure in figures:
                    assert figure in row, (width, row)


def test_nothing_in_a_picture_overlaps_or_is_squeezed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Long names, a cut within a block, and a chosen bar that is much shorter than the others."""
    blocks = nn.Sequential()
    for i in range(40):
        blocks.add_module(f"encoder_layer_{i}", deep("self_attention", 2) if i == 20 else nn.MaxPool2d((1, 2 - i % 2)))
    model = nn.Sequential(OrderedDict([("a_long_name_of_the_encoder", blocks)])).eval()
    graph = ts.trace(model, torch.rand(1, 1, 1, 2**21))
    device = even_profile(graph, joules=True)
    server = device.scaled(1e-3)
    link = ts.Link("fast", 1e9, 1e9, 0.001, radio=ts.Radio(1e-9, 1e-9, 1.0))
    plan = ts.plan(graph, device=device, server=server, link=link)
    sweep = ts.planning.sweep(plan.frontier, link, [1e6, 1e7, 1e9], [1.0, 10.0], "latency")
    stars = [("lte, wifi, 5g-mmwave", 21), ("3g", len(graph.layers))]
    drawn: list[Any] = []
    for module in (pictures, plan_pictures):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    report.profile_picture(graph, device, tmp_path)
    report.layer_picture("a model", graph, [("device", device), ("server", server)], stars, tmp_path)
    report.plan_picture(graph, plan, tmp_path)
    report.sweep_picture(sweep, tmp_path)
    assert len(drawn) == 4
    for figure in drawn:
        figure.canvas.draw()
        draw = figure.canvas.get_renderer()
        panels = [axis.get_window_extent(draw) for axis in figure.axes]
        assert sum({round(panel.y0): panel.height for panel in panels}.values()) > 0.45 * figure.bbox.height
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        texts = [figure._suptitle, *(axis.title for axis in figure.axes if axis.title.get_text()), *legends]
        texts += [axis.xaxis.label for axis in figure.axes if axis.xaxis.label.get_text()]
        boxes = [text.get_window_extent(draw) for text in texts]
        for box, others in ((box, [*boxes[:i], *panels]) for i, box in enumerate(boxes)):
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert not any(box.padded(-1).overlaps(other) for other in others)
        for axis in figure.axes:
            ticks = axis.yaxis.get_majorticklabels() + axis.yaxis.get_minorticklabels()
            shown = [tick.get_window_extent(draw) for tick in ticks if tick.get_text()]
            seen = sorted(
                (box for box in shown if axis.bbox.y0 <= box.y0 and box.y1 <= axis.bbox.y1), key=lambda box: box.y0
            )
            assert all(low.y1 <= high.y0 + 2 for low, high in itertools.pairwise(seen)), "labels at an axis overlap"
    star = next(line for line in drawn[2].axes[0].lines if line.get_marker() == "*")
    at = pytest.approx(star.get_xdata()[0] - 0.4)
    bars = [bar.get_window_extent() for bar in drawn[2].axes[0].patches if bar.get_x() == at]
    assert len(bars) >= 3
    assert star.get_window_extent().y0 > max(bar.y1 for bar in bars) - 1, "the star hides the chosen bar"


def test_layers_of_a_profile_by_a_backend_are_called_estimates() -> None:
    graph = ts.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.rand(1, 8))
    profile = ts.profile(graph, meter=None, backend="onnxruntime", budget_s=0.0)
    console = Console(file=io.StringIO(), width=120)
    console.print(report.profile_table(graph, profile))
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "by onnxruntime" in shown
    assert "estimate" in shown
    assert "quartiles" not in shown
    assert "No layer was" in shown
