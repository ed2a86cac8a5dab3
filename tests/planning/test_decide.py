"""Plans keep to their constraints, say what these cost, and say where the choice would change."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.planning import Constraints, Objective, sweep
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.profiling import LayerEnergy, LayerProfile

torch.set_num_threads(1)
WIDTHS = [30, 200, 5, 80, 3, 40, 10]
COUNT = len(WIDTHS) - 1


def model() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))).eval(), torch.rand(1, 30)


GRAPH = ts.trace(*model())
LINK = ts.Link("some", 2e4, 1e6, 0.01, radio=ts.Radio(1e-6, 1e-6, 0.5))


def profile_of(seconds: list[float], joules: list[float] | None = None, memory: bool = True) -> LayerProfile:
    samples = np.array([seconds])
    names = tuple(layer.name for layer in GRAPH.layers)
    energy = None
    if joules is not None:
        whole = float(sum(joules))
        energy = LayerEnergy("recorded", 0.0, np.array(joules), np.zeros((COUNT, 2)), (whole, whole, whole))
    made = LayerProfile("Sequential", GRAPH.fingerprint, 1, names, samples, samples.sum(axis=1), {})
    bytes_ = np.array([4 * (a + b) for a, b in itertools.pairwise(WIDTHS)]) if memory else None
    return dataclasses.replace(made, energy=energy, memory_bytes=bytes_)


DEVICE = profile_of([0.01, 0.01, 0.2, 0.2, 0.5, 0.5], [0.1, 0.1, 0.2, 0.3, 0.5, 0.5])
SERVER = profile_of([0.001, 0.001, 0.002, 0.002, 0.005, 0.005])


def planned(**options: Any) -> ts.Plan:
    return ts.plan(GRAPH, **{"device": DEVICE, "server": SERVER, "link": LINK, **options})


NUMBERS = st.lists(st.floats(1e-3, 1.0), min_size=COUNT, max_size=COUNT)


@settings(deadline=None, max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.floats(1e3, 1e6),
    st.sampled_from(["latency", "energy", "throughput", "server_time"]),
    st.fixed_dictionaries(
        {},
        optional={
            "latency_s": st.floats(0.01, 4.0),
            "energy_j": st.floats(0.01, 4.0),
            "memory_bytes": st.integers(0, 100_000),
            "min_layers": st.integers(1, COUNT),
            "raw_input": st.just(False),
            "server_allowed": st.just(False),
        },
    ),
)
def test_a_plan_is_the_best_of_what_keeps_to_the_constraints(numbers, up, objective, limits) -> None:
    device, server = profile_of(numbers[0], numbers[1]), profile_of(numbers[2])
    link = dataclasses.replace(LINK, uplink_bit_s=up)
    rows = LayerCosts(GRAPH, device, server).rows()
    everything = ts.Frontier("all", "", 1, 0, 40, tuple(rows))
    values, latency, energy = (everything.costs(link, objective=name) for name in (objective, "latency", "energy"))
    allowed = [
        limits.get("latency_s", np.inf) >= latency[i]
        and limits.get("energy_j", np.inf) >= energy[i]
        and limits.get("memory_bytes", np.inf) >= row.memory_bytes
        and limits.get("min_layers", 0) <= row.index
        and (limits.get("raw_input", True) or row.index > 0)
        and (limits.get("server_allowed", True) or row.index == COUNT)
        for i, row in enumerate(rows)
    ]
    if not any(allowed):
        with pytest.raises(ts.InfeasibleError) as caught:
            ts.plan(GRAPH, device=device, server=server, link=link, objective=objective, **limits)
        assert set(caught.value.least) == set(limits)
        assert all(name in str(caught.value) for name in limits)
        return
    found = ts.plan(GRAPH, device=device, server=server, link=link, objective=objective, **limits)
    assert found.value == pytest.approx(values[allowed].min())
    assert allowed[found.row.index]
    assert set(found.prices) == set(limits)
    assert all(price <= found.value * (1 + 1e-9) for price in found.prices.values())


def test_infeasible_says_how_near_one_comes() -> None:
    with pytest.raises(ts.InfeasibleError) as caught:
        planned(latency_s=0.001, min_layers=3)
    rows = [row for row in LayerCosts(GRAPH, DEVICE, SERVER).rows() if row.index >= 3]
    frontier = ts.Frontier("all", "", 1, 0, 40, tuple(rows))
    assert caught.value.least["latency_s"] == pytest.approx(frontier.costs(LINK).min())
    assert caught.value.least["min_layers"] is None
    assert "latency_s=0.001" in str(caught.value)


@pytest.mark.parametrize(
    "limits",
    [
        {"latency_s": -1.0},
        {"energy_j": float("nan")},
        {"memory_bytes": -5},
        {"min_layers": -1},
        {"min_layers": None},
        {"min_layers": 1.5},
        {"raw_input": "no"},
        {"raw_input": 0},
        {"server_allowed": None},
        {"latency": 1.0},
    ],
)
def test_constraints_that_cannot_be_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ts.PlanError, match=rf"{next(iter(limits))}.*got"):
        planned(**limits)


def test_what_was_not_measured_is_not_planned_for() -> None:
    with pytest.raises(ts.PlanError, match="memory"):
        planned(device=profile_of([1.0] * COUNT, memory=False), memory_bytes=10)
    for options in ({"objective": "energy"}, {"energy_j": 1.0}):
        with pytest.raises(ts.PlanError, match="no joules"):
            planned(device=profile_of([1.0] * COUNT), **options)


def test_a_plan_says_where_its_choice_changes() -> None:
    found = planned()
    rates = [change for change in found.crossovers if change.quantity == "uplink_bit_s"]
    assert rates
    assert [change.at for change in rates] == sorted(change.at for change in rates)
    for before, after in itertools.pairwise(rates):
        assert before.after == after.before
    for change in rates:
        for at, row in ((change.at * 0.999, change.before), (change.at * 1.001, change.after)):
            link = dataclasses.replace(LINK, uplink_bit_s=at)
            assert planned(link=link).row == row
            assert found.frontier.best(link) == row
    loads = [change for change in found.crossovers if change.quantity == "load"]
    for change in loads:
        assert planned(load=change.at * 1.001).row == change.after


def test_an_explanation_sets_the_choice_beside_the_others_term_by_term() -> None:
    found = planned(raw_input=False, objective=Objective(latency=1.0, energy=0.2))
    text = found.explain()
    assert found.runner_up is not None
    assert found.runner_up.row.index != found.row.index
    for word in (
        "chosen",
        "all on device",
        "all on server",
        "runner-up",
        "no input leaves",
        "fresh connection",
    ):
        assert word in text
    for terms in (found.terms, found.device_only, found.server_only, found.runner_up):
        assert f"{terms.latency_s * 1e3:.2f}" in text
        assert f"{terms.energy_j:.4f}" in text
    assert found.device_only.row.on_device
    assert found.server_only.row.index == 0
    assert planned(server_allowed=False).server_only is None


def test_intervals_of_predictions_carry_over_to_the_latency() -> None:
    def predicted(profile: LayerProfile) -> LayerProfile:
        return dataclasses.replace(profile, interval_s=np.stack([profile.layer_s * 0.5, profile.layer_s * 2.0], axis=1))

    found = planned(device=predicted(DEVICE), server=predicted(SERVER))
    terms = found.terms
    moving, fixed = terms.head_s + terms.tail_s, terms.uplink_s + terms.downlink_s
    assert found.interval_s == pytest.approx((fixed + moving / 2, fixed + moving * 2))
    assert "intervals" in found.explain()
    assert planned().interval_s is None


def test_a_sweep_gains_over_the_better_end(tmp_path: Path) -> None:
    frontier = ts.Frontier.build(GRAPH, DEVICE, SERVER)
    rates, loads = [1e4, 1e5, 1e6], [0.5, 5.0]
    found = sweep(frontier, LINK, rates, loads)
    ratio = LINK.downlink_bit_s / LINK.uplink_bit_s
    for (i, load), (j, rate) in itertools.product(enumerate(loads), enumerate(rates)):
        link = dataclasses.replace(LINK, uplink_bit_s=rate, downlink_bit_s=rate * ratio)
        chosen = found.rows[found.chosen[i, j]]
        assert found.value[i, j] == pytest.approx(frontier.terms(chosen, link, load).latency_s)
        assert frontier.costs(link, load).min() == pytest.approx(found.value[i, j])
    assert (found.gain >= 1).all()
    found.save(tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert float(lines[1]["gain"]) == pytest.approx(found.gain[0, 1])
    with pytest.raises(ts.PlanError):
        sweep(frontier, LINK, [], loads)
    with pytest.raises(ts.PlanError, match="varied must be one of load, slowdown; got 'speed'"):
        sweep(frontier, LINK, rates, loads, varied="speed")
    for device_w in (-3.0, float("nan"), "5 W"):
        with pytest.raises(ts.PlanError, match="device_w must be zero or a positive number of watts; got"):
            sweep(frontier, LINK, rates, loads, "energy", device_w=device_w)


def test_a_sweep_over_slow_downs_is_that_over_a_slower_device() -> None:
    frontier = ts.Frontier.build(GRAPH, DEVICE, SERVER)
    found = sweep(frontier, LINK, [1e4, 1e6], [1.0, 3.0], slowdown=2.0, varied="slowdown")
    for factor, value in zip(found.factors, found.value, strict=True):
        assert value == pytest.approx(sweep(frontier, LINK, [1e4, 1e6], [1.0], slowdown=2.0 * factor).value[0])


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    DEVICE.save(tmp_path / "device.json")
    SERVER.save(tmp_path / "server.json")
    return [
        f"{__name__}:model",
        "--device",
        str(tmp_path / "device.json"),
        "--server",
        str(tmp_path / "server.json"),
    ]


def test_the_command_plans(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *files, "--link", "1/1/0.01", "--frontier", str(tmp_path / "frontier.json")]) == 0
    printed = capsys.readouterr().out
    wanted = planned(link=ts.Link.parse("1/1/0.01"))
    told = " ".join(printed.split())
    for line in wanted.explain().splitlines():
        assert " ".join(line.split()) in told
    assert "★" in printed
    read = ts.Frontier.load(tmp_path / "frontier.json")
    assert read.best(ts.Link.parse("1/1/0.01")) == wanted.row
    assert cli.main(["plan", *files, "--objective", "latency=1,energy=2", "--link", "lte", "--min-layers", "2"]) == 0
    assert "latency + 2·energy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--latency", "1e-9"], "--latency 1e-09 s cannot be kept"),
        (["--objective", "speed"], "speed"),
        (["--objective", "latency=much"], "much"),
        (["--link", "carrier pigeon"], "pigeon"),
        (["--codecs", "absent.json"], "absent.json"),
    ],
)
def test_the_command_says_what_is_wrong(
    files: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *files, *more]) == 2
    assert said in capsys.readouterr().err


def test_the_command_sweeps(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = ["--csv", str(tmp_path / "sweep.csv"), "--plot", str(tmp_path / "sweep.png")]
    assert cli.main(["sweep", *files, "--uplinks", "0.01:10:5", "--loads", "0.1:10:3", *out]) == 0
    printed = capsys.readouterr().out
    assert "all on the server" in printed
    assert "1.54×" in printed
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 16
    assert cli.main(["sweep", *files, "--loads", "1:0:3"]) == 2
    assert "FROM:TO:N" in capsys.readouterr().err


def test_only_a_plan_takes_an_uplink_and_keeps_the_downlink(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    link = ["--link", "1/1/0.01", "--uplink", "0.02"]
    assert cli.main(["plan", *files, *link]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for line in planned(link=dataclasses.replace(ts.Link.parse("1/1/0.01"), uplink_bit_s=2e4)).explain().splitlines():
        assert " ".join(line.split()) in told
    # It would change how quick the downlink is beside the uplink, all over the grid.
    assert cli.main(["sweep", *files, *link]) == 2
    assert "FROM:TO:N" in capsys.readouterr().err


def test_the_command_sweeps_energy_by_the_backends_whose_joules_are_known(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(profile_of([0.001] * COUNT), provenance={"backend": "other", "device": "test"})
    other.save(tmp_path / "other.json")
    grid = ["--objective", "energy", "--link", "wifi", "--uplinks", "0.01:10:3", "--loads", "1:10:2"]
    shown = []
    for more in ([], ["--device", str(tmp_path / "other.json")]):
        assert cli.main(["sweep", *files, *grid, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_constraints_name_themselves() -> None:
    assert str(Constraints()) == "none"
    assert str(Constraints(latency_s=0.1, raw_input=False)) == "at most 0.1 s, no input leaves the device"
    everything = Constraints(energy_j=2, memory_bytes=1_500_000, min_layers=3, server_allowed=False)
    assert str(everything) == "at most 2 J, at most 1.5 MB, at least 3 layers on the device, nothing leaves the device"


def test_a_link_may_be_given_by_its_name() -> None:
    assert planned(link="lte").link == ts.Link.parse("lte")
    with pytest.raises(ts.LinkError, match="no link 'lta'"):
        planned(link="lta")


def test_what_is_no_objective_is_told_how_weights_are_given() -> None:
    dict_form = r'or a dict of weights by these names such as \{"latency": 1, "energy": 0\.5\}; '
    for wrong, said in (
        ("latency=1,energy=0.5", "got 'latency=1,energy=0.5'"),
        ({"latency": 1, "energi": 0.5}, "the dict has 'energi'"),
        (3, "got 3"),
    ):
        with pytest.raises(ts.PlanError, match=dict_form + said):
            planned(objective=wrong)


def test_what_is_no_profile_is_told_what_makes_one() -> None:
    made = r"torchsurgeon\.reference_device\('tegra-k1-gpu'\)\.predict\(graph\) makes one"
    for wrong, said in (
        ("tegra-k1-gpu", f"got 'tegra-k1-gpu'; {made}"),
        (ts.reference_device("tegra-k1-gpu"), r"its predict\(graph\) makes one"),
        ("device.json", r"got 'device\.json'; LayerProfile\.load\(\) reads one"),
    ):
        with pytest.raises(ts.ProfileError, match=said):
            planned(device=wrong)


def test_a_model_that_ignores_its_input_is_planned() -> None:
    class Ignores(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(3)

    graph = ts.trace(Ignores().eval(), torch.rand(1, 4))
    profile = ts.profile(graph, repeats=2, meter=None)
    assert ts.plan(graph, device=profile, server=profile, link="lte").row.on_device
