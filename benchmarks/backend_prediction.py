"""How well a calibration foretells what networks take by a backend by which they were never run.

This machine is calibrated in eager PyTorch, and then for each backend, on networks that are drawn at random. Networks
that people use are predicted from that, and measured: the whole model, and heads and tails at points that can be the
best cut of some link, and at others drawn at random. Beside the prediction stands the simplest other way: the times
predicted in eager PyTorch, times one factor, the median of what the other networks here take by the backend of their
time in eager PyTorch. What counts in the end is the cut: how much longer the one chosen by either takes than the best.
Writes JSON, and the table of docs/prediction.md.

    python -m benchmarks.backend_prediction                   # results/backend-prediction.json, about 8 minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks.backend_profiles import checked_points, regrets
from benchmarks.support import networks, result_file
from torchsurgeon.prediction.backends import calibrate_backend

OUT = result_file.RESULTS / "backend-prediction.json"
PAGE = Path(__file__).parent.parent / "docs" / "prediction.md"
BEGIN, END = "<!-- backend-prediction -->", "<!-- /backend-prediction -->"
NETWORKS = ("alexnet", "mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50", "squeezenet1_1")
BACKENDS = ("onnxruntime", "openvino")
_SEEN_POINTS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One network by one backend, predicted and measured."""

    network: str
    backend: str
    graph: ts.LayerGraph
    points: list[int]
    eager: ts.LayerProfile
    predicted: ts.LayerProfile
    measured: ts.LayerProfile

    @property
    def factor(self) -> float:
        """The network's measured time by the backend, of its predicted time in eager PyTorch."""
        return self.measured.total_s / self.eager.total_s


def cases(names: list[str], backends: list[str], calibrating_s: float, backend_s: float) -> list[Case]:
    """Calibrate, and predict and measure every network by every backend."""
    predictor = ts.calibrate(budget_s=calibrating_s)
    for backend in backends:
        predictor = calibrate_backend(predictor, backend, budget_s=backend_s)
        print(f"{backend}: {predictor.backends[backend]}", flush=True)
    found = []
    for name in names:
        model, x = networks.network(name, torch.device("cpu"))
        graph = ts.trace(model, x)
        points = checked_points(graph, random.Random(0))
        points = sorted(random.Random(1).sample(points, min(len(points), _SEEN_POINTS)))
        eager, measured_eager = predictor.predict(graph), ts.profile(graph, meter=None)
        for backend in backends:
            predicted = predictor.predict(graph, backend)
            measured = ts.profile(graph, backend=backend, eager=measured_eager, points=points, meter=None)
            found.append(Case(name, backend, graph, points, eager, predicted, measured))
            print(f"{name} {backend}: {predicted.total_s / measured.total_s - 1:+.1%}", flush=True)
    return found


def row(case: Case, every: list[Case]) -> dict[str, Any]:
    """Return how well a case is foretold, and how well by one factor from the other networks."""
    others = [one.factor for one in every if one.backend == case.backend and one.network != case.network]
    factor = statistics.median(others) if others else 1.0
    eager, truth = case.eager, case.measured
    ways = {
        "ours": (case.predicted.head_s, case.predicted.tail_s),
        "one factor": (eager.head_s * factor, eager.tail_s * factor),
    }
    found: dict[str, Any] = {
        "network": case.network,
        "backend": case.backend,
        "measured_s": truth.total_s,
        "points": len(case.points),
    }
    for way, (head_s, tail_s) in ways.items():
        errors = [
            abs(float(curve[k] / real[k]) - 1)
            for curve, real in ((head_s, truth.head_s), (tail_s, truth.tail_s))
            for k in case.points
            if real[k] > 0
        ]
        regret = regrets(case.graph, (head_s, tail_s), truth, [0, *case.points, len(case.graph.layers)])
        found[way] = {
            "whole": float(head_s[-1]) / truth.total_s - 1,
            "errors": [round(error, 4) for error in errors],
            "worst_regret": max(regret),
        }
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    columns = "network, never run by it | backend | measured | whole model, ours | one factor"
    lines = [
        f"| {columns} | heads and tails, ours | one factor | worst regret, ours | one factor |",
        "|---" * 9 + "|",
    ]
    for one in rows:
        ours, plain = one["ours"], one["one factor"]
        lines.append(
            f"| {one['network']} | {one['backend']} | {one['measured_s'] * 1e3:.1f} ms | {ours['whole']:+.1%} "
            f"| {plain['whole']:+.1%} | {statistics.median(ours['errors']):.1%} "
            f"| {statistics.median(plain['errors']):.1%} | {ours['worst_regret']:.1%} | {plain['worst_regret']:.1%} |"
        )
    ours, plain = ([error for one in rows for error in one[way]["errors"]] for way in ("ours", "one factor"))
    lines.append(
        f"\nOver all, the median error of heads and tails is {statistics.median(ours):.1%}, and by one factor "
        f"{statistics.median(plain):.1%}; the worst regret is {max(one['ours']['worst_regret'] for one in rows):.1%}, "
        f"and {max(one['one factor']['worst_regret'] for one in rows):.1%}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds of the calibration in eager PyTorch")
    parser.add_argument("--backend-budget", type=float, default=60.0, help="seconds of the calibration of each backend")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="write the table from the file, and measure nothing")
    options = parser.parse_args()
    if not options.page:
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore", ts.NoisyProfileWarning)
        warnings.simplefilter("ignore", ts.PredictionWarning)
        every = cases(options.networks, options.backends, options.budget, options.backend_budget)
        result_file.write(options.out, [row(case, every) for case in every])
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, table(json.loads(OUT.read_text())["results"]) + "\n")


if __name__ == "__main__":
    main()
