"""A load test tells what users of a server see, also of one that stalls, refuses, breaks off or is silent."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier import EXAMPLE, GRAPH, LAYERS, serve
from tcp import listening, read_message, reserved_port
from torch import nn

from torchsurgeon.errors import CodecError, LoadTestError, PartitionError, ServerUnavailableError
from torchsurgeon.loadtest import Arrivals, LoadRequest, Target, cut_requests, drive, try_each, whole_requests
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.tokens import Tokens
from torchsurgeon.transport import HttpTransport

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
BUSY = b'HTTP/1.1 503 Busy\r\ncontent-length: 16\r\n\r\n{"error": "why"}'


def target_at(port: int) -> Target:
    return Target.at(f"http://127.0.0.1:{port}")


def plain(target: Target, size_bytes: int = 100) -> LoadRequest:
    return LoadRequest("net", "server", "raw", target.post("/v2/models/net/infer", bytes(size_bytes), None), size_bytes)


def answering(answer: bytes, *, then: Callable[[int], Any] = lambda number: None) -> Callable[[socket.socket], None]:
    """Answer every request of a connection alike; ``then`` is called with its number before the answer."""

    def handle(link: socket.socket) -> None:
        number = 0
        while read_message(link) is not None:
            then(number)
            link.sendall(answer)
            number += 1

    return handle


def test_a_stall_counts_for_every_request_that_falls_into_it() -> None:
    # A client that waited for the one late answer before it sent the next request would see one slow request.
    with listening(answering(ANSWER, then=lambda number: time.sleep(0.5 if number == 20 else 0.0))) as port:
        target = target_at(port)
        times_s = np.arange(100) * 0.01
        run = drive(target, [plain(target)], times_s, devices=1, seconds=1.0)
    assert run.errors == {}
    latencies_s = run.kinds[0].latencies_s
    assert len(latencies_s) == 100
    # Of the requests that were due in the stall, the first waited for all of it, and the 25th for half of it.
    assert latencies_s[-1] >= 0.5
    assert (latencies_s >= 0.25).sum() >= 24


def test_requests_wait_for_their_device_and_not_for_others() -> None:
    """One device's connection hangs for a while; the other's requests are answered meanwhile."""
    first = []

    def handle(link: socket.socket) -> None:
        first.append(link)
        mine = len(first) == 1
        answering(ANSWER, then=lambda number: time.sleep(0.8 if mine and not number else 0.0))(link)

    with listening(handle) as port:
        target = target_at(port)
        run = drive(target, [plain(target), plain(target, 200)], np.arange(60) * 0.01, devices=2, seconds=0.6)
    slow, quick = run.kinds
    assert slow.latencies_s[-1] >= 0.8
    assert len(slow.latencies_s) + len(quick.latencies_s) == 60
    # The last request was due when 0.6 s had passed, and the slow device was free again after 0.8 s.
    assert slow.latencies_s[0] >= 0.2
    assert quick.latencies_s[0] < slow.latencies_s[0]


@pytest.mark.parametrize(
    ("handle", "error"),
    [
        (answering(BUSY), "HTTP 503"),
        (answering(b"SSH-2.0-OpenSSH_9.2\r\n"), "no valid HTTP"),
        (lambda link: link.recv(1), "connection broken"),
        (lambda link: read_message(link) and link.recv(1), "no answer in time"),
        (answering(ANSWER[:-1]), "no answer in time"),
    ],
    ids=["refusal", "not HTTP", "broken", "silent", "cut short"],
)
def test_errors_are_counted_by_kind_and_the_test_goes_on(handle: Callable[[socket.socket], Any], error: str) -> None:
    with listening(handle) as port:
        target = target_at(port)
        run = drive(target, [plain(target)], np.arange(6) * 0.02, devices=2, seconds=0.2, timeout_s=0.3)
    assert run.errors == {error: 6}
    assert run.kinds[0].errors == {error: 6}
    assert len(run.latencies_s) == 0
    if error == "HTTP 503":
        assert run.reasons[error] == "why"


def test_a_device_goes_on_after_an_error() -> None:
    answers = [BUSY, b"", ANSWER, ANSWER]

    def handle(link: socket.socket) -> None:
        while read_message(link) is not None:
            answer = answers.pop(0)
            if not answer:
                return
            link.sendall(answer)

    with listening(handle) as port:
        target = target_at(port)
        run = drive(target, [plain(target)], np.arange(4) * 0.05, devices=1, seconds=0.2)
    assert run.errors == {"HTTP 503": 1, "connection broken": 1}
    assert len(run.latencies_s) == 2


def test_a_server_that_refuses_before_it_has_read_everything_is_heard() -> None:
    def handle(link: socket.socket) -> None:
        link.recv(1000)
        link.sendall(b"HTTP/1.1 413 Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")
        while link.recv(1 << 20):
            pass

    with listening(handle) as port:
        target = target_at(port)
        run = drive(target, [plain(target, 20_000_000)], np.zeros(1), devices=1, seconds=0.1, timeout_s=20)
    assert run.errors == {"HTTP 413": 1}


def test_a_server_that_closes_after_each_answer_is_asked_over_new_connections() -> None:
    def handle(link: socket.socket) -> None:
        read_message(link)
        link.sendall(ANSWER.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n"))

    with listening(handle) as port:
        target = target_at(port)
        run = drive(target, [plain(target)], np.arange(5) * 0.02, devices=1, seconds=0.1)
    assert (run.errors, len(run.latencies_s)) == ({}, 5)


def test_nobody_there_is_said_before_the_test() -> None:
    with reserved_port() as port:
        target = target_at(port)
        with pytest.raises(ServerUnavailableError, match=r"0 of 3 connections.*refused"):
            drive(target, [plain(target)], np.zeros(1), devices=3, seconds=0.1)


def test_what_falls_into_the_warm_up_is_sent_and_not_counted() -> None:
    seen = []
    with listening(answering(ANSWER, then=seen.append)) as port:
        target = target_at(port)
        run = drive(target, [plain(target)], np.arange(20) * 0.01, devices=1, seconds=0.1, warmup_s=0.1)
    assert len(seen) == 20
    assert len(run.latencies_s) == 10
    assert run.rate_per_s == pytest.approx(100)


def test_in_a_closed_loop_each_device_sends_when_it_has_its_answer() -> None:
    with listening(answering(ANSWER, then=lambda number: time.sleep(0.02))) as port:
        target = target_at(port)
        run = drive(target, [plain(target)], None, devices=3, seconds=0.5)
    assert run.rate_per_s is None
    assert run.errors == {}
    assert 3 <= len(run.latencies_s) <= 3 * 26
    assert run.latencies_s[0] >= 0.02


def test_every_cut_and_codec_is_answered_by_a_server(server: Server) -> None:
    target = Target.at(server.url)
    requests = cut_requests(target, "net", GRAPH, (EXAMPLE,), cuts=["all"], codecs=["raw", "int8+zstd"])
    assert len({request.cut for request in requests}) == LAYERS
    assert {request.codec for request in requests} >= {"raw", "int8+zstd"}
    try_each(target, requests)
    told: list[tuple[float, float]] = []
    run = drive(
        target,
        requests,
        Arrivals.named("exponential").times_s(1.0, 100.0),
        devices=len(requests),
        seconds=1.0,
        progress=lambda done_s, whole_s: told.append((done_s, whole_s)),
    )
    assert run.errors == {}
    assert sum(len(kind.latencies_s) for kind in run.kinds) == len(Arrivals.named("exponential").times_s(1.0, 100.0))
    assert [len(kind.queue_s) for kind in run.kinds] == [len(kind.latencies_s) for kind in run.kinds]
    assert all(kind.compute_s[0] > 0 for kind in run.kinds if len(kind.compute_s))
    assert all(done_s <= whole_s == 1.0 for done_s, whole_s in told)


def test_a_codec_that_cannot_be_used_at_a_cut_is_named_as_what_is_sent(server: Server) -> None:
    target = Target.at(server.url)
    requests = cut_requests(target, "net", GRAPH, (EXAMPLE,), cuts=["stem"], codecs=["jpeg-80", "raw"])
    assert [(request.cut, request.codec) for request in requests] == [("stem", "raw")]


def test_a_model_is_asked_as_a_whole_by_what_the_server_says_of_it(server: Server) -> None:
    target = Target.at(server.url)
    with HttpTransport(server.url) as transport:
        metadata = transport.get_json("/v2/models/net")
    (request,) = whole_requests(target, "net", metadata)
    assert request.cut == "server"
    assert request.size_bytes > EXAMPLE.nbytes
    try_each(target, [request])


def test_mistakes_are_told_before_the_test(server: Server) -> None:
    target = Target.at(server.url)
    with pytest.raises(LoadTestError, match="runs every layer"):
        cut_requests(target, "net", GRAPH, (EXAMPLE,), cuts=["device"])
    with pytest.raises(PartitionError, match="stam"):
        cut_requests(target, "net", GRAPH, (EXAMPLE,), cuts=["stam"])
    with pytest.raises(CodecError):
        cut_requests(target, "net", GRAPH, (EXAMPLE,), codecs=["int9"])
    with pytest.raises(LoadTestError, match=r"HTTP 404.*model 'nat' is not served"):
        try_each(target, cut_requests(target, "nat", GRAPH, (EXAMPLE,)))
    requests = cut_requests(target, "net", GRAPH, (EXAMPLE,), cuts=["all"])
    with pytest.raises(LoadTestError, match="a device for each"):
        drive(target, requests, np.zeros(1), devices=2, seconds=1.0)
    for options in ({"seconds": 0.0}, {"seconds": 1.0, "warmup_s": -1.0}, {"seconds": 1.0, "timeout_s": 0.0}):
        with pytest.raises(LoadTestError, match="seconds"):
            drive(target, requests, np.zeros(1), devices=9, **options)  # type: ignore[arg-type]


def test_a_proxy_in_between_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(LoadTestError, match=r"no_proxy=127\.0\.0\.1"):
        Target.at("http://127.0.0.1:8000")


def test_https_and_a_token(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl: apt-get install openssl")
    cert, key, file = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "tokens"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text("a-token-0123456789\n")
    registry = ModelRegistry(profiler=None)
    registry.add("wide", nn.Linear(50_000, 2).eval(), EXAMPLE.new_zeros(1, 50_000))
    app = create_app(registry)
    app.tokens = Tokens(file)
    with Server(app, ssl_certfile=str(cert), ssl_keyfile=str(key)) as server:
        good = Target.at(server.url, token="a-token-0123456789", verify=str(cert))
        graph = registry.get("wide").graph
        example = EXAMPLE.new_zeros(1, 50_000)
        run = drive(
            good,
            cut_requests(good, "wide", graph, (example,)),
            np.arange(10) * 0.02,
            devices=3,
            seconds=0.2,
        )
        assert (run.errors, len(run.latencies_s)) == ({}, 10)
        none = Target.at(server.url, verify=str(cert))
        with pytest.raises(LoadTestError, match="HTTP 401"):
            try_each(none, cut_requests(none, "wide", graph, (example,)))
        unknown = Target.at(server.url)
        with pytest.raises(ServerUnavailableError, match="TLS failed"):
            try_each(unknown, cut_requests(unknown, "wide", graph, (example,)))
    registry.close()


def test_a_deadline_is_told_to_the_server() -> None:
    with serve() as server:
        target = Target.at(server.url, deadline_s=1e-6)
        with pytest.raises(LoadTestError, match="HTTP 503"):
            try_each(target, cut_requests(target, "net", GRAPH, (EXAMPLE,)))
