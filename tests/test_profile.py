"""A profile holds what was measured, survives a file, and refuses what is not of its graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts

pytestmark = pytest.mark.filterwarnings("ignore::torchsurgeon.NoisyProfileWarning")


class Uneven(nn.Module):
    """A cheap layer, an expensive one, and a cheap one."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(64, 64)
        self.large = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 64))
        self.last = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.size(0)
        return self.last(self.large(self.small(x))).reshape(n, 8, 8)


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    return ts.trace(Uneven().eval(), torch.rand(16, 64))


@pytest.fixture(scope="module")
def profile(graph: ts.LayerGraph) -> ts.LayerProfile:
    return ts.profile(graph, repeats=7, warmup=2)


def test_every_layer_is_timed_and_the_expensive_one_costs_most(graph: ts.LayerGraph, profile: ts.LayerProfile) -> None:
    assert profile.layers == tuple(layer.name for layer in graph.layers)
    assert profile.samples_s.shape == (7, len(graph.layers))
    assert (profile.samples_s > 0).all()
    assert profile.layers[int(profile.layer_s.argmax())].startswith("large")
    low, high = profile.quartiles_s()
    assert (low <= profile.layer_s).all()
    assert (profile.layer_s <= high).all()


def test_head_and_tail_times_add_up_to_the_whole(profile: ts.LayerProfile) -> None:
    assert profile.head_s[0] == 0
    assert profile.tail_s[-1] == 0
    assert (np.diff(profile.head_s) >= 0).all()
    assert profile.head_s[-1] == pytest.approx(profile.total_s)
    assert profile.tail_s[0] == pytest.approx(profile.total_s)


def test_a_slower_device_is_slower_everywhere(profile: ts.LayerProfile) -> None:
    slow = profile.scaled(4)
    assert slow.head_s == pytest.approx(profile.head_s * 4)
    assert slow.scaled(2).provenance["scaled_by"] == 8
    for factor in (0, -1, float("nan")):
        with pytest.raises(ts.ProfileError, match="slow"):
            profile.scaled(factor)


def test_a_profile_survives_a_file(profile: ts.LayerProfile, graph: ts.LayerGraph, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    loaded = ts.LayerProfile.load(path)
    loaded.check(graph)
    assert (loaded.samples_s == profile.samples_s).all()
    assert loaded.to_json() == profile.to_json()


def test_a_profile_says_where_it_comes_from(profile: ts.LayerProfile) -> None:
    assert profile.provenance["torch"] == torch.__version__
    assert profile.provenance["threads"] == torch.get_num_threads()
    assert profile.provenance["device"]


def test_progress_is_told(graph: ts.LayerGraph) -> None:
    seen: list[tuple[int, int]] = []
    ts.profile(graph, repeats=2, warmup=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_profile_of_another_graph_is_refused_by_name(profile: ts.LayerProfile) -> None:
    other = ts.trace(nn.Sequential(nn.Linear(4, 4)).eval(), torch.rand(1, 4))
    with pytest.raises(ts.ProfileError, match=r"Uneven.*Sequential"):
        profile.check(other)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: {**d, "format": "torchsurgeon.profile/0"}, "profile/0"),
        (lambda d: {k: v for k, v in d.items() if k != "samples_s"}, "samples_s"),
        (lambda d: {**d, "samples_s": [[1.0]]}, "shape"),
        (lambda d: {**d, "samples_s": [[-1.0] * len(d["layers"])]}, "non-negative"),
        (lambda d: {**d, "whole_s": []}, "whole_s"),
        (lambda d: {**d, "samples_s": "soon"}, "none"),
        (lambda d: [], "list"),
    ],
)
def test_a_damaged_profile_is_refused(profile: ts.LayerProfile, tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(damage(profile.to_json())))
    with pytest.raises(ts.ProfileError, match=reason) as caught:
        ts.LayerProfile.load(path)
    assert "broken.json" in str(caught.value)


def test_a_file_cut_short_is_refused(profile: ts.LayerProfile, tmp_path: Path) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps(profile.to_json())[:-20])
    with pytest.raises(ts.ProfileError, match=r"short\.json is not JSON"):
        ts.LayerProfile.load(path)
    with pytest.raises(ts.ProfileError, match="cannot be read"):
        ts.LayerProfile.load(tmp_path / "absent.json")


def test_repeats_that_cannot_be(graph: ts.LayerGraph) -> None:
    with pytest.raises(ts.ProfileError, match="0 repeats"):
        ts.profile(graph, repeats=0)
