"""The rivals of the evaluation do what the page says of them."""

from __future__ import annotations

import json
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import torchsurgeon as ts
from benchmarks.evaluate import alternatives, alternatives_page
from benchmarks.evaluate.rivals import server_only, sockets
from benchmarks.evaluate.rivals.pipelining import RelayedStore
from torchsurgeon.demo import photo


@pytest.mark.parametrize("form", ["json", "png", "jpeg"])
def test_a_picture_arrives_as_it_was_sent_but_by_jpeg(form: str) -> None:
    picture = photo()
    decode = server_only._from_json if form == "json" else server_only._from_image
    arrived = decode(server_only.ENCODERS[form](picture))
    assert arrived.shape == picture.shape
    assert torch.equal(arrived, picture) == (form != "jpeg")


def address(port: int, rank: int) -> bytes:
    """What gloo writes of a process: a socket address among other bytes."""
    own = socket.AF_INET.to_bytes(2, "little") + port.to_bytes(2, "big") + socket.inet_aton("127.0.0.1")
    return b"\x02\x00" + bytes([rank] * 22) + own + bytes(104)


def test_gloo_is_told_another_port_for_the_other_process_only() -> None:
    shared, asked = dist.HashStore(), []

    def relay(port: int) -> int:
        asked.append(port)
        return 8448

    store = RelayedStore(shared, 0, relay)
    store.set("0//cpu//0/0", address(40_001, 0))
    store.set("0//cpu//0/1", address(40_002, 1))
    store.set("0//cpu//0/other", b"something else")
    assert store.get("0//cpu//0/0") == address(40_001, 0)
    assert store.get("0//cpu//0/1") == address(8448, 1)
    assert store.get("0//cpu//0/other") == b"something else"
    assert asked == [40_002]


def test_the_search_tries_the_cuts_of_a_chain_but_not_behind_activations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()).eval()
    points = sockets.chain_points(ts.trace(model, torch.rand(1, 3, 8, 8)))
    assert [point.name for point in points] == ["input", "0", "2", "3"]


def test_the_latency_of_a_search_holds_the_search() -> None:
    ours = {"latency_s": 0.5, "frames_s": 2.0}
    row = {"latency_s": 1.0, "replanning_s": 4.0, "frames_s": 1.0}
    searched = alternatives_page.Case("AlexNet", "lte", sockets.Search.NAME, row, ours)
    assert (searched.latency_s, searched.slower, searched.frames_s) == (5.0, 10.0, 0.2)
    other = alternatives_page.Case("AlexNet", "lte", "another", row, ours)
    assert (other.latency_s, other.slower, other.frames_s) == (1.0, 2.0, 1.0)


def test_every_rival_was_run_over_every_link_for_every_network() -> None:
    results = json.loads(alternatives.OUT.read_text())["results"]
    assert set(results) == set(alternatives.NETWORKS)
    rivals = {name: set(found["rivals"]) for name, found in results.items()}
    assert len(set(map(frozenset, rivals.values()))) == 1
    assert len(next(iter(rivals.values()))) >= 15
    for name, found in results.items():
        for rival, rows in found["rivals"].items():
            links = set(alternatives.LINKS) if alternatives.ON_DEVICE not in rows else {alternatives.ON_DEVICE}
            assert set(rows) == links, (name, rival)
            for row in rows.values():
                assert row["runs"] >= 3
                assert not row["lossless"] or row["deviation"] <= alternatives.TOLERANCE
