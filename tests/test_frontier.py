"""The frontier's best is the best of all there is: all partition points, all codecs, all closed sets of layers."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import torchsurgeon as ts
from torchsurgeon.plan import Frontier, Objective, sets
from torchsurgeon.plan.mincut import MinimumCut
from torchsurgeon.plan.rows import Costs
from torchsurgeon.profile import LayerEnergy, LayerProfile

torch.set_num_threads(1)
# Shrinking whole models takes minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
SECONDS = st.floats(1e-4, 10.0)


class Random(nn.Module):
    """Layers on one tensor of a width of their own each, that read the sum of earlier ones; the last layer reads all
    that nothing else does."""

    def __init__(self, reads: list[list[int]], widths: list[int]) -> None:
        super().__init__()
        self.reads = reads
        self.parts = nn.ModuleList(
            nn.Linear(sum(widths[j] for j in r), w) for r, w in zip(reads, widths[1:], strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for read, part in zip(self.reads, self.parts, strict=True):
            values.append(part(values[read[0]] if len(read) == 1 else torch.cat([values[j] for j in read], 1)))
        unread = set(range(len(values))) - {j for read in self.reads for j in read}
        return torch.cat([values[j] for j in sorted(unread)], 1) if len(unread) > 1 else values[-1]


@st.composite
def graphs(draw: st.DrawFn, least: int, most: int, reach: int = 100) -> ts.LayerGraph:
    count = draw(st.integers(least, most))
    reads = [sorted(draw(st.sets(st.integers(max(0, i - reach), i), min_size=1, max_size=2))) for i in range(count)]
    widths = draw(st.lists(st.integers(1, 40), min_size=count + 1, max_size=count + 1))
    return ts.trace(Random(reads, widths).eval(), torch.rand(1, widths[0]))


def profile_of(graph: ts.LayerGraph, seconds: list[float], joules: list[float] | None = None) -> LayerProfile:
    samples = np.array([seconds])
    names = tuple(layer.name for layer in graph.layers)
    energy = None
    if joules is not None:
        whole = float(sum(joules))
        energy = LayerEnergy("recorded", 0.0, np.array(joules), np.zeros((len(joules), 2)), (whole, whole, whole))
    made = LayerProfile("Random", graph.fingerprint, graph.batch, names, samples, samples.sum(axis=1), {})
    return dataclasses.replace(made, energy=energy, memory_bytes=np.full(len(names), 1000))


@st.composite
def problems(
    draw: st.DrawFn, least: int, most: int, reach: int = 100
) -> tuple[ts.LayerGraph, LayerProfile, LayerProfile]:
    graph = draw(graphs(least, most, reach))
    count = len(graph.layers)
    device, server, joules = (draw(st.lists(SECONDS, min_size=count, max_size=count)) for _ in range(3))
    return graph, profile_of(graph, device, joules), profile_of(graph, server)


LINKS = st.builds(
    lambda up, trip: ts.Link("drawn", up, 1e6, trip, radio=ts.Radio(3e-7, 1e-7, 0.5, 1.0, 0.2)),
    st.floats(1e3, 1e6),
    st.floats(0, 2),
)
FACTORS = st.floats(0.1, 10.0)


def closed_sets(graph: ts.LayerGraph) -> list[tuple[int, ...]]:
    count, found = len(graph.layers), []
    needs = graph.closure.needs
    for flags in itertools.product((0, 1), repeat=count):
        inside = {i for i in range(count) if flags[i]}
        if all(inside.issuperset(needs[i]) for i in inside):
            found.append(tuple(sorted(inside)))
    return found


@settings(deadline=None, max_examples=40, phases=PHASES)
@given(
    problems(2, 7), LINKS, FACTORS, FACTORS, st.sampled_from(["latency", "energy", "throughput", "server_time", "sum"])
)
def test_best_is_that_of_all_closed_sets_of_layers(problem, link, load, slowdown, wanted) -> None:
    graph, device, server = problem
    objective = Objective(latency=1.0, energy=0.5, throughput=2.0) if wanted == "sum" else wanted
    frontier = Frontier.build(graph, device, server)
    costs = Costs(graph, device, server)
    everything = Frontier("all", "", 1, 0, frontier.answer_bytes, tuple(costs.row_of(s) for s in closed_sets(graph)))
    everything = dataclasses.replace(
        everything,
        rows=tuple(
            dataclasses.replace(r, on_device=True, size_bytes=0.0) if r.index == len(graph.layers) else r
            for r in everything.rows
        ),
    )
    ours = frontier.costs(link, load, slowdown, objective).min()
    assert ours == pytest.approx(everything.costs(link, load, slowdown, objective).min(), rel=1e-9)
    chosen = frontier.best(link, load, slowdown, objective)
    assert frontier.costs(link, load, slowdown, objective)[frontier.rows.index(chosen)] == ours


@settings(deadline=None, max_examples=8, phases=PHASES)
@given(problems(25, 40, 6), LINKS, FACTORS, FACTORS)
def test_best_is_the_minimum_cut_of_large_graphs(problem, link, load, slowdown) -> None:
    graph, device, server = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "_MOST_SETS", 16)
        frontier = Frontier.build(graph, device, server)
    assert frontier.exact
    units = sets.Units(Costs(graph, device, server))
    weights = np.array([slowdown, 8 / link.uplink_bit_s, load, 0.0])
    whole = sets.Block(units, 0, len(units.layers))
    mask = MinimumCut(0, len(units.layers), units.needs, units.costs, units.tensors).best(weights)
    least = float((whole.costs([mask]) @ weights)[0]) + link.request_s(0, frontier.answer_bytes)
    device_only = slowdown * float(device.head_s[-1])
    assert frontier.costs(link, load, slowdown).min() == pytest.approx(min(least, device_only), rel=1e-6)
