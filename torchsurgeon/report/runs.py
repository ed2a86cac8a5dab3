"""Runs of layers and of cuts: what is drawn as one bar where a model has more than fit side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

from torchsurgeon.planning import Row
from torchsurgeon.tracing.graph import LayerGraph

MOST_RUNS = 28
_FEW = 8


def layer_runs(graph: LayerGraph, keep: Sequence[int] = ()) -> list[list[int]]:
    """Return the layers in at most about ``MOST_RUNS`` runs, each all of a module where modules allow it.

    A run ends at every index in ``keep``, which may make more of them.
    """
    if len(graph.layers) <= MOST_RUNS:
        return [[layer.index] for layer in graph.layers]
    paths = [layer.name.split(".") for layer in graph.layers]
    too_many: list[list[int]] = [[layer.index] for layer in graph.layers]
    for depth in range(max(map(len, paths)), 0, -1):
        runs: list[list[int]] = []
        for i, path in enumerate(paths):
            if runs and path[:depth] == paths[i - 1][:depth] and i not in keep:
                runs[-1].append(i)
            else:
                runs.append([i])
        if len(runs) <= MOST_RUNS:
            if len(runs) >= _FEW:
                return runs
            break
        too_many = runs
    return _evenly(too_many, keep)


def _evenly(runs: Sequence[list[int]], keep: Sequence[int]) -> list[list[int]]:
    """Put neighbouring runs together, about as many layers in each."""
    layers = sum(map(len, runs))
    merged: list[list[int]] = []
    for run in runs:
        same = merged and merged[-1][0] * MOST_RUNS // layers == run[0] * MOST_RUNS // layers
        if same and run[0] not in keep:
            merged[-1] += run
        else:
            merged.append(list(run))
    return merged


def run_labels(graph: LayerGraph, runs: Sequence[Sequence[int]]) -> list[str]:
    """Return a name for each run: its layer's, what its layers' names share, or those of its ends."""
    ends = [(graph.layers[run[0]].name, graph.layers[run[-1]].name) for run in runs]
    shared = [_shared([graph.layers[i].name.split(".") for i in run]) for run in runs]
    count = Counter(shared)
    return [
        name if name and (count[name] == 1 or first == last) else f"{first} … {last}"
        for name, (first, last) in zip(shared, ends, strict=True)
    ]


def _shared(paths: Sequence[list[str]]) -> str:
    steps = itertools.takewhile(lambda step: len(set(step)) == 1, zip(*paths, strict=False))
    return ".".join(step[0] for step in steps)


@dataclasses.dataclass(frozen=True)
class CutRun:
    """Ways to run a model that are drawn in one place: those that cut inside a run of layers.

    ``layers`` are the graph's layers since the cuts of the run before; ``rows`` is never empty.
    """

    label: str
    layers: tuple[int, ...]
    rows: tuple[Row, ...]


def cut_runs(graph: LayerGraph, rows: Sequence[Row]) -> list[CutRun]:
    """Return the ways of ``rows`` by the run of layers they cut in, from all on the server to all on the device."""
    runs = layer_runs(graph)
    ends = [0, *(run[-1] + 1 for run in runs[:-1]), len(graph.layers) - 1, len(graph.layers)]
    labels = ["all on server", *run_labels(graph, runs), "all on device"]
    found = []
    drawn = 0
    for label, first, end in zip(labels, [0, *(end + 1 for end in ends)], ends, strict=False):
        inside = tuple(row for row in rows if first <= row.index <= end)
        if inside:
            found.append(CutRun(label, tuple(range(drawn, end)), inside))
            drawn = end
    return found
