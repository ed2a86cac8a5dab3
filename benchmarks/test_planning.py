"""Finding the cuts worth considering, and choosing among them, beside adding up every cut and minimum cuts.

Profiles are those of the Neurosurgeon paper's phone and server, predicted. What codecs cost is made up, with ratios and
rates of the order that docs/codecs.md reports: here only their number matters. Link and load change with every choice.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import networkx
import numpy as np
import pytest

import torchsurgeon as ts
from benchmarks.support.networks import Network
from benchmarks.support.side_by_side import SideBySide
from torchsurgeon.codec import CodecRow, Finding
from torchsurgeon.planning.mincut import MinimumCut
from torchsurgeon.planning.row import columns
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.planning.sets import Units

CODECS = (
    ("zstd", 1.4, 500e6, True),
    ("float16", 2.0, 4e9, False),
    ("float16+zstd", 2.6, 400e6, False),
    ("int8", 4.0, 2e9, False),
    ("int8+zstd", 5.6, 450e6, False),
)

pytestmark = pytest.mark.filterwarnings("ignore::torchsurgeon.PredictionWarning")
Choice = Callable[[ts.Link, float], Any]


def codecs_for(graph: ts.LayerGraph) -> ts.CodecTable:
    return table_of(graph, [(*codec, 0.5) for codec in CODECS])


def table_of(graph: ts.LayerGraph, codecs: Sequence[tuple[str, float, float, bool, float]]) -> ts.CodecTable:
    rows = [
        CodecRow(
            p.index,
            p.name,
            size,
            ts.CodecCost(name, size / ratio, size / rate, size / rate / 3, lossless, True),
            findings=() if lossless else (Finding("top-1 changed", used * 0.02, used * 0.03, 0.03, 210, True),),
        )
        for p in graph.points[:-1]
        for size in [p.size_bytes]
        for name, ratio, rate, lossless, used in codecs
    ]
    return ts.CodecTable(type(graph.model).__name__, graph.fingerprint, graph.batch, 210, "made up", tuple(rows))


def many_codecs() -> list[tuple[str, float, float, bool, float]]:
    """Return the codecs above, and two fitted codecs at ten rates each; the coarser, the more of the budget is used."""
    rates = [(label, 4 * 0.8**k, k) for label in ("one", "two") for k in range(10)]
    fitted = [
        (f"fitted:{label}@{rate:.3g}", 32 / rate, 1e8 * (1 + k / 20), False, 0.1 + 0.09 * k) for label, rate, k in rates
    ]
    return [*((*codec, 0.05 + codec[1] / 10) for codec in CODECS), *fitted]


def costs_of(name: str, network: Network) -> tuple[ts.LayerGraph, ts.LayerProfile, ts.LayerProfile, ts.CodecTable]:
    graph = ts.trace(*network(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.PredictionWarning)
        device, server = (ts.reference_device(where).predict(graph) for where in ("tegra-k1-cpu", "k40-gpu"))
    return graph, device, server, codecs_for(graph)


def scan(graph: ts.LayerGraph, device: ts.LayerProfile, server: ts.LayerProfile) -> Choice:
    """Add up what each partition point costs, with its tensors sent as they are, and take the least."""
    answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
    points = list(zip(graph.points, device.head_s.tolist(), server.tail_s.tolist(), strict=True))

    def choose(link: ts.Link, load: float) -> object:
        costs = [
            (head_s + (link.request_s(point.size_bytes, answer_bytes) + tail_s * load if tail_s else 0.0), point.index)
            for point, head_s, tail_s in points
        ]
        return min(costs)

    return choose


def scan_rows(graph: ts.LayerGraph, costs: LayerCosts, table: ts.CodecTable) -> Choice:
    """The same of every point with every codec, at once in NumPy, from a matrix made beforehand."""
    everything = columns(costs.rows(table))
    answer_bytes = sum(spec.size_bytes for spec in graph.outputs)

    def choose(link: ts.Link, load: float) -> object:
        fixed_s = link.request_s(0, answer_bytes)
        return (everything @ np.array([1.0, 8 / link.uplink_bit_s, load, 0.0, fixed_s])).argmin()

    return choose


def minimum_cuts(costs: LayerCosts) -> dict[str, Choice]:
    """A minimum s-t cut of the layers for each choice; the network is made beforehand, its capacities are set."""
    units = Units(costs)
    network = MinimumCut(0, len(units.layers), units.needs, units.costs, units.tensors)
    drawn = networkx.DiGraph()
    finite = len(network._prices)
    drawn.add_edges_from((int(a), int(b)) for a, b in network._ends.T)

    def weights(link: ts.Link, load: float) -> Any:
        return np.array([1.0, 8 / link.uplink_bit_s, load, 0.0])

    def by_networkx(link: ts.Link, load: float) -> object:
        for (a, b), capacity in zip(network._ends.T[:finite], network._prices @ weights(link, load), strict=True):
            drawn[int(a)][int(b)]["capacity"] = capacity
        return networkx.minimum_cut(drawn, network._source, network._sink)

    return {
        "minimum cut, SciPy": lambda link, load: network.best(weights(link, load)),
        "minimum cut, networkx": by_networkx,
    }


def over_time(choose: Choice) -> Callable[[], object]:
    """Choose for the next of many links and loads at every call."""
    chances = random.Random(0)
    settings = itertools.cycle(
        [(ts.Link("drawn", 10 ** chances.uniform(5, 9), 1e7, 0.03), 10 ** chances.uniform(-1, 1)) for _ in range(97)]
    )
    return lambda: choose(*next(settings))


@pytest.mark.benchmark(group="choosing a cut", min_time=1e-3)
@pytest.mark.parametrize("name", ["alexnet", "googlenet"])
def test_choosing(name: str, side_by_side: SideBySide, network: Network) -> None:
    graph, device, server, table = costs_of(name, network)
    costs, frontier = LayerCosts(graph, device, server), ts.Frontier.build(graph, device, server, table)
    choices: dict[str, Choice] = {
        "adding up every point": scan(graph, device, server),
        "adding up, NumPy, with codecs": scan_rows(graph, costs, table),
        **minimum_cuts(costs),
        "torchsurgeon": frontier.best,
        "torchsurgeon, for throughput": lambda link, load: frontier.best(link, load, 1.0, "throughput"),
    }
    side_by_side({how: over_time(choose) for how, choose in choices.items()})


@pytest.mark.benchmark(group="choosing among many codecs and rates", min_time=1e-3)
@pytest.mark.parametrize("name", ["alexnet", "googlenet", "maxvit_t"])
def test_choosing_a_rate(name: str, side_by_side: SideBySide, network: Network) -> None:
    graph, device, server, _ = costs_of(name, network)
    costs, table = LayerCosts(graph, device, server), table_of(graph, many_codecs())
    frontier = ts.Frontier.build(graph, device, server, table)
    choices: dict[str, Choice] = {
        "adding up, NumPy": scan_rows(graph, costs, table),
        "torchsurgeon": frontier.best,
        "torchsurgeon, for throughput": lambda link, load: frontier.best(link, load, 1.0, "throughput"),
        "torchsurgeon, the cost of every row": frontier.costs,
    }
    for stats in side_by_side({how: over_time(choose) for how, choose in choices.items()}).values():
        stats.extra_info |= {"points_and_codecs": len(costs.rows(table)), "frontier": len(frontier.rows)}


@pytest.mark.benchmark(group="finding the cuts worth considering")
@pytest.mark.parametrize("name", ["alexnet", "resnet50", "googlenet", "maxvit_t"])
def test_finding_the_frontier(name: str, side_by_side: SideBySide, network: Network) -> None:
    graph, device, server, table = costs_of(name, network)
    frontier = ts.Frontier.build(graph, device, server, table)
    found = side_by_side(
        {
            "listing every point and codec": lambda: LayerCosts(graph, device, server).rows(table),
            "torchsurgeon": lambda: ts.Frontier.build(graph, device, server, table),
        }
    )
    for stats in found.values():
        stats.extra_info |= {
            "layers": len(graph.layers),
            "points_and_codecs": len(graph.points) * (len(CODECS) + 1),
            "frontier": len(frontier.rows),
            "frontier_across_branches": sum(row.layers is not None for row in frontier.rows),
            "frontier_for_sums": len(frontier._linear[1]),
            "exact": frontier.exact,
        }
