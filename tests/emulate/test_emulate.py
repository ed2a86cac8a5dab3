from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcp import listening, reserved_port
from torch import nn
from tries import least_of
from virtual_time import TimeModule, Transfer, VirtualLink

import torchsurgeon.emulate.device
from torchsurgeon.emulate import LinkEmulator, SlowDevice, parse_profile
from torchsurgeon.emulate.bottleneck import Bottleneck, Packet
from torchsurgeon.errors import DeviceError, LinkError
from torchsurgeon.link import PRESETS, BandwidthTrace, Link, TracedLink

HEADER_BYTES = 8
FAST = Link("fast", 500e6, 500e6, 0.0)


def answer_as_asked(connection: socket.socket) -> None:
    """Read requests that say how long they are and how long their answer shall be."""
    stream = connection.makefile("rb")
    while header := stream.read(HEADER_BYTES):
        rest_bytes, answer_bytes = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
        assert len(stream.read(rest_bytes)) == rest_bytes
        connection.sendall(bytes(answer_bytes))


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def request_s(connection: socket.socket, up_bytes: int, down_bytes: int) -> float:
    start_s = time.perf_counter()
    sizes = (up_bytes - HEADER_BYTES).to_bytes(4, "big") + down_bytes.to_bytes(4, "big")
    connection.sendall(sizes + bytes(up_bytes - HEADER_BYTES))
    while down_bytes:
        down_bytes -= len(connection.recv(1 << 20))
    return time.perf_counter() - start_s


WITHIN_5_PERCENT = 0.05


@pytest.fixture(scope="module")
def asked_port() -> Iterator[int]:
    with listening(answer_as_asked) as port:
        yield port


@pytest.mark.parametrize("name", PRESETS)
def test_rate_and_delay_are_within_5_percent_of_the_preset(name: str) -> None:
    link = PRESETS[name]
    with VirtualLink(link) as emulator:
        ends = emulator.connect()
        emulator.request(ends, HEADER_BYTES, 1)
        up_bytes, down_bytes = int(link.uplink_bit_s * 0.3 / 8), int(link.downlink_bit_s * 0.3 / 8)
        for sizes in ((HEADER_BYTES, 1), (up_bytes, 1), (HEADER_BYTES, down_bytes)):
            assert emulator.request(ends, *sizes) == pytest.approx(link.request_s(*sizes), rel=WITHIN_5_PERCENT), sizes


def test_on_the_machines_own_clock_the_shortest_preset_is_within_5_percent_too(asked_port: int) -> None:
    link = min(PRESETS.values(), key=lambda link: link.round_trip_s)
    up_bytes, down_bytes = int(link.uplink_bit_s * 0.05 / 8), int(link.downlink_bit_s * 0.05 / 8)
    with LinkEmulator(0, "127.0.0.1", asked_port, link) as emulator, connect(emulator.port) as connection:
        request_s(connection, HEADER_BYTES, 1)
        for sizes in ((HEADER_BYTES, 1), (up_bytes, 1), (HEADER_BYTES, down_bytes)):
            expected_s = link.request_s(*sizes)
            took_s = least_of(lambda sizes=sizes: request_s(connection, *sizes), enough=1.05 * expected_s)
            assert took_s == pytest.approx(expected_s, rel=WITHIN_5_PERCENT), sizes


def test_a_first_request_pays_another_round_trip_for_its_connection() -> None:
    link = Link("far", 10e6, 10e6, 0.1)
    with VirtualLink(link) as emulator:
        emulator.request(emulator.connect(), HEADER_BYTES, 1)
        assert emulator.now_s == pytest.approx(2 * link.round_trip_s, rel=WITHIN_5_PERCENT)


def test_a_trace_is_replayed_within_5_percent_in_each_direction() -> None:
    seconds = np.arange(5) * 0.12
    uplink = BandwidthTrace(seconds, np.cumsum([0.0, 0.125, 0.5, 0.0, 0.25]) * 1e6)
    downlink = BandwidthTrace(seconds, np.cumsum([0.0, 1.0, 0.0, 2.0, 0.5]) * 1e6)
    link = TracedLink("trace", uplink, downlink, 0.02)
    up_bytes, down_bytes = 100_000, 400_000
    with VirtualLink(link) as emulator:
        ends = emulator.connect()
        emulator.request(ends, HEADER_BYTES, 1)
        for _ in range(3):
            emulator.set_link(link)
            expected_s = uplink.delivered_at(0, up_bytes) + link.round_trip_s
            assert emulator.request(ends, up_bytes, 1) == pytest.approx(expected_s, rel=WITHIN_5_PERCENT)
            emulator.set_link(link)
            expected_s = downlink.delivered_at(0.01, down_bytes) + 0.01
            assert emulator.request(ends, HEADER_BYTES, down_bytes) == pytest.approx(expected_s, rel=WITHIN_5_PERCENT)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(1, 20_000)), min_size=1, max_size=20), st.data())
@settings(deadline=None)
def test_when_bytes_arrive_does_not_depend_on_when_anyone_looked(
    entries: list[tuple[float, int]], data: st.DataObject
) -> None:
    def arrivals_s(looks_s: list[float]) -> list[float]:
        path: Bottleneck[int] = Bottleneck()
        path.shape(8e6, 0.02, 0.0)
        entered_s, times_s, looks = 0.0, [], iter(sorted(looks_s))
        look_s = next(looks, math.inf)
        for flow, (gap_s, size_bytes) in enumerate(entries):
            entered_s += gap_s
            while look_s < entered_s:
                path.advance(look_s)
                look_s = next(looks, math.inf)
            path.push(Packet(flow, bytes(size_bytes), entered_s))
        path.advance(math.inf)
        while (wake_s := path.wake_at_s()) < math.inf:
            times_s.extend(wake_s for _ in path.arrivals(wake_s))
        return times_s

    free_s = entered_s = 0.0
    expected_s = []
    for gap_s, size_bytes in entries:
        entered_s += gap_s
        free_s = max(free_s, entered_s) + size_bytes / 1e6
        expected_s.append(free_s + 0.02)
    looks_s = data.draw(st.lists(st.floats(0, 0.3), max_size=20))
    assert arrivals_s(looks_s) == pytest.approx(expected_s)


def test_two_connections_share_the_one_rate() -> None:
    link = Link("shared", 16e6, 16e6, 0.01)
    with VirtualLink(link) as emulator:
        uploads = [Transfer(*emulator.connect(), 400_000) for _ in range(2)]
        emulator.carry(uploads)
    arrived = [upload.arrivals for upload in uploads]
    together_s = max(times[0][0] for times in arrived)
    end_s = max(times[-1][0] for times in arrived)
    rest_bytes = [sum(size for at_s, size in times if at_s > together_s) for times in arrived]
    assert end_s - together_s == pytest.approx(link.uplink_s(sum(rest_bytes)), rel=0.1)
    middle_s = (together_s + end_s) / 2
    by_then = [sum(size for at_s, size in times if together_s < at_s < middle_s) for times in arrived]
    assert min(by_then) > 0.7 * max(by_then)


@given(
    st.lists(st.binary(min_size=0, max_size=40_000), max_size=5), st.sampled_from([FAST, Link("l", 80e6, 20e6, 2e-3)])
)
@settings(deadline=None, max_examples=25)
def test_every_byte_comes_back_in_order(echo_port: int, parts: list[bytes], link: Link) -> None:
    with LinkEmulator(0, "127.0.0.1", echo_port, link) as emulator, connect(emulator.port) as connection:
        for part in parts:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b"".join(parts)


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    with listening(echo) as port:
        yield port


def test_a_closed_half_leaves_the_other_open() -> None:
    def answer_after_the_end(connection: socket.socket) -> None:
        asked = read_all(connection)
        connection.sendall(asked[::-1] * 1000)

    with (
        listening(answer_after_the_end) as port,
        LinkEmulator(0, "127.0.0.1", port, PRESETS["wifi"]) as emulator,
        connect(emulator.port) as connection,
    ):
        connection.sendall(b"question")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b"noitseuq" * 1000


def test_an_answer_sent_before_the_request_was_read_arrives() -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(b"too large")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)

    with (
        listening(refuse) as port,
        LinkEmulator(0, "127.0.0.1", port, PRESETS["lte"]) as emulator,
        connect(emulator.port) as connection,
    ):
        with contextlib.suppress(ConnectionError):
            connection.sendall(bytes(200_000))
        assert connection.recv(100) == b"too large"


def test_a_reset_by_the_server_reaches_the_device() -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with (
        listening(reset) as port,
        LinkEmulator(0, "127.0.0.1", port, PRESETS["wifi"]) as emulator,
        connect(emulator.port) as connection,
    ):
        connection.sendall(b"question")
        with pytest.raises(ConnectionResetError):
            connection.recv(100)


@pytest.mark.parametrize("sent", [b"", b"question", bytes(100_000)])
def test_a_dead_target_closes_the_connection_in_order(sent: bytes) -> None:
    with reserved_port() as dead_port, LinkEmulator(0, "127.0.0.1", dead_port, PRESETS["wifi"]) as emulator:
        for _ in range(2):
            with connect(emulator.port) as connection:
                connection.sendall(sent)
                assert connection.recv(100) == b""


def test_a_sender_that_outruns_the_link_is_held_back() -> None:
    link = Link("full", 80e6, 80e6, 0.001)
    release = threading.Event()

    def read_later(connection: socket.socket) -> None:
        release.wait(20)
        connection.sendall(str(len(read_all(connection))).encode())

    sent_bytes = 0
    with (
        listening(read_later) as port,
        LinkEmulator(0, "127.0.0.1", port, link) as emulator,
        connect(emulator.port) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while sent_bytes < 100_000_000:
                sent_bytes += connection.send(bytes(1 << 16))
        assert sent_bytes < 8_000_000
        release.set()
        connection.settimeout(20)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == str(sent_bytes).encode()


def test_the_link_changes_under_an_open_connection() -> None:
    slow, quick = Link("slow", 1e6, 1e6, 0.2), Link("quick", 100e6, 100e6, 0.01)
    with VirtualLink(slow) as emulator:
        ends = emulator.connect()
        emulator.request(ends, HEADER_BYTES, 1)
        assert emulator.request(ends, 12_500, 1) > 0.29
        emulator.set_link(quick)
        assert emulator.link is quick
        assert emulator.request(ends, 12_500, 1) < 0.02
        emulator.set_link(slow)
        assert emulator.request(ends, 12_500, 1) > 0.29


def test_counts_tell_what_passed(asked_port: int) -> None:
    with LinkEmulator(0, "127.0.0.1", asked_port, FAST) as emulator:
        for _ in range(2):
            with connect(emulator.port) as connection:
                request_s(connection, 5000, 300)
        counts = emulator.counts()
    assert (counts.connections, counts.uplink_bytes, counts.downlink_bytes) == (2, 10_000, 600)


def test_many_connections_leave_no_thread_and_no_descriptor(echo_port: int) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def talk(port: int) -> None:
        with connect(port) as connection:
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"

    threads, before = threading.active_count(), descriptors()
    for _ in range(3):
        with LinkEmulator(0, "127.0.0.1", echo_port, FAST) as emulator:
            inside = descriptors()
            for _ in range(50):
                talk(emulator.port)
            until_s = time.monotonic() + 10
            while descriptors() > inside and time.monotonic() < until_s:
                time.sleep(0.01)
            assert descriptors() <= inside
            abandoned = connect(emulator.port)
        assert read_all(abandoned) == b""
        abandoned.close()
    while (threading.active_count() > threads or descriptors() > before) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert descriptors() <= before


def test_run_serves_in_the_calling_thread_until_closed(echo_port: int) -> None:
    emulator = LinkEmulator(0, "127.0.0.1", echo_port, FAST)
    runner = threading.Thread(target=emulator.run)
    runner.start()
    with connect(emulator.port) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
    emulator.close()
    emulator.close()
    runner.join(10)
    assert not runner.is_alive()
    with pytest.raises(ConnectionRefusedError):
        connect(emulator.port)


def test_an_emulator_never_started_gives_its_port_back(echo_port: int) -> None:
    emulator = LinkEmulator(0, "127.0.0.1", echo_port, FAST)
    emulator.close()
    LinkEmulator(emulator.port, "127.0.0.1", echo_port, FAST).close()


def test_a_port_in_use_is_named(echo_port: int) -> None:
    with pytest.raises(LinkError, match=rf"127\.0\.0\.1:{echo_port}.*in use"):
        LinkEmulator(echo_port, "127.0.0.1", echo_port, FAST)


@pytest.mark.parametrize("port", [-1, 70_000])
def test_an_impossible_port_is_named(port: int, echo_port: int) -> None:
    with pytest.raises(LinkError, match=str(port)):
        LinkEmulator(port, "127.0.0.1", echo_port, FAST)


def test_a_target_without_an_address_is_named() -> None:
    with pytest.raises(LinkError, match=r"no-such-host\.invalid"):
        LinkEmulator(0, "no-such-host.invalid", 80, FAST)


def test_a_name_is_no_link_before_it_is_parsed(echo_port: int) -> None:
    with pytest.raises(LinkError, match="parse_profile"):
        LinkEmulator(0, "127.0.0.1", echo_port, "lte")  # type: ignore[arg-type]


def test_a_profile_of_a_trace_file_is_emulated(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("".join(f"{ms}\n" for ms in range(1, 501)))
    with VirtualLink(parse_profile(f"trace:{path},10ms")) as emulator:
        ends = emulator.connect()
        emulator.request(ends, HEADER_BYTES, 1)
        expected_s = 300_000 * 8 / 12e6 + 0.010
        assert emulator.request(ends, 300_000, 1) == pytest.approx(expected_s, rel=WITHIN_5_PERCENT)


class Sleeper(nn.Module):
    """Takes as long as its attribute says."""

    def __init__(self, took_s: float) -> None:
        super().__init__()
        self.took_s = took_s
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        time.sleep(self.took_s)
        return x * self.scale + shift


def test_a_slow_device_gives_the_same_answer_later() -> None:
    module = Sleeper(0.02).eval()
    slow = SlowDevice(5).wrap(module)
    x = torch.randn(3)
    start_s = time.perf_counter()
    answer = slow(x, shift=1.0)
    took_s = time.perf_counter() - start_s
    assert torch.equal(answer, module(x, shift=1.0))
    assert took_s >= 5 * 0.02


def test_a_slow_device_stretches_measured_time_by_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TimeModule()
    monkeypatch.setattr(torchsurgeon.emulate.device, "time", clock)
    for took_s in (0.0001, 0.01, 1.0):
        start_s = clock.now_s
        SlowDevice(4).call(clock.sleep, took_s)
        assert clock.now_s - start_s == pytest.approx(4 * took_s, rel=0.05)


def test_a_slow_device_keeps_the_modules_attributes_and_parameters() -> None:
    module = Sleeper(0.0).eval()
    slow = SlowDevice(1).wrap(module)
    assert slow.took_s == 0.0
    assert not slow.training
    assert [parameter is module.scale for parameter in slow.parameters()] == [True]
    assert slow.scale is module.scale
    with pytest.raises(AttributeError, match="nothing"):
        _ = slow.nothing


@pytest.mark.parametrize("factor", [0.99, 0, -2, float("nan"), float("inf")])
def test_a_device_is_not_sped_up(factor: float) -> None:
    with pytest.raises(DeviceError, match="factor"):
        SlowDevice(factor)
