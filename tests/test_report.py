"""Figures are printed in units people read, and pictures show every layer group and star."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon import report
from torchsurgeon.report.runs import MOST_RUNS, layer_runs


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (42e-6, "42 µs"), (0.9999, "999.9 ms")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (150_528, "151 kB"), (3_000_000, "3 MB")])
def test_bytes(size: int, text: str) -> None:
    assert report.bytes_text(size) == text


def test_long_models_are_drawn_in_groups_that_end_at_the_stars() -> None:
    blocks = nn.Sequential(*(nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))) for _ in range(8))).eval()
    graph = ts.trace(blocks, torch.rand(1, 4))
    groups = layer_runs(graph, keep=[15])
    assert [i for g in groups for i in g] == list(range(80))
    assert len(groups) <= MOST_RUNS + 1
    assert any(g[-1] == 14 for g in groups)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    graph = ts.trace(nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 2)).eval(), torch.rand(1, 4))
    samples = np.array([[1e-3, 1e-4, 2e-3]])
    profile = ts.LayerProfile("Sequential", graph.fingerprint, 1, ("0", "1", "2"), samples, samples.sum(1), {})
    path = tmp_path / "layers.png"
    report.layer_picture("test", graph, [("device", profile)], [("lte", 0), ("3g", 3)], path)
    assert path.stat().st_size > 10_000
