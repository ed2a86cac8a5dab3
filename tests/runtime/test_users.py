"""What users ran into: batteries nobody meters, devices that were slow for a while, servers that fall silent."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, LAYERS, PATIENCE_S, profile, remote, right, serve, split_of, truth, until
from tcp import reserved_port
from torch import nn
from transports import Silent
from tries import least_of

import torchsurgeon as ts
from torchsurgeon.link import WIRED
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport

PLAIN = ts.Link("plain", 1e7, 1e7, 1e-3)
RADIO = ts.Link.parse("wifi")


# --- energy that nobody knows ---


def test_a_battery_that_runs_low_where_nothing_is_metered_saves_time_and_says_so_once(server: Server) -> None:
    level = 1.0
    with split_of(server.url, objective=ts.Objective.battery(lambda: level)) as split:
        with pytest.warns(ts.UnknownEnergyWarning, match="latency is minimized") as caught:
            assert torch.equal(split(EXAMPLE), truth(EXAMPLE))
        told = [warning for warning in caught if warning.category is ts.UnknownEnergyWarning]
        assert [warning.filename for warning in told] == [__file__]
        level = 0.1
        time.sleep(1.1)
        assert right(split)
        assert all(torch.equal(answer, split(EXAMPLE)) for answer in split.map([EXAMPLE] * 2))
        assert len(split.decisions) >= 4


def test_an_energy_objective_outlives_a_server_that_comes_up_later() -> None:
    with reserved_port() as port, split_of(f"http://127.0.0.1:{port}", objective="energy") as split:
        with pytest.warns(ts.UnknownEnergyWarning):
            assert right(split)
        with serve(port=port):
            until(lambda: bool(split.decisions), split)


@pytest.mark.parametrize("objective", ["energy", {"latency": 1.0, "energy": 0.5}, ts.Objective.battery(lambda: 1.0)])
@pytest.mark.parametrize(
    ("known", "missing"),
    [
        ({"device_profile": profile(1e-3), "link": RADIO}, "device_profile="),
        ({"device_profile": profile(1e-3, 0.1), "link": PLAIN}, "link="),
        ({"link": PLAIN}, "link="),
    ],
)
def test_energy_that_what_was_given_does_not_tell_is_refused_at_once(
    objective: Any, known: dict[str, Any], missing: str
) -> None:
    with pytest.raises(ts.PlanError, match=missing):
        split_of("http://127.0.0.1:9", objective=objective, **known)


def test_without_a_fallback_unknown_energy_is_an_error_at_set_up(server: Server) -> None:
    with (
        split_of(server.url, objective="energy", fallback="error") as split,
        pytest.raises(ts.PlanError, match="energy is not known"),
    ):
        split.prepare()
    battery = ts.Objective.battery(lambda: 0.1)
    with split_of(server.url, objective=battery, fallback="error") as split:
        with pytest.warns(ts.UnknownEnergyWarning):
            split.prepare()
        assert right(split)


@pytest.mark.filterwarnings("ignore::torchsurgeon.UnknownEnergyWarning")
def test_a_meter_is_looked_for_where_energy_counts_and_only_there(server: Server) -> None:
    for objective, sought in (("energy", True), (ts.Objective.battery(lambda: 1.0), True), ("latency", False)):
        with split_of(server.url, objective=objective) as split:
            split.prepare()
            assert split.device_profile is not None
            assert (split.device_profile.provenance["meter"] != "none") is sought


@pytest.mark.parametrize(("layer_j", "here"), [(1e-6, True), (100.0, False)])
def test_known_energy_is_saved(server: Server, layer_j: float, here: bool) -> None:
    known = {"device_profile": profile(1e-3, layer_j), "server_profile": profile(1e-3), "link": RADIO}
    with split_of(server.url, objective="energy", **known) as split:
        assert right(split)
        assert split.decisions[0].row.on_device is here
    known["link"] = ts.Link("cable", 1e9, 1e9, 1e-3, radio=WIRED)
    with split_of(server.url, objective="energy", **known) as split:
        assert right(split)
        assert not split.decisions[0].row.on_device


def test_a_batch_is_sent_where_its_joules_on_the_device_are_more_than_the_radios_tail(server: Server) -> None:
    """The tail is paid once for a request of any size, and the device's joules for every sample."""
    known = {"device_profile": profile(1e-3, 0.5 / LAYERS), "server_profile": profile(1e-3)}
    link = ts.Link("radio", 1e7, 1e7, 1e-3, radio=ts.Radio(1e-8, 1e-8, 0.1, tail_s=2.0, tail_w=0.5))
    with split_of(server.url, objective="energy", link=link, **known) as split:
        for count in (1, 8, 1):
            x = torch.cat([EXAMPLE] * count)
            assert torch.equal(split(x), truth(x))
            row, cost_j = split.decisions[-1].row, split.decisions[-1].cost
            assert row.on_device is (count == 1)
            assert cost_j == pytest.approx(0.5 if count == 1 else 1.0, rel=0.1)


# --- deadlines after a slow while ---


def test_a_device_that_is_quick_again_is_found_out_though_every_call_has_a_deadline() -> None:
    pause_s = 0.002

    def slow(module: nn.Module) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            time.sleep(pause_s)
            return module(*args, **kwargs)

        return run

    known = {"device_profile": profile(1e-3)}
    with split_of("http://127.0.0.1:9", backend=slow, deadline_s=0.1, **known) as split:
        split.prepare()
        assert right(split)
        pause_s = 0.3
        with split.deadline(None):
            for _ in range(4):
                assert right(split)
        with pytest.raises(ts.DeadlineError, match="best possible"):
            split(EXAMPLE)
        pause_s = 0.002
        end_s, in_time = time.monotonic() + PATIENCE_S, 0
        while in_time < 10:
            assert time.monotonic() < end_s, split.stats()
            try:
                assert right(split)
                in_time += 1
            except ts.DeadlineError:
                in_time = 0
                time.sleep(0.02)


# --- servers that fall silent ---


def test_a_server_that_was_down_before_is_not_waited_for_at_another_cut(server: Server) -> None:
    transport = Silent(HttpTransport(server.url))
    transport.down = True
    with split_of(transport, partition=1) as split:
        assert right(split)
        transport.down, transport.silent = False, True
        split.partition = "server"
        assert right(split)
        assert split.last is not None
        assert split.last.total_s < 2.0
        transport.silent = False
        transport.over.set()
        until(lambda: remote(split), split)


def test_a_server_that_falls_silent_costs_new_weights_no_more_than_the_deadline_allows(server: Server) -> None:
    transport = Silent(HttpTransport(server.url))
    with split_of(transport, partition=1, deadline_s=1.0) as split:
        for _ in range(3):
            assert right(split)
        transport.silent = True
        split.model.load_state_dict({name: value.clone() for name, value in split.model.state_dict().items()})
        assert right(split)
        assert right(split)
        assert split.last is not None
        assert split.last.local_s == 0
        assert 0.1 < split.last.decide_s < 2.0  # it was waited for, and that is told

        def decide_s() -> float:
            assert right(split)
            assert split.last is not None
            return split.last.decide_s

        assert least_of(decide_s, enough=0.1) < 0.1


def test_a_server_that_is_well_is_asked_in_the_first_call_after_a_change(server: Server) -> None:
    with split_of(server.url, partition=1, deadline_s=5.0) as split:
        assert right(split)
        split.partition = 2
        assert right(split)
        assert split.last is not None
        assert split.last.server == server.url
        split.partition = "auto"
        assert right(split)
        assert split.decisions
