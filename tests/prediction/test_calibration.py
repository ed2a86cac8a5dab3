"""Calibrating this machine's CPU for a few seconds: what is kept, refused, metered and noted."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.meters import EnergyMeter, Reading
from torchsurgeon.prediction import calibration, pulse
from torchsurgeon.prediction.nets import random_net
from torchsurgeon.profiling import joules

pytestmark = [
    pytest.mark.usefixtures("few_forms"),
    pytest.mark.filterwarnings("ignore::torchsurgeon.ThrottledWarning"),
    pytest.mark.filterwarnings("ignore::torchsurgeon.PredictionWarning"),
]


def calibrate_networks(count: int, path: Path, **settings: Any) -> list[str]:
    """Begin a calibration at ``path``, and interrupt it after so many networks, however fast the machine is."""
    told: list[str] = []

    def interrupt(spent_s: float, budget_s: float, what: str) -> None:
        told.append(what)
        if len(told) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ts.calibrate("cpu", budget_s=600.0, out=path, progress=interrupt, **settings)
    return told


def finished(path: Path) -> ts.Predictor:
    """Fit what was measured, and measure nothing more."""
    return ts.calibrate("cpu", budget_s=0.001, out=path, meter=None)


@pytest.fixture(scope="module")
def calibrated(few_forms: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[ts.Predictor, Path]:
    path = tmp_path_factory.mktemp("calibration") / "device.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate_networks(5, path, meter=None)
        return finished(path), path


def samples_in(path: Path) -> dict[str, int]:
    return {kind: len(table["seconds"]) for kind, table in json.loads(path.read_text())["samples"].items()}


def test_a_few_networks_are_enough_for_a_predictor(calibrated: tuple[ts.Predictor, Path]) -> None:
    predictor, path = calibrated
    assert {"convolution", "activation"} <= set(predictor.fitted)
    facts = predictor.provenance
    assert facts["device_type"] == "cpu"
    assert facts["threads"] == torch.get_num_threads()
    assert facts["calibrated_for_s"] > 0
    assert facts["meter"].startswith("none")
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 900, 10)).eval()
    graph = ts.trace(model, torch.rand(1, 3, 32, 32))
    first, second = predictor.predict(graph), ts.Predictor.load(path).predict(graph)
    assert first.layer_s.tolist() == second.layer_s.tolist()
    assert (first.layer_s > 0).all()
    assert first.layer_s[0] > first.layer_s[2]


def test_an_interruption_loses_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    told = calibrate_networks(2, path, meter=None)
    before = json.loads(path.read_text())
    assert sum(samples_in(path).values()) == int(told[-1].split()[0])
    with pytest.raises(ts.CalibrationError, match="interrupted"):
        ts.Predictor.load(path)
    calibrate_networks(2, path, meter=None)
    after = json.loads(path.read_text())
    assert after["provenance"]["calibrated_for_s"] > before["provenance"]["calibrated_for_s"] > 0
    for kind, table in before["samples"].items():
        for name, values in table.items():
            if values is not None:
                assert after["samples"][kind][name][: len(values)] == values, (kind, name)
    assert sum(samples_in(path).values()) > int(told[-1].split()[0])


def test_the_beginning_for_other_threads_or_another_device_is_refused(
    calibrated: tuple[ts.Predictor, Path], tmp_path: Path
) -> None:
    data = json.loads(calibrated[1].read_text())
    path = tmp_path / "device.json"
    for fact, value in (("device", "Tegra K1"), ("threads", 99), ("torch", "1.0")):
        path.write_text(json.dumps(data | {"unfinished": True, "provenance": data["provenance"] | {fact: value}}))
        before = path.read_bytes()
        with pytest.raises(ts.CalibrationError, match=rf"{fact} {value!r}.*give another file, or delete it"):
            ts.calibrate("cpu", budget_s=1.0, out=path, meter=None)
        assert path.read_bytes() == before


def test_another_devices_finished_calibration_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "k40.json"
    ts.reference_device("k40-gpu").save(path)
    before = path.read_bytes()
    with pytest.raises(ts.CalibrationError, match="Tesla K40"):
        ts.calibrate("cpu", budget_s=1.0, out=path, meter=None)
    assert path.read_bytes() == before


def test_a_finished_calibration_that_had_the_budget_is_kept_where_it_may_not_be_overwritten(
    calibrated: tuple[ts.Predictor, Path], tmp_path: Path
) -> None:
    path = tmp_path / "device.json"
    path.write_bytes(calibrated[1].read_bytes())
    spent_s = calibrated[0].provenance["calibrated_for_s"]
    with pytest.raises(ts.CalibrationError, match=rf"finished calibration of {spent_s:g} s, .* or a larger budget"):
        ts.calibrate("cpu", budget_s=spent_s, out=path, meter=None, overwrite=False)
    assert path.read_bytes() == calibrated[1].read_bytes()


def test_what_is_no_calibration_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for text, what in (("{}", "no calibration"), ("[1]", "no calibration"), ("half", "not JSON")):
        path.write_text(text)
        with pytest.raises(ts.CalibrationError, match=what):
            ts.calibrate("cpu", budget_s=1.0, out=path, meter=None)
        assert path.read_text() == text


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("provenance", "calibrated_for_s"), float("nan")),
        (("provenance", "calibrated_for_s"), -1e9),
        (("provenance", "throttled"), {"pauses": 1}),
        (("provenance", "throttled"), {"pauses": 1, "paused_s": "long", "slowest": 2.0}),
        (("networks", "count"), -1),
        (("networks", "timed"), [["a", "b", "c", "d"]]),
        (("networks", "timed"), [[1e12, 1.0, 1.0, 1]]),
        (("networks", "timed"), [[0, float("nan"), 1.0, 1]]),
        (("networks", "timed"), [[0, 0.0, 1.0, 1]]),
    ],
)
def test_an_edited_beginning_is_not_gone_on_with(
    calibrated: tuple[ts.Predictor, Path], tmp_path: Path, where: tuple[str, str], value: Any
) -> None:
    data = json.loads(calibrated[1].read_text()) | {"unfinished": True}
    data[where[0]][where[1]] = value
    path = tmp_path / "device.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ts.CalibrationError, match="cut short or edited"):
        ts.calibrate("cpu", budget_s=1.0, out=path, meter=None, progress=never)
    assert path.read_text() == json.dumps(data)


def never(*_: object) -> None:
    raise AssertionError("a layer was timed")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(ts.CalibrationError, match="cannot be written"):
        ts.calibrate("cpu", budget_s=600.0, out=tmp_path / "absent" / "device.json", meter=None, progress=never)


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_out_of_range_is_refused(budget_s: float) -> None:
    with pytest.raises(ts.CalibrationError, match=r"300"):
        ts.calibrate("cpu", budget_s=budget_s)


def test_a_device_or_a_meter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ts.DeviceError, match="this machine has cpu"):
        ts.calibrate("tpu", budget_s=1.0)
    with pytest.raises(ts.CalibrationError, match="'watts'"):
        ts.calibrate("cpu", budget_s=1.0, meter="watts")


class ProcessorMeter(EnergyMeter):
    """A processor that draws 20 W while this process computes, and nothing else."""

    name, scope, period_s = "processor", "this process", 0.001

    def read(self) -> Reading:
        return Reading(time.perf_counter_ns(), energy_j=20 * time.process_time())


def test_energy_is_fitted_where_there_is_a_meter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(joules, "_IDLE_S", 0.05)
    monkeypatch.setattr(calibration, "_ENERGY_SHARE", 0.9)
    calibrate_networks(4, tmp_path / "device.json", meter=ProcessorMeter())
    predictor = finished(tmp_path / "device.json")
    assert predictor.provenance["meter"] == "processor this process"
    assert predictor.provenance["idle_power_w"] < 20
    metered = [kind for kind, known in predictor.fitted.items() if known.energy_form is not None]
    assert metered
    for kind in set(metered) - {"view"}:
        table = predictor.samples[kind]
        known = np.isfinite(table.joules)
        assert 4 < table.joules[known].sum() / table.seconds[known].sum() < 100
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()).eval()
    energy = predictor.predict(ts.trace(model, torch.rand(1, 3, 32, 32))).energy
    assert energy is not None
    assert (energy.layer_j > 0).all()


def beats(monkeypatch: pytest.MonkeyPatch, beat_s: Callable[[int], float]) -> None:
    """Let the n-th beat of the pulse take ``beat_s(n)``, and do not wait long for it to recover."""
    count = itertools.count()
    monkeypatch.setattr(pulse.Pulse, "_beat", lambda _: beat_s(next(count)))
    monkeypatch.setattr(pulse, "_LONGEST_PAUSE_S", 0.3)


def test_a_device_that_throttles_is_given_pauses_and_that_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    beats(monkeypatch, lambda n: 1e-3 if n < 40 else 2e-3)
    path = tmp_path / "device.json"
    calibrate_networks(10, path, meter=None)
    noted = json.loads(path.read_text())["provenance"]["throttled"]
    assert noted["pauses"] >= 1
    assert noted["paused_s"] > 0
    assert noted["slowest"] == 2.0
    with pytest.warns(ts.ThrottledWarning, match=r"up to 100% slower .* calibrate again"):
        predictor = finished(path)
    assert predictor.provenance["throttled"] == noted


def test_a_steady_device_is_given_no_pause_and_a_recovered_one_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    beats(monkeypatch, lambda n: 1e-3 if n % 7 else 1.2e-3)
    probe = pulse.Pulse(torch.device("cpu"))
    for _ in range(20):
        probe.wait(10.0)
    assert probe.facts() == {}
    beats(monkeypatch, lambda n: 3e-3 if n < 5 else 1e-3)
    for _ in range(20):
        probe.wait(10.0)
    assert probe.facts()["throttled"]["pauses"] == 1


def test_progress_is_told_up_to_the_budget() -> None:
    told: list[tuple[float, float]] = []
    with contextlib.suppress(ts.CalibrationError):  # a second may be too few samples for any kind
        ts.calibrate(
            "cpu", budget_s=1.0, meter=None, progress=lambda spent_s, budget_s, _: told.append((spent_s, budget_s))
        )
    assert told
    assert told == sorted(told)
    assert {budget_s for _, budget_s in told} == {1.0}


def test_the_same_seed_draws_the_same_networks() -> None:
    def drawn(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [repr(random_net(rng).model) for _ in range(3)]

    with torch.device("meta"):
        assert drawn(0) == drawn(0)
        assert drawn(0) != drawn(1)


def test_a_whole_calibration_stays_until_another_is_whole(
    calibrated: tuple[ts.Predictor, Path], tmp_path: Path
) -> None:
    path = tmp_path / "device.json"
    data = json.loads(calibrated[1].read_text())
    data["provenance"]["calibrated_for_s"] = 1000.0
    path.write_text(json.dumps(data))
    before = path.read_text()
    calibrate_networks(1, path, meter=None)
    assert path.read_text() == before
