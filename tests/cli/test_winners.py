"""The plane of winners says of every uplink and slow-down what the planner would choose there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from torchsurgeon.demo.winners import winners, winners_picture
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Frontier, Row

RATES, SLOWDOWNS = (2e5, 1e6, 5e6, 3e7), (1.0, 4.0, 20.0)
LINK = Link("varied", 1e6, 2e6, 0.03, radio=PRESETS["lte"].radio)


@pytest.fixture
def frontier() -> Frontier:
    server = Row(0, "input", "raw", 0.0, 0.0, 150_000, 0.02, 0.0, raw_input=True)
    cut = Row(5, "middle", "int8+zstd", 0.008, 1e-4, 9_000, 0.01, 1e-4, lossless=False)
    device = Row(9, "last", "raw", 0.02, 0.0, 0, 0.0, 0.0, on_device=True)
    return Frontier("Net", "f" * 64, 1, 9, 4000, (server, cut, device))


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_each_cell_is_what_the_frontier_chooses(frontier: Frontier, objective: str) -> None:
    plane = winners(frontier, LINK, objective, uplink_bit_s=RATES, slowdowns=SLOWDOWNS)
    for i, slowdown in enumerate(SLOWDOWNS):
        for j, rate in enumerate(RATES):
            link = LINK.with_uplink(rate)
            costs = frontier.costs(link, 1.0, slowdown, objective)
            assert plane.value[i, j] == pytest.approx(costs.min())
            assert plane.rows[plane.chosen[i, j]] == frontier.rows[int(costs.argmin())]
            assert plane.on_server[i, j] == pytest.approx(costs[0])
            assert plane.on_device[i, j] == pytest.approx(costs[2])


def test_a_split_counts_where_it_is_two_percent_better_than_both_ends(frontier: Frontier) -> None:
    plane = winners(frontier, LINK, uplink_bit_s=RATES, slowdowns=SLOWDOWNS)
    chosen = np.vectorize(lambda k: plane.rows[k].index == 5)(plane.chosen)
    assert (plane.is_split <= chosen).all()
    assert (plane.gain[plane.is_split] >= 1.02).all()
    assert 0 < plane.is_split.mean() < 1
    assert plane.summary()["share"] == pytest.approx(plane.is_split.mean(), abs=1e-4)
    assert set(plane.winners) <= set(plane.rows)
    assert {plane.rows[k] for k in plane.chosen.flat} == set(plane.winners)


def test_joules_grow_with_the_seconds_of_a_slower_device(frontier: Frontier) -> None:
    plane = winners(frontier, LINK.back_to_back(), "energy", uplink_bit_s=RATES, slowdowns=SLOWDOWNS, device_w=3.0)
    assert plane.on_device[:, 0] == pytest.approx([3.0 * slowdown * 0.02 for slowdown in SLOWDOWNS])
    none = dataclasses.replace(frontier, rows=tuple(dataclasses.replace(r, device_j=0.0) for r in frontier.rows))
    assert winners(none, LINK, "energy", uplink_bit_s=RATES, slowdowns=SLOWDOWNS).on_device.max() == 0


def test_the_picture_is_drawn(frontier: Frontier, tmp_path: Path) -> None:
    plane = winners(frontier, LINK, uplink_bit_s=RATES, slowdowns=SLOWDOWNS)
    winners_picture([("latency", plane)], "Net", tmp_path / "winners.png", marks=[("lte", 5.85e6, 4.0)])
    assert (tmp_path / "winners.png").read_bytes().startswith(b"\x89PNG")
