"""A profile holds what was measured, survives a file, and refuses what is not of its graph."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon import cli, meters, report
from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.profiling import find_device, joules, layer_trace, measure
from torchsurgeon.tracing.step import Environment, Step


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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        with pytest.raises(ts.ProfileError, match=r"slow.*must be positive; got"):
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


def test_progress_is_reported(graph: ts.LayerGraph) -> None:
    seen: list[tuple[int, int]] = []
    ts.profile(graph, repeats=2, warmup=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_profile_of_another_graph_is_refused_by_name(profile: ts.LayerProfile) -> None:
    other = ts.trace(nn.Sequential(nn.Linear(4, 4)).eval(), torch.rand(1, 4))
    with pytest.raises(ts.ProfileError, match=r"Uneven.*Sequential"):
        profile.check(other)


def energetic(data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    count = len(data["layers"])
    energy = {"meter": "rapl", "idle_power_w": 1.0, "layer_j": [0.5] * count, "interval_j": [[0, 1]] * count}
    return {**data, "energy": {**energy, "whole_j": [1, 1, 1], **fields}}


def test_layers_of_other_names_are_refused(profile: ts.LayerProfile, graph: ts.LayerGraph) -> None:
    renamed = dataclasses.replace(profile, layers=(*profile.layers[:-1], "renamed"))
    with pytest.raises(ts.ProfileError, match=r"layer 4 is 'renamed' in the profile and .* in the model"):
        renamed.check(graph)


def test_joules_that_noise_took_below_zero_count_as_none(profile: ts.LayerProfile) -> None:
    count = len(profile.layers)
    data = energetic(profile.to_json(), layer_j=[-0.1] + [0.5] * (count - 1), interval_j=[[-0.3, 1]] * count)
    head_j = ts.LayerProfile.from_json(data).head_j
    assert head_j is not None
    assert head_j[:2].tolist() == [0.0, 0.0]
    assert (np.diff(head_j) >= 0).all()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: {**d, "format": "torchsurgeon.profile/1"}, "profile/1"),
        (lambda d: {k: v for k, v in d.items() if k != "samples_s"}, "samples_s"),
        (lambda d: {**d, "samples_s": [[1.0]]}, "shape"),
        (lambda d: {**d, "samples_s": [[-1.0] * len(d["layers"])]}, "non-negative"),
        (lambda d: {**d, "whole_s": []}, "whole_s"),
        (lambda d: {**d, "samples_s": "soon"}, "samples_s must be a list of seconds for each repeat; got 'soon'"),
        (lambda d: {**d, "memory_bytes": [1]}, r"memory_bytes must have shape \(\d+,\)"),
        (lambda d: {**d, "memory_bytes": [-1] * len(d["layers"])}, "memory_bytes must hold bytes from 0 on; got -1"),
        (lambda d: {**d, "memory_bytes": [1.5] * len(d["layers"])}, "memory_bytes must be a list of whole numbers"),
        (lambda d: {**d, "batch": 1.7}, "batch must be a whole number from 1 on; got 1.7"),
        (lambda d: {**d, "batch": True}, "batch must be a whole number from 1 on; got True"),
        (lambda d: {**d, "whole_s": [True]}, "whole_s must be a list of seconds; got"),
        (lambda d: {**d, "samples_s": [["1"] * len(d["layers"])]}, "samples_s must be a list of seconds"),
        (lambda d: {**d, "layers": [d["layers"][0]] * len(d["layers"])}, "layers must have names of their own"),
        (
            lambda d: {**d, "interval_s": [[2, 1]] * len(d["layers"])},
            "interval_s must hold pairs .* the lower one",
        ),
        (lambda d: {**d, "interval_s": [[-1, 1]] * len(d["layers"])}, "interval_s must hold pairs .* not negative"),
        (lambda d: {**d, "interval_s": [[None, 1]] * len(d["layers"])}, "interval_s must hold pairs .* finite"),
        (lambda d: {**d, "whole_interval_s": [2, 1]}, "whole_interval_s must hold pairs"),
        (lambda d: energetic(d, layer_j=[-0.6] * len(d["layers"])), "layer_j must hold joules from 0 on"),
        (lambda d: energetic(d, whole_j=[-0.6, -0.7, -0.5]), "whole_j must hold joules from 0 on"),
        (lambda d: energetic(d, whole_j=[0.6, 0.7, 0.5]), "an interval of whole_j must have its lower end first"),
        (lambda d: energetic(d, interval_j=[[1, 0]] * len(d["layers"])), "an interval of layer_j must have its lower"),
        (lambda d: energetic(d, idle_power_w=-1), "idle_power_w must be watts from 0 on; got -1"),
        (lambda d: energetic(d, idle_power_w=True), "energy must be"),
        (lambda d: {**d, "energy": {"meter": "rapl"}}, "whole_j"),
        (lambda d: [], "list"),
        (lambda d: {**d, "whole_s": [0.0]}, "whole_s"),
        (lambda d: {**d, "whole_s": [1e300]}, "whole_s"),
        (lambda d: {**d, "whole_s": [[]]}, "whole_s"),
        (lambda d: {**d, "samples_s": [[0.0] * len(d["layers"])]}, "samples_s"),
        (lambda d: {**d, "samples_s": [[10**400] * len(d["layers"])]}, "samples_s must be"),
        (lambda d: {**d, "batch": float("inf")}, "batch must be a whole number from 1 on; got inf"),
        (lambda d: {**d, "batch": -1}, "batch must be"),
        (lambda d: {**d, "model": None}, "model must be a text; got None"),
        (lambda d: {**d, "memory_bytes": [1e300] * len(d["layers"])}, "memory_bytes must be"),
        (lambda d: {**d, "whole_interval_s": []}, "whole_interval_s must be a pair of seconds"),
        (lambda d: energetic(d, layer_j=[float("inf")] * len(d["layers"])), "finite joules"),
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
    for text in (json.dumps(profile.to_json())[:-20], "[" * 100_000, "9" * 5_000):
        path.write_text(text)
        with pytest.raises(ts.ProfileError, match=r"short\.json is not JSON"):
            ts.LayerProfile.load(path)
    with pytest.raises(ts.ProfileError, match="cannot be read"):
        ts.LayerProfile.load(tmp_path / "absent.json")


def test_repeats_out_of_range_are_refused(graph: ts.LayerGraph) -> None:
    with pytest.raises(ts.ProfileError, match="repeats must be a whole number from 1 on; got 0"):
        ts.profile(graph, repeats=0)


# Devices


def test_a_device_that_does_not_exist_is_refused_with_those_that_do(
    graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, reason in (("cuda", "sees no CUDA device"), ("gpu", "'gpu' is not a device"), ("meta", "got 'meta'")):
        with pytest.raises(ts.DeviceError, match=f"{reason}.*this machine has cpu"):
            ts.profile(graph, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ts.DeviceError, match="no device 'cuda:2'; this machine has cpu, cuda:0, cuda:1"):
        ts.profile(graph, "cuda:2")


def test_a_model_elsewhere_is_refused_with_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    graph = ts.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), torch.rand(1, 4))
    with pytest.raises(ts.DeviceError, match=r"on cpu, not on cuda:0: call model\.to\('cuda:0'\)"):
        ts.profile(graph, "cuda:0")
    graph.model[1].to("meta")  # type: ignore[index]
    with pytest.raises(ts.DeviceError, match="spread over cpu, meta"):
        ts.profile(graph)


def test_a_cuda_clocks_intervals_go_to_their_layers(graph: ts.LayerGraph) -> None:
    class EveryMicrosecond(meters.Clock):
        marks = 0

        def mark(self) -> None:
            self.marks += 1

        def intervals_ns(self) -> list[int]:
            marks, self.marks = self.marks, 0
            return [1_000] * (marks - 1)

    run = measure.ModelRun(graph, torch.device("cpu"), None)
    samples, whole = run.times(EveryMicrosecond(), 2, 1, 0.0, lambda: None)
    # Reading the batch size, before the first layer, and gathering the result, after the last, are steps of their own.
    assert samples * 1e6 == pytest.approx(np.array([[2, 1, 1, 1, 2]] * 2))
    assert whole.tolist() == [1e-6] * 2


def test_while_kernels_are_traced_every_layer_is_told_apart(
    graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        names: ClassVar[list[str]] = []

        def before(self, step: Step, environment: Environment) -> None:
            self.names.append(step.name)

        def after(self, step: Step, environment: Environment, token: None) -> None:
            self.names.append(f"/{step.name}")

    monkeypatch.setattr(Segment, "watcher", Told())
    found = ts.profile(graph, repeats=1, warmup=0, meter=None)
    told = [name for name in Told.names if name in found.layers]
    assert told == [*found.layers] * 2  # the timed pass and the plain one
    assert Told.names[1::2] == [f"/{name}" for name in Told.names[::2]]
    assert (found.samples_s > 0).all()


# Memory


def test_memory_is_that_of_live_tensors_and_of_no_parameter(profile: ts.LayerProfile) -> None:
    narrow, wide = 16 * 64 * 4, 16 * 4096 * 4
    # The last layer's result shares the memory of the one before.
    assert profile.memory_bytes is not None
    assert profile.memory_bytes.tolist() == [2 * narrow, narrow + wide, wide + narrow, 2 * narrow, narrow]
    assert profile.head_memory_bytes is not None
    assert profile.head_memory_bytes.tolist() == [0, 2 * narrow, *[narrow + wide] * 4]


def test_a_value_held_for_later_counts_until_it_is_used() -> None:
    class Skip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = torch.sin(x)
            a, b = torch.cos(held).chunk(2)
            return torch.cat([a, b]) + held

    found = ts.profile(ts.trace(Skip().eval(), torch.rand(1000)), repeats=1, meter=None)
    assert found.memory_bytes is not None
    by_name = dict(zip(found.layers, (found.memory_bytes / 4000).tolist(), strict=True))
    assert by_name == {"sin": 2, "cos": 2, "chunk": 2, "cat": 3, "add": 3}


# Energy


class Counter(meters.EnergyMeter):
    """Counts exactly what the layers say they draw."""

    name, scope, period_s = "counter", "the layers", 0.002

    def __init__(self) -> None:
        self.power_w, self._since_ns, self._total_j = 2.0, time.perf_counter_ns(), 0.0

    def read(self) -> meters.Reading:
        now_ns = time.perf_counter_ns()
        self._total_j += self.power_w * (now_ns - self._since_ns) * 1e-9
        self._since_ns = now_ns
        return meters.Reading(now_ns, energy_j=self._total_j)


class Burner(nn.Module):
    """Draws 10 W more for at least 2 ms."""

    counter: Counter | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counter is not None:
            self.counter.read()
            self.counter.power_w = 12.0
            time.sleep(2e-3)
            self.counter.read()
            self.counter.power_w = 2.0
        return x + 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[ts.LayerGraph, Counter]:
    monkeypatch.setattr(joules, "_IDLE_S", 0.02)
    model = nn.Sequential(nn.Linear(64, 64), Burner(), nn.ReLU(inplace=True)).eval()
    graph = ts.trace(model, torch.rand(4, 64), leaf_modules=["1"])
    counter = Counter()
    # A lock-free counter read from two threads would count some moments twice.
    monkeypatch.setattr(Counter, "read", _locked(Counter.read))
    model[1].counter = counter
    return graph, counter


def _locked(read):  # type: ignore[no-untyped-def]
    import threading

    lock = threading.Lock()

    def locked(self: Counter) -> meters.Reading:
        with lock:
            return read(self)  # type: ignore[no-any-return]

    return locked


def test_joules_go_to_the_layer_that_draws_them_and_idle_to_none(
    counted: tuple[ts.LayerGraph, Counter], tmp_path: Path
) -> None:
    graph, counter = counted
    seen: list[tuple[int, int]] = []
    found = ts.profile(
        graph, repeats=2, warmup=1, meter=counter, progress=lambda done, total: seen.append((done, total))
    )
    energy = found.energy
    assert energy is not None
    assert energy.idle_power_w == pytest.approx(2.0)
    linear_j, burner_j, relu_j = energy.layer_j
    assert burner_j > 0.8 * 10 * 2e-3
    assert abs(linear_j) < burner_j / 20
    assert abs(relu_j) < burner_j / 20
    low_j, high_j = energy.interval_j[1]
    assert low_j < burner_j < high_j
    assert energy.whole_j[0] > 0.8 * 10 * 2e-3
    assert found.head_j is not None
    assert found.head_j[-1] == pytest.approx(energy.whole_j[0])
    assert found.provenance["meter"] == "counter the layers"
    assert "by counter the layers" in str(found)
    assert seen[-1] == (3 + 4, 3 + 4)
    found.save(tmp_path / "profile.json")
    loaded = ts.LayerProfile.load(tmp_path / "profile.json")
    assert loaded.energy is not None
    assert (loaded.energy.layer_j == energy.layer_j).all()
    assert loaded.to_json() == found.to_json()
    assert found.scaled(2).energy is None


def test_metering_a_layer_leaves_its_inputs_alone() -> None:
    class Accumulates(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            y += 2
            view = y[:2]
            view.mul_(3)
            return y

    graph = ts.trace(Accumulates().eval(), torch.rand(4))
    whole = tail_for(graph, [spec.name for spec in graph.inputs])
    x = torch.rand(4)
    ranks = {step: rank for rank, step in enumerate(graph.flow.layers)}
    repeater = joules._Repeater(ranks, np.full(len(ranks), 1e-6), 1e-5, lambda: None, lambda: None)
    assert torch.equal(whole.watched([x], repeater)[-1], Accumulates()(x))
    assert set(repeater.counts) == {0, 1, 2, 3}
    assert min(repeater.counts.values()) >= 10


def test_where_nothing_meters_there_are_no_joules_and_the_profile_says_why(
    graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Counter):
        def read(self) -> meters.Reading:
            raise ts.MeterError("unplugged")

    assert ts.profile(graph, repeats=1, meter=None).energy is None
    faults = [ts.MeterError("no rail"), ts.MeterError("root only")]
    monkeypatch.setattr(measure, "find_meter", lambda device: meters.NullMeter(faults))
    found = ts.profile(graph, repeats=1)
    assert found.energy is None
    assert found.provenance["meter"] == "none; no rail; root only"
    assert "not metered; meter: none; no rail" in str(found)
    monkeypatch.setattr(joules, "_IDLE_S", 0.01)
    found = ts.profile(graph, repeats=1, meter=Broken())
    assert found.energy is None
    assert "gave no reading" in found.provenance["meter"]
    with pytest.raises(ts.ProfileError, match=r"must be .* got 'rapl'"):
        ts.profile(graph, meter="rapl")


def test_unknown_joules_are_null_in_a_file_and_come_back_unknown(profile: ts.LayerProfile) -> None:
    unknown = np.full(5, math.nan)
    energy = ts.LayerEnergy("m", 1.0, unknown, np.full((5, 2), math.nan), (math.nan,) * 3)
    data = json.loads(json.dumps({**profile.to_json(), "energy": energy.to_json()}, allow_nan=False))
    loaded = ts.LayerProfile.from_json(data).energy
    assert loaded is not None
    assert np.isnan(loaded.layer_j).all()
    assert loaded.interval_j.shape == (5, 2)


# Noise


def test_a_machine_that_slows_down_is_warned_of(graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(slow: float):  # type: ignore[no-untyped-def]
        whole = np.array([1.0] * 6 + [slow] * 3)
        return lambda *_: (np.ones((9, 5)), whole)

    monkeypatch.setattr(measure.ModelRun, "times", times(1.2))
    with pytest.warns(ts.NoisyProfileWarning, match="20% longer than the first.*cooldown_s"):
        found = ts.profile(graph, meter=None)
    assert found.drift == pytest.approx(0.2)
    monkeypatch.setattr(measure.ModelRun, "times", times(1.0))
    assert ts.profile(graph, meter=None).drift == 0
    monkeypatch.setattr(measure.ModelRun, "times", lambda *_: (np.ones((4, 5)), np.array([1.0, 2.0, 1.0, 2.0])))
    with pytest.warns(
        ts.NoisyProfileWarning, match=r"^4 runs differ widely: the middle half spans \d+% of the median, so .* busy"
    ) as caught:
        ts.profile(graph, meter=None)
    assert caught[0].filename == __file__
    told: list[ts.NoisyProfileWarning] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.profile(graph, meter=None, on_noise=told.append)
    assert [noise.finding.partition(":")[0] for noise in told] == ["4 runs differ widely"]


def test_the_device_rests_when_asked(graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    ts.profile(graph, repeats=21, warmup=1, cooldown_s=0.5, meter=None)
    assert rests == [0.5] * 3
    with pytest.raises(ts.ProfileError, match="0 or more seconds; got -1"):
        ts.profile(graph, cooldown_s=-1)


def test_a_clock_that_jumps_back_is_told(graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", count(1_000_000, -100).__next__)
    with pytest.raises(ts.MeterError, match="jumped back by 100 ns during a run; measure again"):
        ts.profile(graph, meter=None)


# What people see


def test_a_profile_in_words(profile: ts.LayerProfile) -> None:
    text = str(profile)
    for part in ("Uneven, 5 layers, batch 16", "over 7 runs", "slowest is large.", "0.266 MB at most, in large.0"):
        assert part in text


def test_one_run_is_a_trace_that_perfetto_opens(graph: ts.LayerGraph, tmp_path: Path) -> None:
    trace = layer_trace(graph)
    assert [layer.name for layer in trace.layers] == [layer.name for layer in graph.layers]
    trace.save(tmp_path / "trace.json")
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert all(before["ts"] + before["dur"] <= after["ts"] + 1e-3 for before, after in pairwise(events))


def uneven() -> tuple[nn.Module, torch.Tensor]:
    return Uneven(), torch.rand(16, 64)


def test_the_command_writes_profile_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot, trace = (tmp_path / name for name in ("profile.json", "profile.png", "trace.json"))
    arguments = ["--repeats", "2", "--threads", "1", "--no-energy", "--out", str(out), "--plot", str(plot)]
    assert cli.main(["profile", f"{__name__}:uneven", *arguments, "--trace", str(trace)]) == 0
    loaded = ts.LayerProfile.load(out)
    assert loaded.layers[1] == "large.0"
    assert plot.stat().st_size > 10_000
    assert json.loads(trace.read_text())["traceEvents"]
    shown = capsys.readouterr().out
    assert "large.0" in shown
    assert "not metered" in shown


def test_the_command_refuses_a_device_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", f"{__name__}:uneven", "--device", "cuda:77"]) == 2
    assert "this machine has cpu" in capsys.readouterr().err


def test_joules_are_printed_with_their_interval() -> None:
    assert report.joules_text(0.0123, 0.011, 0.0135) == "12.3 (11 … 13.5) mJ"
    assert report.joules_text(2.5, math.nan, math.nan) == "2.5 J"
    assert report.joules_text(math.nan, math.nan, math.nan) == "?"


@pytest.mark.parametrize("given", [{"repeats": 2.5}, {"repeats": True}, {"repeats": "3"}, {"warmup": 1.5}])
def test_how_often_a_model_runs_is_a_whole_number(graph: ts.LayerGraph, given: dict[str, Any]) -> None:
    with pytest.raises(ts.ProfileError, match=f"{next(iter(given))} must be a whole number from"):
        ts.profile(graph, meter=None, **given)
