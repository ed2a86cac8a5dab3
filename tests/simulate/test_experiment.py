"""The datacenter of the paper: its costs are the authors', and its gains follow from the cuts."""

from __future__ import annotations

import pytest

from benchmarks.evaluate.applications import APPLICATIONS, applications
from benchmarks.evaluate.datacenter import BASE, FULL_LINKS, Searches, demand, throughput
from benchmarks.evaluate.datacenter_fluid import fleet
from torchsurgeon.simulate import settle

# Milliseconds of whole networks, added up over the rows of the authors' files.
TOTALS_MS = {
    "cpu": (380.4, 3228.3, 708.0, 140.2, 2934.4, 1.10, 0.90, 1.13),
    "gpu": (81.8, 733.4, 150.5, 13.0, 283.9, 0.54, 0.55, 0.53),
}
SERVER_MS = (5.39, 33.4, 16.8, 1.08, 13.7, 0.14, 0.14, 0.18)


@pytest.mark.parametrize("kind", TOTALS_MS)
def test_whole_networks_take_what_the_authors_measured(kind: str) -> None:
    for pictures in ("uint8", "float32"):
        found = applications(pictures)
        assert tuple(found) == APPLICATIONS
        for name, device_ms, server_ms in zip(APPLICATIONS, TOTALS_MS[kind], SERVER_MS, strict=True):
            first, last = found[name][kind].rows[0], found[name][kind].rows[-1]
            assert 1e3 * last.head_s == pytest.approx(device_ms, rel=0.01)
            assert 1e3 * first.tail_s == pytest.approx(server_ms, rel=0.04)
            assert (first.index, first.head_s, last.tail_s, last.on_device) == (0, 0, 0, True)


def test_pictures_with_four_bytes_for_each_value_are_four_times_as_large() -> None:
    few, many = applications("uint8"), applications("float32")
    for name in ("imc", "vgg", "face", "dig"):
        assert many[name]["cpu"].rows[0].size_bytes == pytest.approx(4 * few[name]["cpu"].rows[0].size_bytes, rel=1e-3)


def test_without_waiting_the_gain_is_the_ratio_of_the_servers_seconds() -> None:
    """At a lenient limit servers are nearly always busy, so rates are in proportion to the work that is spared."""
    frontiers, link = applications(), FULL_LINKS.link("lte")
    status_quo, ours = (demand(frontiers, link, 0.3, rival) for rival in ("status quo", "ours"))
    assert status_quo.reaching == pytest.approx(1)
    assert status_quo.mean_s == pytest.approx(sum(SERVER_MS) / 8e3, rel=0.01)
    (row,) = throughput(Searches(20_000, 5, 2), FULL_LINKS, "lte", (0.3,))
    assert row["server_s"] == ours.mean_s
    assert row["gain"]["value"] == pytest.approx(status_quo.mean_s / ours.mean_s, rel=0.05)


def test_phones_with_a_gpu_send_nothing_over_3g() -> None:
    (row,) = throughput(Searches(1_000, 2, 2), BASE, "3g", (1.0,))
    assert row["reaching"] == 0
    assert row["gain"] is None
    assert row["unloaded"]["ours"] == row["unloaded"]["device-only"]


def test_no_rival_is_quicker_than_ours_on_idle_servers() -> None:
    for link in ("wifi", "lte", "3g"):
        for row in throughput(Searches(1_000, 2, 8), FULL_LINKS, link, (0.0, 1.0)):
            latencies_s = {rival: found["latency_s"] for rival, found in row["unloaded"].items()}
            assert min(latencies_s, key=latencies_s.__getitem__) == "ours" or link == "3g"
            assert latencies_s["ours"] <= min(latencies_s.values())


def test_devices_that_adapt_are_never_overloaded_nor_slower_than_alone() -> None:
    frontiers = applications()
    for rate_per_s in (1e5, 1e6, 1e7, 1e8):
        classes = fleet(frontiers, rate_per_s)
        found = settle(classes, 10_000)
        assert found.utilization < 1
        assert found.latency_s <= settle(classes, 10_000, "device-only").latency_s + 1e-9
