"""codec="auto" compresses where that is quicker from end to end, and never loses a bit."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import serving
from torch import nn

import torchsurgeon as ts
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.transport import Answer, HttpTransport
from torchsurgeon.transport.connection import Connection
from torchsurgeon.transport.deadline import Deadline

SIZE = 1_000_000


def used(choice: Lossless, uplink_bit_s: float, ratio: float, byte_s: float, count: int = 200) -> list[str]:
    """The codecs of a stream of requests at one cut whose boundary compresses to ``ratio`` at ``byte_s`` a byte."""
    names = []
    for _ in range(count):
        codec = choice.choose(3, SIZE, uplink_bit_s)
        names.append(codec.name)
        if codec.name == "zstd":
            choice.observe(3, SIZE, int(SIZE * ratio), SIZE * byte_s)
    return names


@given(st.floats(1e5, 1e10), st.floats(0.05, 1.0), st.floats(1e-9, 1e-7))
def test_all_but_a_few_requests_go_the_quicker_way(uplink_bit_s: float, ratio: float, byte_s: float) -> None:
    names = used(Lossless(), uplink_bit_s, ratio, byte_s)
    raw_s, zstd_s = 8 / uplink_bit_s, ratio * 8 / uplink_bit_s + byte_s
    if zstd_s < 0.9 * raw_s:
        assert names.count("raw") == 0
    elif zstd_s > raw_s:
        assert names.count("zstd") <= 4, "tried once in 65"


def test_a_link_that_changes_is_followed_at_once() -> None:
    choice = Lossless()
    assert set(used(choice, 1e7, 0.3, 4e-9)[1:]) == {"zstd"}
    assert used(choice, 1e10, 0.3, 4e-9, 50)[1:] == ["raw"] * 49
    assert set(used(choice, 1e7, 0.3, 4e-9, 50)) == {"zstd"}


def test_a_boundary_that_no_longer_compresses_is_sent_as_it_is() -> None:
    choice = Lossless()
    used(choice, 1e8, 0.3, 4e-9)
    assert used(choice, 1e8, 1.0, 4e-9)[20:].count("zstd") <= 3


def test_one_request_that_took_long_by_chance_does_not_decide_for_long() -> None:
    """Whether it was the first one, which loads the library, or a later one."""
    choice = Lossless()
    choice.choose(3, SIZE, 1e7)
    choice.observe(3, SIZE, SIZE // 2, 2.0)
    assert used(choice, 1e7, 0.5, 4e-9)[65:] == ["zstd"] * 135
    choice.observe(3, SIZE, SIZE // 2, 60.0)
    assert used(choice, 1e7, 0.5, 4e-9) == ["zstd"] * 200


def test_cuts_are_told_apart() -> None:
    choice = Lossless()
    used(choice, 1e7, 1.0, 4e-9)
    assert choice.choose(3, SIZE, 1e7).name == "raw"
    assert choice.choose(4, SIZE, 1e7).name == "zstd", "not tried there yet"


@pytest.mark.parametrize("size", [0, 1])
def test_next_to_nothing_is_sent_as_it_is(size: int) -> None:
    choice = Lossless()
    for _ in range(5):
        codec = choice.choose(0, size, 1e6)
        choice.observe(0, size, 30, 1e-5)
    assert codec.name == "raw"


class Exact(HttpTransport):
    """A server at the end of a link of ``uplink_bit_s`` whose transfers are told to have taken exactly their time."""

    def __init__(self, url: str, uplink_bit_s: float) -> None:
        super().__init__(url)
        self.uplink_bit_s = uplink_bit_s

    def infer(self, *args: Any, **options: Any) -> Answer:
        answer = super().infer(*args, **options)
        told = {name: value for name, value in answer.parameters.items() if name != "receive_s"}
        begin_s, sent_s = answer.timing.send_start_s, answer.timing.sent_bytes * 8 / self.uplink_bit_s
        server_s = sum(told[name] for name in ("queue_s", "compute_s", "decode_s"))
        end_s = begin_s + sent_s + server_s
        return Answer(answer.tensors, told, answer.timing._replace(first_byte_s=end_s, end_s=end_s))


def noise(*shape: int) -> torch.Tensor:
    """Finite floats, all of whose bits are drawn at random: nothing makes them smaller."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    floats = bits.view(torch.float32)
    return torch.where(floats.isfinite(), floats, (bits ^ (1 << 30)).view(torch.float32))


def test_a_split_module_compresses_on_a_slow_link_and_only_what_gets_smaller() -> None:
    """Half of what crosses after a ReLU is zeros; noise does not get smaller, and a quick link is not worth the time.

    The links are so slow and so quick that no busy machine's hiccup is long beside a transfer, or short.
    """
    torch.set_num_threads(1)
    x = noise(1, 16, 50, 50)
    # Nothing is summed up, whose order and so last bits depend on the threads of either side.
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Hardtanh()).eval()

    def sent(split: ts.SplitModule, partition: str) -> list[int]:
        """The bytes that each of some requests sends."""
        sizes = []
        split.partition = partition
        for _ in range(9):
            assert torch.equal(split(x), model(x))
            assert split.last is not None
            sizes.append(split.last.sent_bytes)
        return sizes

    def split_at(where: Exact) -> ts.SplitModule:
        link = ts.Link("exact", where.uplink_bit_s, 1e9, 1e-3)
        return ts.SplitModule(model, x, server=where, name="net", link=link, codec="auto", fallback="error")

    with torch.no_grad(), serving(model, x) as server:
        with Exact(server.url, 1e4) as slow, split_at(slow) as split:
            assert str(split.codec) == "auto"
            assert max(sent(split, "1")) < 0.75 * x.nbytes
            assert min(sent(split, "server")) >= x.nbytes
            split.codec = "raw"
            assert min(sent(split, "1")) >= x.nbytes
        with Exact(server.url, 1e11) as quick, split_at(quick) as split:
            assert min(sent(split, "1")) >= x.nbytes


def test_opening_a_connection_does_not_count_as_compressing(monkeypatch: pytest.MonkeyPatch) -> None:
    original, opening_s = Connection._connect, 0.5

    def connect(self: Connection, deadline: Deadline) -> socket.socket:
        time.sleep(opening_s)
        return original(self, deadline)

    monkeypatch.setattr(Connection, "_connect", connect)
    x = torch.zeros(1, 16, 50, 50)
    model = nn.Sequential(nn.ReLU(), nn.Flatten()).eval()
    link = ts.Link("slow", 1e4, 1e9, 1e-3)
    with (
        torch.no_grad(),
        serving(model, x) as server,
        ts.SplitModule(
            model, x, server=server.url, name="net", partition="0", link=link, codec="auto", fallback="error"
        ) as split,
    ):
        split.prepare()
        begun_s = time.perf_counter()
        answer = split(x)
        # What is left of the call for everything but the opening, however busy the machine is.
        rest_s = time.perf_counter() - begun_s - opening_s
        assert torch.equal(answer, model(x))
        assert split.last is not None
        assert split.last.encode_s <= rest_s
        assert split.last.uplink_s >= opening_s
        assert split.last.sent_bytes < x.nbytes
        chosen = split.codec
        assert isinstance(chosen, Lossless)
        assert all(cut.s_per_byte * x.nbytes <= rest_s for cut in chosen._cuts.values())
