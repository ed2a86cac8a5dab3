"""Where cutting EfficientNet-Lite0 in between beats running all of it on either side, within 3 % of the answers.

From one profile of this machine, and the sizes, times and kept answers that ``benchmarks.codec_rates`` found, the
package's own planner chooses the best way at each uplink from 0.1 to 100 Mbit/s and each slow-down of the device from 1
to 100, both logarithmic, with a round trip of 30 ms. Both ends are there in their best form: all on the server with
every picture format that keeps the budget, at every quality and size. A cut counts where it is at least 2 % better than
both ends. The table in docs/planning.md is written, too.

    python -m benchmarks.split_plane              # from the profile in split-plane.json
    python -m benchmarks.split_plane --measure    # from a new one
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchsurgeon as ts
from benchmarks import codec_rates
from benchmarks.support import pictures, result_file
from torchsurgeon.codec import CodecTable
from torchsurgeon.codec.table import CodecCost, CodecRow
from torchsurgeon.demo.winners import winners, winners_picture
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Frontier, Row, Sweep
from torchsurgeon.profiling import LayerProfile, profile
from torchsurgeon.tracing.graph import LayerGraph

OUT = result_file.RESULTS / "split-plane.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- figures, by benchmarks.split_plane -->", "<!-- end of figures -->"
MODEL = "lite0"
ROUND_TRIP_S = 0.030
DEVICE_W = 3.0
"""An assumption, since this machine has no meter: what a small board takes above idle while one core computes."""
OBJECTIVES = {"one picture at a time": "latency", "a stream": "throughput"}
ENERGY = {"one picture, with LTE's tail": False, "a stream, without": True}
SCENARIOS = {
    "boundaries as they are": ("raw", "zstd"),
    "int8+zstd": ("raw", "zstd", "int8+zstd", "int4+zstd"),
    "fitted": ("raw", "zstd", "int8+zstd", "int4+zstd", "fitted"),
    "student": ("raw", "zstd", "int8+zstd", "int4+zstd", "fitted", "student"),
}
"""With which codecs boundaries may cross. Those that were not measured are left out."""
PICTURES = {"pictures take what encoding them takes": 1.0, "pictures are encoded in no time": 0.0}
"""What the seconds of encoding pictures are multiplied with: a camera may have an encoder of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results; the picture lies beside it")
    parser.add_argument("--rates", type=Path, default=codec_rates.OUT, help="what benchmarks.codec_rates wrote")
    parser.add_argument("--measure", action="store_true", help="profile the model on this machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = pictures.photographs(pictures.side(MODEL))
    graph = ts.trace(pictures.classifier(MODEL), found.held_out[:1])
    if options.measure or not options.out.exists():
        layers = measured_profile(graph, found.held_out[:1])
    else:
        layers = LayerProfile.from_json(json.loads(options.out.read_text())["results"]["profile"])
    rows = json.loads(options.rates.read_text())["results"][MODEL]["rates"]
    measured = {row["curve"] for row in rows if row["where"] != "input"} | {"raw"}
    results: dict[str, Any] = {"round_trip_s": ROUND_TRIP_S, "device_w": DEVICE_W, "planes": {}}
    drawn: list[tuple[str, Sweep]] = []
    for scenario, codecs in SCENARIOS.items():
        if codecs[-1] not in measured:
            continue
        chosen = [row for row in rows if row["where"] == "input" or row["curve"] in codecs]
        for pictures_take, factor in PICTURES.items():
            for how, kept in (("as measured", "kept"), ("surely", "low")):
                table = codec_table(graph, chosen, kept, factor)
                planes = compute(Frontier.build(graph, layers, layers, table))
                name = f"{scenario}; 97 % kept {how}; {pictures_take}"
                results["planes"][name] = {plane: described(found) for plane, found in planes.items()}
                print(name)
                for plane, found in planes.items():
                    print(f"    {plane}: {found.summary()}")
                if kept == "kept" and factor:
                    drawn = [(plane, planes[plane]) for plane in OBJECTIVES]
    results["profile"] = layers.to_json()
    result_file.write(options.out, results)
    title = "EfficientNet-Lite0, 97 % of its answers kept: the best way to run it (round trip 30 ms)"
    winners_picture(drawn, title, options.out.with_suffix(".png"), name=words)
    if options.out == OUT:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{page(results['planes'])}\n{END}{rest.partition(END)[2]}")


def measured_profile(graph: LayerGraph, picture: Tensor, repeats: int = 30) -> LayerProfile:
    """Return a profile of this machine whose layers add up to the process's own seconds for the whole model.

    Codecs are measured in the process's own seconds, too, so other programs that run meanwhile change neither.

    Args:
        graph: the traced model.
        picture: its input.
        repeats: how often layers and model are timed.
    """
    layers = profile(graph, inputs=[picture], repeats=repeats, meter=None)
    own_s = []
    with torch.no_grad():
        for _ in range(repeats):
            begin_s = time.process_time()
            graph.model(picture)
            own_s.append(time.process_time() - begin_s)
    return layers.scaled(statistics.median(own_s) / layers.total_s)


def compute(frontier: Frontier) -> dict[str, Sweep]:
    """Return the planes of one set of ways: latency and throughput, and the device's joules in both cases."""
    lte = PRESETS["lte"]
    link = Link("varied", lte.uplink_bit_s, lte.downlink_bit_s, ROUND_TRIP_S, radio=lte.radio)
    planes = {name: winners(frontier, link, objective) for name, objective in OBJECTIVES.items()}
    for name, streams in ENERGY.items():
        over = link.back_to_back() if streams else link
        planes[f"energy: {name}"] = winners(frontier, over, "energy", device_w=DEVICE_W)
    return planes


def codec_table(
    graph: LayerGraph,
    rows: list[dict[str, Any]],
    kept: str,
    pictures_factor: float,
    budget: float = codec_rates.BUDGET,
) -> CodecTable:
    """Return measured rates as the planner takes them.

    Args:
        graph: the traced model.
        rows: the rates, as ``benchmarks.codec_rates`` wrote them.
        kept: which figure has to keep the budget: ``"kept"``, the measured share, or ``"low"``, its lower bound.
        pictures_factor: what the seconds of encoding pictures are multiplied with.
        budget: the share of answers that may change.
    """
    lines = []
    may = [(row["curve"], row["name"], row["where"]) for row in codec_rates.allowed(rows, kept, budget)]
    for row in rows:
        point = graph.point(row["point"])
        within = (row["curve"], row["name"], row["where"]) in may
        name = (
            row["name"] if row["name"].startswith(row["curve"]) or not point.index else f"{row['curve']}, {row['name']}"
        )
        encode_s = row["encode_s"] * (1.0 if point.index else pictures_factor)
        cost = CodecCost(name, row["size_bytes"], encode_s, row["decode_s"], row["lossless"], within_budget=within)
        lines.append(CodecRow(point.index, point.name, float(point.size_bytes), cost))
    words = f"at most {budget:.0%} of predictions change"
    return CodecTable(type(graph.model).__name__, graph.fingerprint, 1, rows[0]["pictures"], words, tuple(lines))


def page(planes: dict[str, dict[str, Any]]) -> str:
    """Return the table for the page, as Markdown."""
    names = list(next(iter(planes.values())))
    lines = ["| boundaries cross as | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for scenario, found in planes.items():
        cells = [
            f"{plane['share']:.0%}, {plane['mean_gain']:.2f}×, {plane['most_gain']:.1f}×" for plane in found.values()
        ]
        lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def described(plane: Sweep) -> dict[str, Any]:
    """Return what is said of a plane: its summary, and how much of it each way wins."""
    shares: dict[str, float] = {}
    for row in plane.winners:
        shares[words(row)] = shares.get(words(row), 0.0) + float((plane.chosen == plane.rows.index(row)).mean())
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return {**plane.summary(), "winners": {text: round(share, 4) for text, share in ordered}}


def words(row: Row) -> str:
    """Return a row in words, with blocks for layers."""
    if row.on_device:
        return "all on the device"
    if row.index == 0:
        return f"all on the server, {row.codec}"
    block = re.search(r"blocks\.(\d+)", row.name)
    return f"cut after {f'block {block[1]}' if block else row.name}, {row.codec}"


if __name__ == "__main__":
    main()
