"""A server that is not asked is tried now and then: how fast it computes, and how fast the link to it is."""

from __future__ import annotations

from typing import Any

import pytest
from classifier import LAYERS, PATIENCE_S, profile, right, split_of, until
from known_machines import SLOW, device

import torchsurgeon as ts
from torchsurgeon.adapting.load import LoadEstimator
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.serve import Server


def disturbed(layers: int) -> ts.LayerProfile:
    """A profile of a quick machine on which something else took a second, more or less, of the first ``layers``."""
    runs = [[share] * layers + [2e-4] * (LAYERS - layers) for share in (0.3, 0.5, 1.0, 1.2, 1.5)]
    times = {"samples_s": runs, "whole_s": [sum(run) for run in runs]}
    return ts.LayerProfile.from_json(profile(1e-3).to_json() | times)


@pytest.mark.parametrize(("layers", "deadline_s"), [(LAYERS, None), (LAYERS - 1, None), (LAYERS - 1, PATIENCE_S)])
def test_a_server_whose_profile_was_disturbed_is_found_out_to_be_quick(
    server: Server, known: dict[str, Any], layers: int, deadline_s: float | None
) -> None:
    # The profile says that the server takes longer than the device, which it does not. Where the last layer was not
    # disturbed, pings, of which the server runs no other, take as long as predicted.
    wrong = disturbed(layers)
    assert wrong.spread > 0.68
    # Over this link, the last layer alone is not worth a request.
    far = ts.Link("far", 1e9, 1e9, 0.06)
    given = {**known, "server_profile": wrong, "link": far, "deadline_s": deadline_s}
    with (
        LinkEmulator(0, "127.0.0.1", server.port, far) as emulator,
        split_of(f"http://127.0.0.1:{emulator.port}", backend=device, **given) as split,
    ):
        assert right(split)
        assert split.partition == split.graph.points[-1]
        until(lambda: split.last is not None and split.last.server is not None, split)


def test_a_link_is_probed_although_a_ping_is_due_whenever_the_servers_are_looked_at(
    server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where they are looked at less often than once a second, since the device has no time for it."""
    monkeypatch.setattr("torchsurgeon.runtime.keeper._QUIET_S", -1.0)
    monkeypatch.setattr(LoadEstimator, "ping_due", lambda _: True)
    with (
        LinkEmulator(0, "127.0.0.1", server.port, SLOW) as emulator,
        split_of(f"http://127.0.0.1:{emulator.port}", backend=device, link=SLOW, **known) as split,
    ):
        until(lambda: split.stats()["servers"][0]["probes"] > 0 < split.stats()["pings"], split)


@pytest.mark.parametrize("fallback", ["local", "error"])
def test_a_link_that_is_quicker_than_was_believed_is_found_out(
    server: Server, known: dict[str, Any], fallback: Any
) -> None:
    """As after a single slow transfer: while everything runs on the device, no call shows what the link is like."""
    with split_of(server, backend=device, fallback=fallback, link=SLOW, **known) as split:
        assert right(split)
        assert split.partition == split.graph.points[-1]
        until(lambda: split.last is not None and split.last.server is not None, split)
