"""The planner's speed: building a frontier, deciding on it, and what deciding otherwise costs.

For each model, with six codecs at every partition point:

* ``build``: the frontier from profiles and codecs, cuts across parallel branches with it.
* ``best latency``, ``best throughput``: one decision on it. Ratios are to the first.
* ``scan``: the same decision by adding up every partition point, tensors sent as they are (``best(estimate(…))``).
* ``scan in NumPy``: the same over all points and codecs at once, profiles summed up beforehand.
* ``minimum cut, networkx`` and ``minimum cut, SciPy``: the same by a minimum s-t cut of the layers, the network made
  beforehand and its capacities set.

Profiles are measured on this machine, the device's ten times as slow. What codecs cost is made up (ratios and rates of
the order that docs/codecs.md reports), since only its amount matters here. Each round times every way once, in a new
random order; a decision's time is that of a loop of many over changing rates and loads. Printed are medians, quartiles
and the median of the rounds' ratios.

    python -m benchmarks.frontier [--rounds 15] [--out benchmarks/results/frontier.json]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import scipy
import torch
import torchvision

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable
from torchsurgeon.planning.mincut import MinimumCut
from torchsurgeon.planning.rows import LayerCosts, columns
from torchsurgeon.planning.sets import Units

MODELS = ("alexnet", "resnet50", "googlenet", "maxvit_t")
CODECS = (
    ("zstd", 1.4, 500e6, True),
    ("float16", 2.0, 4e9, False),
    ("float16+zstd", 2.6, 400e6, False),
    ("int8", 4.0, 2e9, False),
    ("int8+zstd", 5.6, 450e6, False),
)
BASE = "best latency"


def codecs_for(graph: ts.LayerGraph) -> CodecTable:
    rows = [
        CodecRow(p.index, p.name, size, CodecCost(name, size / ratio, size / rate, size / rate / 3, lossless, True))
        for p in graph.points
        for size in [p.size_bytes]
        for name, ratio, rate, lossless in CODECS
    ]
    return CodecTable(type(graph.model).__name__, graph.fingerprint, graph.batch, 1, "made up", tuple(rows))


def ways(
    graph: ts.LayerGraph, device: ts.LayerProfile, server: ts.LayerProfile
) -> dict[str, tuple[int, Callable[[ts.Link, float], Any]]]:
    """Each way to decide, with how often to repeat it in a round."""
    table = codecs_for(graph)
    frontier = ts.Frontier.build(graph, device, server, table)
    costs = LayerCosts(graph, device, server)
    everything = columns(costs.rows(table))
    answer_bytes = frontier.answer_bytes
    units = Units(costs)
    network = MinimumCut(0, len(units.layers), units.needs, units.costs, units.tensors)
    drawn = networkx.DiGraph()
    finite = len(network._prices)
    drawn.add_edges_from((int(a), int(b)) for a, b in network._ends.T)

    def weights(link: ts.Link, load: float) -> np.ndarray:
        return np.array([1.0, 8 / link.uplink_bit_s, load, 0.0])

    def scan(link: ts.Link, load: float) -> Any:
        return ts.best(ts.estimate(graph, device, server, link))

    def scan_numpy(link: ts.Link, load: float) -> Any:
        fixed_s = link.request_s(0, answer_bytes)
        return (everything @ np.array([1.0, 8 / link.uplink_bit_s, load, 0.0, fixed_s])).argmin()

    def by_networkx(link: ts.Link, load: float) -> Any:
        for (a, b), capacity in zip(network._ends.T[:finite], network._prices @ weights(link, load), strict=True):
            drawn[int(a)][int(b)]["capacity"] = capacity
        return networkx.minimum_cut(drawn, network._source, network._sink)

    return {
        BASE: (1000, frontier.best),
        "best throughput": (300, lambda link, load: frontier.best(link, load, 1.0, "throughput")),
        "scan": (1, scan),
        "scan in NumPy": (100, scan_numpy),
        "minimum cut, SciPy": (1, lambda link, load: network.best(weights(link, load))),
        "minimum cut, networkx": (1, by_networkx),
        "build": (1, lambda link, load: ts.Frontier.build(graph, device, server, table)),
    }  # fmt: skip


def measure(name: str, rounds: int) -> dict[str, Any]:
    graph = ts.trace(torchvision.models.get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224))
    server = ts.profile(graph, repeats=3, warmup=1, meter=None)
    device = server.scaled(10)
    frontier = ts.Frontier.build(graph, device, server, codecs_for(graph))
    chances = random.Random(0)
    settings = [
        (ts.Link("drawn", 10 ** chances.uniform(5, 9), 1e7, 0.03), 10 ** chances.uniform(-1, 1)) for _ in range(97)
    ]
    times: dict[str, list[float]] = {}
    contestants = list(ways(graph, device, server).items())
    for number in range(-1, rounds):
        chances.shuffle(contestants)
        for way, (repeats, decide) in contestants:
            if number >= 3 and way == "minimum cut, networkx":
                continue
            begin = time.perf_counter()
            for i in range(repeats):
                decide(*settings[(number + i) % len(settings)])
            if number >= 0:
                times.setdefault(way, []).append((time.perf_counter() - begin) / repeats)
    rows = {
        way: {
            "median_s": statistics.median(taken),
            "quartiles_s": np.quantile(taken, [0.25, 0.75]).tolist(),
            "ratio": statistics.median(b / a for a, b in zip(times[BASE], taken, strict=False)),
            "rounds": len(taken),
        }
        for way, taken in times.items()
    }
    return {
        "layers": len(graph.layers),
        "points": len(graph.points),
        "ways": len(graph.points) * (len(CODECS) + 1),
        "frontier": len(frontier.rows),
        "frontier_across_branches": sum(row.layers is not None for row in frontier.rows),
        "frontier_for_sums": len(frontier._linear[1]),
        "exact": frontier.exact,
        "times": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="speed of the planner")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for name in options.models:
        found = results[name] = measure(name, options.rounds)
        print(
            f"\n{name}: {found['layers']} layers, {found['ways']} ways; frontier of {found['frontier']} "
            f"({found['frontier_across_branches']} across branches, {found['frontier_for_sums']} for sums), "
            f"exact {found['exact']}"
        )
        for way, row in found["times"].items():
            low, median, high = (
                1e6 * value for value in (row["quartiles_s"][0], row["median_s"], row["quartiles_s"][1])
            )
            print(f"  {way:24} {median:12.1f} µs  ({low:.1f} … {high:.1f})  {row['ratio']:10.1f}×")
    write(options.out, results, networkx=networkx.__version__, scipy=scipy.__version__)


if __name__ == "__main__":
    main()
