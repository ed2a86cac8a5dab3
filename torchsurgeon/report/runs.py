"""Runs of neighbouring layers, and of cuts among them, that are drawn as one bar in models with many layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

from torchsurgeon.planning import Row
from torchsurgeon.report.narrow import shortened
from torchsurgeon.tracing.graph import LayerGraph

MOST_RUNS = 28
_FEW = 8
_TO = " … "


def layer_runs(graph: LayerGraph, keep: Sequence[int] = ()) -> list[list[int]]:
    """Return the indices of the layers in at most about ``MOST_RUNS`` runs, each a whole module where that is possible.

    Args:
        graph: the model's layers.
        keep: partition indices at which a run has to end, which may make the runs more than ``MOST_RUNS``.
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
    """Put neighbouring runs together, so that all have about as many layers."""
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
    """Return a name for each run: its only layer's, its module's, or from which layer to which it goes."""
    ends = [(graph.layers[run[0]].name, graph.layers[run[-1]].name) for run in runs]
    shared = [_shared([graph.layers[i].name.split(".") for i in run]) for run in runs]
    count = Counter(shared)
    return [
        name if name and (count[name] == 1 or first == last) else _range(first, last)
        for name, (first, last) in zip(shared, ends, strict=True)
    ]


def brief_label(label: str, most: int) -> str:
    """Return a name from ``run_labels()`` in at most ``most`` characters."""
    first, to, last = label.partition(_TO)
    if not to or len(label) <= most:
        return shortened(label, most)
    room = most - len(_TO)
    kept = min(len(last), max(room // 2, room - len(first)))
    return shortened(first, room - kept) + _TO + shortened(last, kept)


def _range(first: str, last: str) -> str:
    """The names of the first and the last layer, without the modules that the last one shares with the first."""
    return first + _TO + last.removeprefix(_shared([first.split("."), last.split(".")]) + ".")


def _shared(paths: Sequence[list[str]]) -> str:
    steps = itertools.takewhile(lambda step: len(set(step)) == 1, zip(*paths, strict=False))
    return ".".join(step[0] for step in steps)


@dataclasses.dataclass(frozen=True)
class CutRun:
    """The cuts inside a run of layers, which are drawn in one place.

    Attributes:
        label: the run's name, ``"all on server"`` or ``"all on device"``.
        layers: indices of the graph's layers between the last cut of the run before and the last cut of this one.
        rows: the cuts; at least one.
    """

    label: str
    layers: tuple[int, ...]
    rows: tuple[Row, ...]


def cut_runs(graph: LayerGraph, rows: Sequence[Row]) -> list[CutRun]:
    """Return ``rows`` by the run of layers in which they cut, from all on the server to all on the device."""
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
