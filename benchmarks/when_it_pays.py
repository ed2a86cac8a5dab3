"""What every way to run a network costs, for the page on which a reader moves sliders: docs/when-it-pays.md.

EfficientNet-Lite0 with its trained weights costs what ``benchmarks.split_plane`` and ``benchmarks.codec_rates`` have
measured. The paper's applications cost what its authors measured (``benchmarks.evaluate``). Other networks of today are
profiled on this machine, on one thread, and codecs without loss are measured at every boundary. Of all rows, those of
the planner's frontier are kept: those that can be the best over some link, for some device.

    python -m benchmarks.when_it_pays                        # from what was measured before
    python -m benchmarks.when_it_pays --measure ResNet-50    # profile these networks anew
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks import codec_rates, split_plane
from benchmarks.evaluate import end_to_end
from benchmarks.evaluate.configurations import Application
from benchmarks.support import pictures, result_file
from torchsurgeon.codec import measure
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Frontier, Row
from torchsurgeon.planning.grid import LEAST_GAIN
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph

OUT = result_file.RESULTS / "when-it-pays.json"
TRAINED = "EfficientNet-Lite0"
TODAY = ("MobileNetV3", "ResNet-50", "SSDlite", "Swin-T", "ViT-B/16", "BERT", "Whisper encoder")
PAPER = {
    "imc": "AlexNet (images)",
    "vgg": "VGG-19 (images)",
    "face": "DeepFace (faces)",
    "dig": "LeNet (100 digits)",
    "asr": "Kaldi (speech)",
}
"""The paper's applications of vision and speech; those of language take about as long as one packet."""
COLUMNS = ("index", "where", "codec", "budget", "device_s", "size_bytes", "server_s")
"""What is kept of a row. ``budget`` is the first of ``BUDGETS`` that it keeps."""
BUDGETS = ("lossless", "surely", "as measured")
KEPT = {"surely": "low", "as measured": "kept"}
"""By budget the figure of ``benchmarks.codec_rates`` that must keep it."""
_CODECS = ("raw", "zstd", "int8+zstd", "int4+zstd", "fitted")
_REPEATS = 10


def trained() -> dict[str, Any]:
    """Return the ways to run EfficientNet-Lite0, from what was measured before."""
    graph = ts.trace(pictures.classifier(split_plane.MODEL), torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    layers = LayerProfile.from_json(result_file.known(split_plane.OUT)["profile"])
    rates = [
        row
        for row in result_file.known(codec_rates.OUT)[split_plane.MODEL]["rates"]
        if row["where"] == "input" or row["curve"] in _CODECS
    ]
    budgets = {
        "lossless": split_plane.codec_table(graph, [row for row in rates if row["lossless"]], "kept", 1.0),
        **{budget: split_plane.codec_table(graph, rates, kept, 1.0) for budget, kept in KEPT.items()},
    }
    ends = {codec_rates.after_block(graph, block) for block in range(_blocks(graph))}
    ways: dict[tuple[Any, ...], list[Any]] = {}
    for level, budget in enumerate(BUDGETS):
        for row in Frontier.build(graph, layers, layers, budgets[budget]).rows:
            block = re.search(r"^net\.blocks\.(\d+)\.", row.name)
            where = None if block is None else f"{'after' if row.index in ends else 'inside'} block {block[1]}"
            ways.setdefault((row.index, row.layers, row.codec), described(row, level, where))
    return model_of("trained", graph, list(ways.values()))


def _blocks(graph: LayerGraph) -> int:
    found = [re.search(r"^net\.blocks\.(\d+)\.", point.name) for point in graph.points]
    return 1 + max(int(block[1]) for block in found if block)


def today(name: str) -> dict[str, Any]:
    """Return the ways to run another network of today, measured here."""
    model, example = end_to_end.network(name)
    graph = ts.trace(model, example)
    layers = split_plane.measured_profile(graph, example, repeats=_REPEATS)
    codecs = ["zstd", "png"] if example.dtype == torch.uint8 else ["zstd"]
    table = measure(graph, [example], codecs, points=range(len(graph.layers)))
    rows = Frontier.build(graph, layers, layers, table).rows
    return model_of("today", graph, [described(row, 0) for row in rows])


def paper(name: str) -> dict[str, Any]:
    """Return the ways to run one of the paper's applications on a Tegra K1's GPU and a Tesla K40, as measured then."""
    application = Application.read(name)
    heads_s = [float(sum(application.seconds["gpu"][:k])) for k in range(len(application.layers) + 1)]
    tails_s = [float(sum(application.seconds["server"][k:])) for k in range(len(application.layers) + 1)]
    sizes = [*application.sizes_bytes[:-1].tolist(), 0.0]
    names = ("input", *application.layers)
    rows = [
        [k, f"after {name}", "raw", 0, rounded(head_s), size, rounded(tail_s)]
        for k, (name, head_s, size, tail_s) in enumerate(zip(names, heads_s, sizes, tails_s, strict=True))
    ]
    answer_bytes = int(application.sizes_bytes[-1])
    return {"source": "paper", "layers": len(application.layers), "answer_bytes": answer_bytes, "rows": rows}


def described(row: Row, level: int, where: str | None = None) -> list[Any]:
    """Return a row as ``COLUMNS`` has it.

    Args:
        row: the row.
        level: the place in ``BUDGETS`` of the first budget that it keeps.
        where: where it cuts, in words; None for the layer's name.
    """
    if where is None:
        where = f"after {row.name}" if row.layers is None else f"across the branches at {row.name}"
    device_s, server_s = rounded(row.head_s + row.encode_s), rounded(row.tail_s + row.decode_s)
    return [row.index, where, row.codec, level, device_s, round(row.size_bytes, 1), server_s]


def model_of(source: str, graph: LayerGraph, rows: Sequence[list[Any]]) -> dict[str, Any]:
    """Return what the page knows of a network."""
    answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
    ordered = sorted(rows, key=lambda row: (row[0], row[3]))
    return {"source": source, "layers": len(graph.layers), "answer_bytes": answer_bytes, "rows": ordered}


def rounded(value: float) -> float:
    """Return a number with the digits that a file needs."""
    return float(f"{value:.5g}")


def planner_rows(model: dict[str, Any], budget: str) -> list[Row]:
    """Return the ways of a network that keep a budget, as the planner knows them.

    Args:
        model: what the file of results holds of it.
        budget: one of ``BUDGETS``.
    """
    return [
        Row(
            index,
            where,
            codec,
            device_s,
            0.0,
            size,
            server_s,
            0.0,
            lossless=not level,
            on_device=index == model["layers"],
        )
        for index, where, codec, level, device_s, size, server_s in model["rows"]
        if level <= BUDGETS.index(budget)
    ]


def frontier(model: dict[str, Any], budget: str) -> Frontier:
    """Return the ways of a network that keep a budget, for the planner to choose among."""
    return Frontier("", "", 1, model["layers"], model["answer_bytes"], tuple(planner_rows(model, budget)))


def link(uplink_bit_s: float, round_trip_s: float) -> Link:
    """Return the link of a position of the page's sliders: its downlink has LTE's ratio to its uplink."""
    return dataclasses.replace(PRESETS["lte"], round_trip_s=round_trip_s).with_uplink(uplink_bit_s)


def write(models: dict[str, Any]) -> None:
    """Write the file of results, each row on a line of its own."""
    lte = PRESETS["lte"]
    ratio = lte.downlink_bit_s / lte.uplink_bit_s
    known = {"columns": COLUMNS, "budgets": BUDGETS, "downlink_ratio": ratio, "least_gain": LEAST_GAIN}
    result_file.write(OUT, {**known, "models": models})
    lines = re.sub(
        r"\[\n\s+((?:[^\[\]\n]+\n\s*)+)\]", lambda found: "[" + " ".join(found[1].split()) + "]", OUT.read_text()
    )
    assert json.loads(lines) == json.loads(OUT.read_text())
    OUT.write_text(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", choices=TODAY, default=[], help="profile these networks here")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    torch.set_num_threads(1)
    models = result_file.known(OUT).get("models", {})
    models[TRAINED] = trained()
    for name in options.measure:
        begun_s = time.monotonic()
        models[name] = today(name)
        print(f"{name}: {len(models[name]['rows'])} ways, found in {time.monotonic() - begun_s:.0f} s", flush=True)
    models |= {title: paper(name) for name, title in PAPER.items()}
    write({name: models[name] for name in (TRAINED, *TODAY, *PAPER.values()) if name in models})


if __name__ == "__main__":
    main()
