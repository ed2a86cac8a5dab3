"""On a terminal of any width each row of a table is one line, and names of different layers stay different."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from frontiers import frontier
from rich.console import Console
from torch import nn

import torchsurgeon as ts
from torchsurgeon import report, simulate
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable, Finding
from torchsurgeon.codec.table import Difference
from torchsurgeon.cutting.doctor import examine
from torchsurgeon.link import WIRED
from torchsurgeon.planning import Frontier, sweep
from torchsurgeon.prediction import load_device
from torchsurgeon.profiling import LayerEnergy, LayerProfile
from torchsurgeon.report.narrow import CHOSEN, Column, FittingTable, names, shortened

WIDTHS = [160, 120, 80, 60, 40]
# Names of layers as DenseNet-201, BERT, ViT-B/16 and Swin have them.
LAYERS = [
    *(
        f"features.denseblock{b}.denselayer{i}.{x}"
        for b in range(1, 5)
        for i in (1, 11, 48)
        for x in ("conv2", "norm1")
    ),
    *(f"encoder.layer.{i}.attention.self.{x}" for i in range(12) for x in ("query", "value")),
    *(f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(12) for j in range(5)),
    *(f"features.{i}.{j}.attn.permute_{k}" for i in range(8) for j in range(2) for k in range(3)),
]


def block(depth: int) -> nn.Module:
    """Layers with names as long as those of real models, one of which Rich would take for markup."""
    if not depth:
        layers = nn.Sequential(nn.Conv2d(4, 4, 1))
        layers.add_module("relu[bold]", nn.ReLU())
        return layers
    made = nn.Sequential()
    for i in (8, 24):
        made.add_module(f"denselayer{i}", block(depth - 1))
    made.add_module("pool", nn.MaxPool2d(2))
    return made


MODEL, EXAMPLE = nn.Sequential(block(3)).eval(), torch.rand(1, 4, 256, 256)
GRAPH = ts.trace(MODEL, EXAMPLE)
COUNT = len(GRAPH.layers)


def profile_of(layer_s: float, joules: bool = False) -> LayerProfile:
    known = tuple(layer.name for layer in GRAPH.layers)
    samples = np.full((1, COUNT), layer_s) * np.linspace(1, 500, COUNT)
    ends_j = np.tile([1.123, 1.345], (COUNT, 1))
    energy = LayerEnergy("recorded", 0.0, np.full(COUNT, 1.234), ends_j, (50.0, 45.0, 55.0)) if joules else None
    fields: dict[str, Any] = {"energy": energy, "memory_bytes": np.full(COUNT, 1234567)}
    return LayerProfile("DenseNet", GRAPH.fingerprint, 1, known, samples, samples.sum(1), {}, **fields)


DEVICE, SERVER = profile_of(1.234e-3, joules=True), profile_of(1e-5)
CODECS = CodecTable(
    "DenseNet",
    GRAPH.fingerprint,
    1,
    20,
    "at most 1 % of predictions changed",
    tuple(
        CodecRow(
            point.index,
            point.name,
            point.size_bytes,
            CodecCost(codec, point.size_bytes / 5, 1.2345, 12e-3, False, True),
            Difference(0.1, 0.0123, 0.9999),
            (
                Finding("top-1 changed", 0.0123, 0.0234, 0.03, 200, True),
                Finding("cosine", 0.99999, 0.99998, 0.9, 200, True),
                Finding("accepted", 0.95, 0.92, 0.9, 200, True),
            ),
        )
        for point in GRAPH.points[1:-1]
        for codec in ("int8+zstd", "jpeg-75")
    ),
)


def plan_of(**options: Any) -> ts.Plan:
    link = ts.Link("slow", 1e6, 1e6, 0.01, radio=WIRED)
    return ts.plan(GRAPH, device=DEVICE, server=SERVER, link=link, **options)


def predicted(predictor: ts.Predictor, measured: LayerProfile | None = None) -> FittingTable:
    return report.prediction_table(GRAPH, predictor, predictor.predict(GRAPH), measured)


DESKTOP = load_device("xeon-1-thread")
SWEEP = sweep(
    Frontier.build(GRAPH, DEVICE, SERVER, CODECS),
    ts.Link("any", 1e6, 1e6, 0.01),
    np.geomspace(1e4, 1e9, 30).tolist(),
    np.geomspace(0.1, 100, 20).tolist(),
)
DIAGNOSIS = examine(MODEL, EXAMPLE)
# Each table with how many rows it has, up to the sum of a prediction. The doctor prints two, one below the other.
TABLES: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "graph": (lambda: report.graph_table(GRAPH), [COUNT + 1]),
    "profile": (lambda: report.profile_table(GRAPH, DEVICE), [COUNT]),
    "codecs": (lambda: report.codec_table(CODECS), [len(CODECS.rows)]),
    "calibration": (lambda: report.calibration_table(DESKTOP), [len(DESKTOP.fitted)]),
    "prediction": (lambda: predicted(DESKTOP), [COUNT]),
    "prediction beside a profile": (lambda: predicted(DESKTOP, DEVICE), [COUNT]),
    "bound": (lambda: predicted(load_device("jetson-orin-nano")), [COUNT]),
    "plan": (lambda: report.plan_table(plan_of()), [12]),
    "plan with codecs": (
        lambda: report.plan_table(plan_of(codecs=CODECS, objective={"latency": 1, "energy": 0.5})),
        [12],
    ),
    "explanation": (lambda: report.plan_explanation(plan_of(codecs=CODECS)), [15]),
    "sweep": (lambda: report.sweep_table(SWEEP), [len(np.unique(SWEEP.chosen))]),
    "simulation": (
        lambda: report.simulation_table(
            simulate.sustained(
                frontier(), ts.Link.parse("8/8/0"), 2, rate_per_s=30.0, limit_s=0.5, queries=1_000, replications=2
            )
        ),
        [2],
    ),
    "doctor": (
        lambda: report.diagnosis_text(DIAGNOSIS),
        [len(DIAGNOSIS.points_per_block), len(DIAGNOSIS.worthwhile)],
    ),
}


def shown(thing: object, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(thing)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_simulation_calls_cuts_as_plans_do() -> None:
    lines = shown(TABLES["simulation"][0](), 160)
    assert any("all on the server" in line for line in lines), lines
    assert not any(" input " in line for line in lines), lines


@pytest.mark.filterwarnings("ignore::torchsurgeon.PredictionWarning")
@pytest.mark.parametrize("name", TABLES)
def test_at_any_width_a_row_is_a_line_and_headers_are_whole(name: str) -> None:
    make, counts = TABLES[name]
    table = make()
    for width in WIDTHS:
        lines = shown(table, width)
        assert max(map(len, lines)) <= width, lines
        rules = [i for i, line in enumerate(lines) if "─" in line and not line.strip(" ─")]
        found = []
        for rule in rules:
            body = lines[rule + 1 :]
            found.append(min(i for i, line in enumerate([*body, ""]) if not line or "──" in line))
            assert "…" not in lines[rule - 1]
        assert found == counts, f"at {width} columns: {lines}"


@pytest.mark.parametrize("width", range(24, 100))
def test_figures_are_whole_where_they_are_shown_and_what_is_missing_is_said(width: int) -> None:
    figures = [f"{i} … {i + 1} ms" for i in range(len(LAYERS))]
    brief = Column("time", [f"{i} ms" for i in range(len(LAYERS))], rank=3, note="A note on time.")
    table = FittingTable(
        "A title",
        [
            Column("#", [str(i) for i in range(len(LAYERS))]),
            names("layer", LAYERS),
            Column("type", ["Conv2d"] * len(LAYERS), rank=1, left=True, note="A note on types."),
            Column("interval", figures, rank=2, instead=brief),
            Column("weights", ["12 kB"] * len(LAYERS), rank=4),
        ],
    )
    lines = shown(table, width)
    header = next(line for line in lines if line.split()[:1] == ["#"])
    rows = [line for line in lines if line.split() and line.split()[0].isdigit()]
    assert len(rows) == len(LAYERS)
    told = " ".join(" ".join(lines[lines.index(rows[-1]) + 1 :]).split())
    for i, row in enumerate(rows):
        assert ("interval" in header) == (figures[i] in row)
        assert ("time" in header) == (f" {i} ms" in row and figures[i] not in row)
        assert ("weights" in header) == row.endswith("12 kB")
        if "type" in header:
            assert LAYERS[i] in row, "a type is shown although a name is shortened"
    assert len({row.split()[1] for row in rows}) == len(LAYERS) or width < 26
    assert ("A note on types." in told) == ("type" in header)
    assert ("A note on time." in told) == ("time" in header)
    for column in ("type", "interval", "weights"):
        assert (column in header) != (column in told.partition("A wider terminal also shows: ")[2])


@pytest.mark.parametrize("most", range(18, 45))
def test_shortened_names_of_different_layers_stay_different(most: int) -> None:
    short = [shortened(name, most) for name in LAYERS]
    assert len(set(short)) == len(LAYERS)
    for name, text in zip(LAYERS, short, strict=True):
        assert len(text) <= most
        assert (text == name) == (len(name) <= most) == ("…" not in text)
        assert text.startswith(name[0])
        assert text.endswith(name.rpartition(".")[2])


@pytest.mark.parametrize(
    ("most", "text"),
    [
        (39, "features.denseblock3.denselayer24.conv2"),
        (38, "featur…denseblock3.denselayer24.conv2"),
        (30, "f…densebl…3.denselayer24.conv2"),
        (18, "f…d…3.den…24.conv2"),
    ],
)
def test_steps_of_a_name_are_shortened_from_the_left(most: int, text: str) -> None:
    assert shortened("features.denseblock3.denselayer24.conv2", most) == text


def test_a_mark_before_a_name_stays() -> None:
    assert shortened(f"{CHOSEN}features.denseblock3.conv2", 20).startswith(f"{CHOSEN}f…d")
    assert len(shortened(f"{CHOSEN}features.denseblock3.conv2", 20)) == 20


@pytest.mark.parametrize("most", range(9))
def test_any_text_can_be_shortened_to_any_length(most: int) -> None:
    for text in ("", "a", "all on the server", "a.b.c.d.e.f.g", "....", "123.456.789", *LAYERS):
        assert len(shortened(text, most)) <= most
