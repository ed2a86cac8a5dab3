"""Shapes by rules against fake tensors, and cutting into segments against generated fx modules.

Every way runs once a round, in a new random order, in one process on one thread. Ratios are within a round:

* ``shapes by rules``: the shapes of all of ResNet-50's values, as ``trace`` finds them. Against ``shapes by fake
  tensors`` (``torch.fx``'s FakeTensorProp). ``symbolic_trace`` and ``trace`` are there for the scale.
* ``cut``: head and tail of a model cut in its middle. Against ``one side, fx``: the head alone as a generated
  ``fx.GraphModule``. On ResNet-50, and on a chain of 1,600 layers.

    python -m benchmarks.tracing [--rounds 15] [--out benchmarks/results/tracing.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torchvision.models import resnet50

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.side_by_side import in_turns, median_ratio, spread, text
from torchsurgeon.tracing.shapes import MetaModel, propagate

CHAIN = 1600
Ways = dict[str, Callable[[], object]]


def shapes(model: nn.Module, x: torch.Tensor) -> Ways:
    steps, followed = ts.trace(model, x).steps, fx.symbolic_trace(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return {
        "shapes by rules": lambda: propagate(steps, [x], MetaModel(model)),
        "shapes by fake tensors": lambda: FakeTensorProp(followed, fake).propagate(x),
        "symbolic_trace": lambda: fx.symbolic_trace(model),
        "trace": lambda: ts.trace(model, x),
    }


def cuts(model: nn.Module, x: torch.Tensor) -> Ways:
    graph, followed = ts.trace(model, x), fx.symbolic_trace(model)
    nodes = list(followed.graph.nodes)[: len(followed.graph.nodes) // 2]

    def generate() -> None:
        half = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            copies[node] = half.node_copy(node, copies.__getitem__)
        half.output(copies[nodes[-1]])
        fx.GraphModule(followed, half)

    return {"cut": lambda: ts.cut(graph, len(graph.layers) // 2), "one side, fx": generate}


def compare(title: str, ways: Ways, rounds: int) -> dict[str, Any]:
    taken = in_turns(ways, rounds)
    base = next(iter(ways))
    print(title)
    rows = {}
    for name, times in taken.items():
        rows[name] = spread(times) | {"ratio": median_ratio(times, taken[base])}
        print(f"  {name:24}{text(rows[name])} {rows[name]['ratio']:8.1f} × {base}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "tracing.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    resnet, image = resnet50(weights=None).eval(), torch.rand(1, 3, 224, 224)
    chain = nn.Sequential(*(nn.ReLU() for _ in range(CHAIN))).eval()
    results = {
        "shapes, ResNet-50": shapes(resnet, image),
        "cut, ResNet-50": cuts(resnet, image),
        f"cut, chain of {CHAIN}": cuts(chain, torch.rand(1, 8)),
    }
    write(options.out, {title: compare(title, ways, options.rounds) for title, ways in results.items()})


if __name__ == "__main__":
    main()
