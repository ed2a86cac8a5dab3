"""How well the profile of a backend, measured at a few points within a budget, foretells heads and tails at others.

Each network is profiled by each backend within ten seconds. Then heads and tails are measured at points that can be the
best cut of some link, and at others drawn at random. Beside the profile stands the simplest other way: the times of
eager PyTorch, all times the one factor of the whole model. What counts in the end is the cut: how much longer the one
chosen by either takes than the best, over links, loads and speeds of the server. Writes JSON, and the table of
docs/backends.md.

    python -m benchmarks.backend_profiles                     # results/backend-profiles.json, about 15 minutes
    python -m benchmarks.backend_profiles --networks resnet18 --backends onnxruntime
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchsurgeon as ts
from benchmarks.support import networks, result_file
from torchsurgeon.link import PRESETS

OUT = result_file.RESULTS / "backend-profiles.json"
PAGE = Path(__file__).parent.parent / "docs" / "backends.md"
BEGIN, END = "<!-- backend-profiles -->", "<!-- /backend-profiles -->"
NETWORKS = ("alexnet", "mobilenet_v3_large", "resnet18", "resnet50", "vit_b_16")
BACKENDS = ("onnxruntime", "openvino", "openvino:bf16")
LINKS, SLOWNESS, SPEED_UPS, LOADS = ("3g", "lte", "wifi", "5g-low"), (1.0, 10.0), (1, 5, 20), (1, 3)
_BUDGET_S, _AT_RANDOM, _MOST_POINTS = 10.0, 3, 9


def checked_points(graph: ts.LayerGraph, rng: random.Random) -> list[int]:
    """Return indices at which less crosses than at every earlier one, at most some of them, and others at random."""
    least_bytes, few = float("inf"), []
    for point in graph.points[1:-1]:
        if point.size_bytes < least_bytes:
            least_bytes = point.size_bytes
            few.append(point.index)
    few = sorted(rng.sample(few, min(len(few), _MOST_POINTS)))
    others = [point.index for point in graph.points[1:-1] if point.index not in few]
    return sorted({*few, *rng.sample(others, min(_AT_RANDOM, len(others)))})


def latencies(graph: ts.LayerGraph, head_s: Any, tail_s: Any, points: list[int], situation: tuple[Any, ...]) -> Any:
    """Return the latency of a cut at each of some indices, seconds."""
    link, slow, speed_up, load = situation
    sizes = {point.index: point.size_bytes for point in graph.points}
    answer, last = sum(spec.size_bytes for spec in graph.outputs), len(graph.layers)
    return np.array(
        [
            slow * head_s[k]
            + (0.0 if k == last else PRESETS[link].request_s(sizes[k], answer) + tail_s[k] / speed_up * load)
            for k in points
        ]
    )


def regrets(graph: ts.LayerGraph, foretold: tuple[Any, Any], truth: ts.LayerProfile, points: list[int]) -> list[float]:
    """Return how much longer the chosen cut takes than the best, 0.01 for 1 %, in each situation."""
    found = []
    for situation in itertools.product(LINKS, SLOWNESS, SPEED_UPS, LOADS):
        real = latencies(graph, truth.head_s, truth.tail_s, points, situation)
        chosen = int(latencies(graph, *foretold, points, situation).argmin())
        found.append(float(real[chosen] / real.min() - 1))
    return found


def row(name: str, backend: str, graph: ts.LayerGraph, eager: ts.LayerProfile) -> dict[str, Any]:
    """Return how well one backend's profile of one network foretells what is then measured."""
    begun_s = time.perf_counter()
    profile = ts.profile(graph, backend=backend, eager=eager, budget_s=_BUDGET_S, meter=None)
    profiled_s = time.perf_counter() - begun_s
    assert profile.parts is not None
    points = checked_points(graph, random.Random(0))
    truth = ts.profile(graph, backend=backend, eager=eager, points=points, meter=None)
    factor = profile.total_s / eager.total_s
    ways = {"ours": (profile.head_s, profile.tail_s), "one factor": (eager.head_s * factor, eager.tail_s * factor)}
    unseen = [k for k in points if k not in profile.parts.points]
    found: dict[str, Any] = {
        "network": name,
        "backend": backend,
        "whole_over_eager": factor,
        "profiled_s": profiled_s,
        "measured_points": len(profile.parts.points),
        "checked_points": len(unseen),
    }
    among = [0, *points, len(graph.layers)]
    for way, (head_s, tail_s) in ways.items():
        errors = [
            abs(float(curve[k] / real[k]) - 1)
            for curve, real in ((head_s, truth.head_s), (tail_s, truth.tail_s))
            for k in unseen
            if real[k] > 0
        ]
        regret = regrets(graph, (head_s, tail_s), truth, among)
        found[way] = {
            "errors": [round(error, 4) for error in errors],
            "median_error": statistics.median(errors) if errors else 0.0,
            "mean_regret": statistics.mean(regret),
            "worst_regret": max(regret),
        }
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    columns = "network | backend | whole, of eager | points measured, in | median error, ours | one factor"
    lines = [f"| {columns} | worst regret, ours | one factor |", "|---|---|---|---|---|---|---|---|"]
    for one in rows:
        ours, plain = one["ours"], one["one factor"]
        lines.append(
            f"| {one['network']} | {one['backend']} | {one['whole_over_eager']:.2f} | {one['measured_points']}, "
            f"{one['profiled_s']:.0f} s | {ours['median_error']:.1%} | {plain['median_error']:.1%} "
            f"| {ours['worst_regret']:.1%} | {plain['worst_regret']:.1%} |"
        )
    ours, plain = ([error for one in rows for error in one[way]["errors"]] for way in ("ours", "one factor"))
    lines.append(
        f"\nOver all, the median error at points that were not measured is {statistics.median(ours):.1%}, and by one "
        f"factor {statistics.median(plain):.1%}; the worst regret is "
        f"{max(one['ours']['worst_regret'] for one in rows):.1%}, and "
        f"{max(one['one factor']['worst_regret'] for one in rows):.1%}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="write the table from the file, and measure nothing")
    options = parser.parse_args()
    if not options.page:
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore", ts.NoisyProfileWarning)
        rows = []
        for name in options.networks:
            model, x = networks.network(name, torch.device("cpu"))
            graph = ts.trace(model, x)
            eager = ts.profile(graph, meter=None)
            for backend in options.backends:
                rows.append(row(name, backend, graph, eager))
                print(table(rows).splitlines()[len(rows) + 1], flush=True)
        result_file.write(options.out, rows)
    if options.out == OUT:
        begin, rest = PAGE.read_text().split(BEGIN)
        _, end = rest.split(END)
        written = table(json.loads(OUT.read_text())["results"])
        PAGE.write_text(f"{begin}{BEGIN}\n\n{written}\n\n{END}{end}")


if __name__ == "__main__":
    main()
