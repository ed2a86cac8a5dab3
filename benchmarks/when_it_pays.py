"""What every way to run a network costs, for the page on which a reader moves sliders: docs/when-it-pays.md.

Networks of today are profiled on this machine, on one thread, by eager PyTorch and by ONNX Runtime, with what codecs
make of every boundary. EfficientNet-Lite0 and Lite2 are trained, so their codecs may lose something, as it was measured
by ``benchmarks.codec_rates``; Lite0 has the eager profile of ``benchmarks.split_plane``. For the others codecs lose
nothing. The paper's applications cost what its authors measured (``benchmarks.evaluate``). Of all rows, those of the
planner's frontier are kept: those that can be the best over some link, for some device.

    python -m benchmarks.when_it_pays                        # the paper's applications anew; takes a second
    python -m benchmarks.when_it_pays --measure ResNet-50    # and these networks, some minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks import codec_rates, split_plane
from benchmarks.evaluate import end_to_end
from benchmarks.evaluate.configurations import Application
from benchmarks.support import pictures, result_file
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable, measure
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Frontier, Row
from torchsurgeon.planning.grid import LEAST_GAIN
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph

OUT = result_file.RESULTS / "when-it-pays.json"
TRAINED = {"EfficientNet-Lite0": "lite0", "EfficientNet-Lite2": "lite2"}
TODAY = ("MobileNetV3", "AlexNet", "ResNet-50", "SSDlite", "ViT-B/16", "BERT")
PAPER = {
    "imc": "AlexNet (2015)",
    "vgg": "VGG-19 (2015)",
    "face": "DeepFace (2015)",
    "dig": "LeNet, 100 digits (2015)",
    "asr": "Kaldi's speech network (2015)",
}
"""The paper's applications of vision and speech; those of language take about as long as one packet."""
COLUMNS = ("index", "where", "codec", "budget", "device_s", "size_bytes", "server_s")
"""What is kept of a row. ``budget`` is the place in ``BUDGETS`` of the first that it keeps."""
BUDGETS = ("lossless", "surely", "as measured")
_KEPT = {"surely": "low", "as measured": "kept"}
EAGER, BEST, PUBLISHED = "eager", "onnxruntime", "as published"
"""By what both sides run: eager PyTorch, each part by the quicker of that and ONNX Runtime, the paper's frameworks."""
_REPEATS = 10
_BUDGET_S = 10.0


def trained(name: str) -> dict[str, Any]:
    """Return the ways to run a network with its trained weights."""
    short = TRAINED[name]
    side = pictures.side(short)
    picture = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    graph = ts.trace(pictures.classifier(short), picture)
    if short == split_plane.MODEL:
        eager = LayerProfile.from_json(result_file.known(split_plane.OUT)["profile"])
    else:
        eager = split_plane.measured_profile(graph, picture)
    known = ("raw", *split_plane.SCENARIOS["fitted"])
    rates = [
        row
        for row in result_file.known(codec_rates.OUT)[short]["rates"]
        if row["where"] == "input" or row["curve"] in known
    ]
    lossless = [row for row in rates if row["lossless"]]
    tables = {"lossless": split_plane.codec_table(graph, lossless, "kept", 1.0)}
    tables |= {budget: split_plane.codec_table(graph, rates, kept, 1.0) for budget, kept in _KEPT.items()}
    ends = {codec_rates.after_block(graph, block) for block in range(_blocks(graph))}

    def where(row: Row) -> str:
        block = re.search(r"^net\.blocks\.(\d+)\.", row.name)
        return f"{'after' if row.index in ends else 'inside'} block {block[1]}" if block else _where(row)

    return measured("trained", graph, eager, tables, where)


def _blocks(graph: LayerGraph) -> int:
    found = [re.search(r"^net\.blocks\.(\d+)\.", point.name) for point in graph.points]
    return 1 + max(int(block[1]) for block in found if block)


def _where(row: Row) -> str:
    return f"after {row.name}" if row.layers is None else f"across the branches at {row.name}"


def today(name: str) -> dict[str, Any]:
    """Return the ways to run another network of today, where nothing that crosses loses a bit."""
    model, example = end_to_end.network(name)
    graph = ts.trace(model, example)
    eager = split_plane.measured_profile(graph, example, _REPEATS)
    table = measure(graph, [example], ["zstd"])
    if example.dtype == torch.uint8:
        table = dataclasses.replace(table, rows=(*_pictures(graph, example.shape[-1]), *table.rows))
    return measured("today", graph, eager, {"lossless": table}, _where)


def _pictures(graph: LayerGraph, side: int) -> list[CodecRow]:
    """Return what it takes to send a picture without loss: bytes and seconds a pixel are those of the photographs."""
    share = (side / pictures.side(split_plane.MODEL)) ** 2
    point = graph.points[0]
    return [
        CodecRow(
            *(0, point.name, float(point.size_bytes)),
            CodecCost(
                *(row["name"], share * row["size_bytes"], share * row["encode_s"], share * row["decode_s"]),
                *(True, True),
            ),
        )
        for row in result_file.known(codec_rates.OUT)[split_plane.MODEL]["rates"]
        if row["where"] == "input" and row["lossless"]
    ]


def measured(
    source: str,
    graph: LayerGraph,
    eager: LayerProfile,
    tables: Mapping[str, CodecTable],
    where: Callable[[Row], str],
) -> dict[str, Any]:
    """Return what the page knows of a network that was measured here.

    Args:
        source: how the page calls networks of its kind.
        graph: the traced network.
        eager: what its layers take in eager PyTorch.
        tables: by budget what codecs make of its boundaries.
        where: where a row cuts, in words.
    """
    fast = ts.profile(graph, backend=BEST, eager=eager, budget_s=_BUDGET_S, meter=None)
    ways: dict[str, dict[tuple[Any, ...], list[Any]]] = {}
    for runtime, profiles in ((EAGER, [eager]), (BEST, [eager, fast])):
        found = ways.setdefault(runtime, {})
        for level, table in enumerate(tables.values()):
            for row in Frontier.build(graph, profiles, profiles, table).rows:
                device_s, server_s = rounded(row.head_s + row.encode_s), rounded(row.tail_s + row.decode_s)
                described = [row.index, where(row), row.codec, level, device_s, round(row.size_bytes, 1), server_s]
                found.setdefault((row.index, row.layers, row.codec), described)
    return {
        "source": source,
        "layers": len(graph.layers),
        "answer_bytes": sum(spec.size_bytes for spec in graph.outputs),
        "rows": {name: sorted(found.values(), key=lambda row: (row[0], row[3])) for name, found in ways.items()},
    }


def paper(name: str) -> dict[str, Any]:
    """Return the ways to run one of the paper's applications on a Tegra K1's GPU and a Tesla K40."""
    application = Application.read(name)
    count = len(application.layers)
    sizes = [*application.sizes_bytes[:-1].tolist(), 0.0]
    rows = []
    for k, layer in enumerate(("input", *application.layers)):
        head_s, tail_s = (sum(own) for own in (application.seconds["gpu"][:k], application.seconds["server"][k:]))
        rows.append([k, f"after {layer}", "raw", 0, rounded(head_s), sizes[k], rounded(tail_s)])
    answer_bytes = int(application.sizes_bytes[-1])
    return {"source": "paper", "layers": count, "answer_bytes": answer_bytes, "rows": {PUBLISHED: rows}}


def rounded(value: float) -> float:
    """Return a number with the digits that a file needs."""
    return float(f"{value:.5g}")


def frontier(model: Mapping[str, Any], budget: str, runtime: str) -> Frontier:
    """Return the ways of a network that keep a budget, for the planner to choose among.

    Args:
        model: what the file of results holds of it.
        budget: one of ``BUDGETS``.
        runtime: by what both sides run.
    """
    rows = tuple(
        Row(
            *(index, where, codec, device_s, 0.0, size_bytes, server_s, 0.0),
            lossless=not level,
            on_device=index == model["layers"],
        )
        for index, where, codec, level, device_s, size_bytes, server_s in model["rows"][runtime]
        if level <= BUDGETS.index(budget)
    )
    return Frontier("", "", 1, model["layers"], model["answer_bytes"], rows)


def link(uplink_bit_s: float, round_trip_s: float) -> Link:
    """Return the link of a position of the page's sliders: its downlink has LTE's ratio to its uplink."""
    return dataclasses.replace(PRESETS["lte"], round_trip_s=round_trip_s).with_uplink(uplink_bit_s)


def write(models: Mapping[str, Any]) -> None:
    """Write the file of results, each row on a line of its own."""
    ratio = PRESETS["lte"].downlink_bit_s / PRESETS["lte"].uplink_bit_s
    known = {"columns": COLUMNS, "budgets": BUDGETS, "downlink_ratio": ratio, "least_gain": LEAST_GAIN}
    result_file.write(OUT, {**known, "models": models})
    written = OUT.read_text()
    short = re.sub(r"\[\n\s+((?:[^\[\]\n]+\n\s*)+)\]", lambda found: "[" + " ".join(found[1].split()) + "]", written)
    assert json.loads(short) == json.loads(written)
    OUT.write_text(short)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*TRAINED, *TODAY)
    parser.add_argument("--measure", nargs="+", choices=names, default=[], help="measure these networks here")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ts.NoisyProfileWarning)
    models = result_file.known(OUT).get("models", {})
    models |= {title: paper(name) for name, title in PAPER.items()}
    for name in options.measure:
        begun_s = time.monotonic()
        models[name] = trained(name) if name in TRAINED else today(name)
        print(f"{name}: measured in {time.monotonic() - begun_s:.0f} s", flush=True)
        write({one: models[one] for one in (*names, *PAPER.values()) if one in models})
    if not options.measure:
        write({one: models[one] for one in (*names, *PAPER.values()) if one in models})


if __name__ == "__main__":
    main()
