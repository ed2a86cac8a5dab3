"""Calibrating a backend beside eager PyTorch, and predicting by it."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import Backend, Part
from torchsurgeon.prediction import all_costs_on, calibrate_backend
from torchsurgeon.prediction.factors import BackendFactors
from torchsurgeon.profiling.parts import works

_ATTEMPTS = 5


class Plain(Backend):
    name = "plain"

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        return part.segment


class Never(Backend):
    name = "never"

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        raise ts.BackendError("no part at all")


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10))
    return ts.trace(model.eval(), torch.rand(1, 3, 16, 16))


def nets(spread: float = 0.0) -> list[tuple[np.ndarray, np.ndarray, float]]:
    rng = np.random.default_rng(0)
    wanted = np.array([0.1, 0.6, 0.7, 0.9])
    found = []
    for _ in range(30):
        kinds, seconds = rng.integers(0, 4, 20), rng.uniform(1e-4, 1e-3, 20)
        found.append((kinds, seconds, float((seconds * wanted[kinds]).sum() * np.exp(rng.normal(0, spread)))))
    return found


@pytest.fixture(scope="module")
def predictor() -> ts.Predictor:
    known = ts.reference_device("tegra-k1-cpu")
    known.backends["quick"] = BackendFactors.fit(nets(0.05))
    return known


def test_factors_follow_from_networks_timed_by_both() -> None:
    found = BackendFactors.fit(nets())
    assert found.factors == pytest.approx((0.1, 0.6, 0.7, 0.9), rel=0.1)
    assert found.networks == 30
    assert found.median < 0.02
    noisy = BackendFactors.fit(nets(0.2))
    assert noisy.low < 0.9
    assert noisy.high > 1.1
    assert noisy.median > 0.05


def test_too_few_networks_are_refused() -> None:
    with pytest.raises(ts.CalibrationError, match="at least 8 networks"):
        BackendFactors.fit(nets()[:7])


def test_a_prediction_by_a_backend_is_that_of_eager_times_its_factors(
    predictor: ts.Predictor, graph: ts.LayerGraph
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.PredictionWarning)
        eager, quick = predictor.predict(graph), predictor.predict(graph, "quick")
    factors = np.array(predictor.backends["quick"].factors)[works(graph)]
    scale = eager.total_s / eager.layer_s.sum()
    assert quick.layer_s == pytest.approx(eager.layer_s * scale * factors)
    assert quick.total_s == pytest.approx(quick.layer_s.sum())
    assert quick.backend == "quick"
    assert quick.interval_s is not None
    assert (quick.interval_s[:, 0] <= quick.layer_s + 1e-12).all()
    assert (quick.interval_s[:, 1] >= quick.layer_s - 1e-12).all()
    assert quick.whole_interval_s is not None
    assert quick.whole_interval_s[0] <= quick.total_s <= quick.whole_interval_s[1]
    assert quick.energy is None


def test_a_backend_that_was_not_calibrated_is_refused(predictor: ts.Predictor, graph: ts.LayerGraph) -> None:
    with pytest.raises(ts.CalibrationError, match="eager, quick"):
        predictor.predict(graph, "slow")


def test_factors_are_kept_in_the_file_of_the_calibration(
    predictor: ts.Predictor, graph: ts.LayerGraph, tmp_path: Path
) -> None:
    predictor.save(tmp_path / "device.json")
    again = ts.Predictor.load(tmp_path / "device.json")
    assert again.backends == predictor.backends
    assert "by quick" in str(again)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.PredictionWarning)
        assert [profile.backend for profile in all_costs_on(graph, tmp_path / "device.json")] == ["eager", "quick"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(factors={"memory": 1.0}),
        lambda data: data["factors"].update(memory=-1.0),
        lambda data: data.update(low="x"),
        lambda data: data.pop("median"),
    ],
)
def test_damaged_factors_are_refused(predictor: ts.Predictor, change: Callable[[dict[str, object]], object]) -> None:
    data = predictor.to_json()
    change(data["backends"]["quick"])
    with pytest.raises(ts.CalibrationError, match="cut short or edited"):
        ts.Predictor.from_json(data)


def test_a_backend_is_calibrated_on_random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that moves by a second for each network, however busy the machine is.
    clock = SimpleNamespace(monotonic=itertools.count().__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr("torchsurgeon.prediction.backends.time", clock)
    known = ts.reference_device("tegra-k1-cpu")
    for attempt in range(_ATTEMPTS):
        told: list[Any] = []
        found = calibrate_backend(
            known, Plain(), budget_s=10, progress=lambda *how_far, told=told: told.append(how_far)
        )
        factors = found.backends["plain"]
        assert factors.networks == 9
        assert told[-1][2] == f"{factors.networks} networks timed by plain"
        # It is eager PyTorch itself. Another process may hold the processor while one of both is timed.
        if all(0.3 < factor < 3 for factor in factors.factors):
            break
        assert attempt < _ATTEMPTS - 1, factors.factors
    assert "plain" not in known.backends


def test_what_cannot_be_calibrated_is_refused() -> None:
    known = ts.reference_device("tegra-k1-cpu")
    with pytest.raises(ts.BackendError, match="eager PyTorch"):
        calibrate_backend(known, "eager")
    with pytest.raises(ts.CalibrationError, match="positive"):
        calibrate_backend(known, Plain(), budget_s=0)
    with pytest.raises(ts.CalibrationError, match="there was time for 0"):
        calibrate_backend(known, Never(), budget_s=0.5)
