"""What one connection, or very many, can do to a server: it holds little for each, and goes on serving the others."""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import long
from serving import serving, signed_by_itself
from torch import fx, nn
from waiting import wait_for

from torchsurgeon.serve import ModelRegistry, Server, arriving, create_app, guarded
from torchsurgeon.serve.connections import SPARE_CONNECTIONS, Connections
from torchsurgeon.serve.guarded import GuardedProtocol
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.served import ServedModel
from torchsurgeon.transport import HttpTransport

X = torch.zeros(1, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(nn.Linear(4, 2).eval(), X) as server:
        yield server


def connect(server: Server, timeout_s: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s)


def read_all(link: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := link.recv(1 << 16):
            received += piece
    return received


def error_in(answer: bytes) -> str:
    """The message of an answer that has to be JSON."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return str(json.loads(body)["error"])


def check_serves(server: Server, name: str = "input") -> None:
    with HttpTransport(server.url, 10) as transport:
        assert transport.infer("net", {name: X}, max_answer_bytes=1000).tensors["output"].shape == (1, 2)


# --- heads ---

START = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("head", "status", "text"),
    [
        (START + b"X-A: " + b"a" * 65_000 + b"\r\n\r\n", 200, None),
        (START + b"X-A: " + b"a" * 66_000 + b"\r\n\r\n", 431, "at most 64 KiB"),
        (START + b"X-A: b\r\n" * 98 + b"\r\n", 200, None),
        (START + b"X-A: b\r\n" * 99 + b"\r\n", 431, "at most 100 header lines"),
        (b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 431, "at most 64 KiB"),
    ],
    ids=["a long line", "too long a line", "many lines", "too many lines", "too long a target"],
)
def test_the_head_of_a_request_is_bounded(server: Server, head: bytes, status: int, text: str | None) -> None:
    with connect(server) as link:
        link.sendall(head)
        answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    if text is not None:
        assert text in error_in(answer)
        assert b"connection: close" in answer
    check_serves(server)


CHUNKED = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "lines": (START, b"X-1234567: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 100),
    "a line": (START + b"X-A: ", b"y" * 5000),
    "the target": (b"GET /", b"y" * 5000),
    "the trailer's lines": (CHUNKED + b"0\r\n", b"X-A: b\r\n" * 500),
    "a line of the trailer": (CHUNKED + b"0\r\nX-A: ", b"y" * 5000),
    "a chunk's extension": (CHUNKED + b"5;a=", b"y" * 5000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_refused_before_it_takes_memory(server: Server, name: str) -> None:
    first, more = ENDLESS[name]
    sent = 0
    with connect(server) as link, suppress(ConnectionError):
        link.sendall(first)
        # The server drops up to 16 MiB after its answer, so that the client can read it, and then closes.
        while sent < 64 << 20:
            link.sendall(more)
            sent += len(more)
    assert sent < 48 << 20
    check_serves(server)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_header_lines_without_end_do_not_grow_the_process(server: Server) -> None:
    def resident_kib() -> int:
        found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found[1])

    def flood() -> None:
        with connect(server) as link, suppress(ConnectionError):
            link.sendall(START)
            for _ in range(400):
                link.sendall(b"X-1234567: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 1000)

    check_serves(server)
    before_kib = resident_kib()
    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resident_kib() - before_kib < 16 << 10


# --- many connections ---


@pytest.fixture
def small() -> Iterator[Server]:
    """A server that takes four connections."""
    registry = ModelRegistry()
    registry.add("net", nn.Linear(4, 2).eval(), X)
    with contextlib.closing(registry), Server(create_app(registry), max_connections=4) as server:
        yield server


def ask(link: socket.socket, path: str = "/v2/models/net") -> tuple[int, dict[str, str], Any]:
    """The status, headers and JSON of an answer on a connection that is kept."""
    link.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return answer_on(link)


def answer_on(link: socket.socket) -> tuple[int, dict[str, str], Any]:
    with contextlib.closing(http.client.HTTPResponse(link)) as response:
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, json.load(response)


def is_closed(link: socket.socket) -> bool:
    with suppress(ConnectionResetError):
        return link.recv(1) == b""
    return True


def test_silent_connections_make_room_and_established_clients_keep_theirs(small: Server) -> None:
    with contextlib.ExitStack() as stack:
        established = stack.enter_context(connect(small))
        assert ask(established)[0] == 200
        silent = [stack.enter_context(connect(small)) for _ in range(40)]
        with connect(small) as prober:
            for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/net"):
                assert ask(prober, path)[0] == 200
            assert ask(established)[0] == 200
        assert all(is_closed(link) for link in silent[:36])


def test_of_the_connections_that_were_served_the_longest_idle_is_closed(small: Server) -> None:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connect(small)) for _ in range(4)]
        for link in (*links, links[0]):
            assert ask(link)[0] == 200
        assert ask(stack.enter_context(connect(small)))[0] == 200
        assert is_closed(links[1])
        for link in (links[0], links[2], links[3]):
            assert ask(link)[0] == 200


def test_with_every_connection_busy_health_is_answered_and_the_rest_refused_in_json(small: Server) -> None:
    half = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            busy = stack.enter_context(connect(small))
            busy.sendall(half.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            assert busy.recv(100).startswith(b"HTTP/1.1 100 ")
        link = stack.enter_context(connect(small))
        for _ in range(2):
            status, _, told = ask(link, "/v2/health/live")
            assert (status, told) == (200, {"live": True})
        status, headers, told = ask(link)
        assert status == 503
        assert "all are busy" in told["error"]
        assert headers["retry-after"] == "1"
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert is_closed(link)
        with connect(small) as other:
            other.sendall(half.replace(b"{", b"{" + b" " * 99))
            assert answer_on(other)[0] == 503
        # Nor do silent connections above the limit keep a health check out.
        for _ in range(100):
            stack.enter_context(connect(small))
        assert ask(stack.enter_context(connect(small)), "/v2/health/ready")[0] == 200


class Fake:
    """A connection that does nothing."""

    spare = answered = closed = aborted = False
    idle_since_s: float | None = 0.0

    def __init__(self, address: str) -> None:
        self.address = address

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def drain(self) -> None:
        pass


def test_one_address_gets_its_share_and_others_are_not_closed_for_it() -> None:
    connections = Connections(8)
    others, greedy = [Fake("192.0.2.1") for _ in range(3)], [Fake("192.0.2.2") for _ in range(20)]
    for fake in (*others, *greedy):
        connections.add(fake)
    assert not any(fake.closed for fake in others)
    assert [fake.closed for fake in greedy] == [True] * 16 + [False] * 4
    for fake in greedy:
        fake.idle_since_s = None
    late = Fake("192.0.2.2")
    connections.add(late)
    assert late.spare
    assert not any(fake.closed for fake in (*others, late))
    for fake in (*others, *greedy, late):
        connections.remove(fake)
    assert len(connections) == 0


def test_a_connection_that_counts_no_more_is_not_left_to_its_client() -> None:
    """What its client does not read, or a goodbye that its client does not say, would keep it open."""
    connections = Connections(4)
    busy = [Fake("127.0.0.1") for _ in range(4 + SPARE_CONNECTIONS + 10)]
    for fake in busy:
        fake.idle_since_s = None
        connections.add(fake)
    assert len(connections) == 4 + SPARE_CONNECTIONS
    assert [fake.aborted for fake in busy] == [False] * 4 + [True] * 10 + [False] * SPARE_CONNECTIONS


# --- TLS handshakes ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = signed_by_itself(tmp_path_factory.mktemp("certificate"))
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


@pytest.fixture
def secured(certificate: dict[str, str]) -> Iterator[Server]:
    """A server that speaks TLS and takes four connections."""
    app = create_app(ModelRegistry())
    with Server(app, max_connections=4, **certificate) as server:  # type: ignore[arg-type]
        yield server


def shaken(server: Server) -> socket.socket:
    """A connection whose handshake is complete."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connect(server))


def count_open(links: list[socket.socket]) -> int:
    """How many connections the server has not closed, of those on which it says nothing."""
    readable, _, _ = select.select(links, [], [], 0)
    return len(links) - len(readable)


def test_connections_count_before_their_handshake_and_the_oldest_makes_room(
    secured: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving, "HANDSHAKE_TIMEOUT_S", 100.0)
    with contextlib.ExitStack() as stack:
        established = stack.enter_context(shaken(secured))
        assert ask(established, "/v2/health/live")[0] == 200
        silent = [stack.enter_context(connect(secured)) for _ in range(300)]
        # All are from one address, which may have as many as the server takes.
        wait_for(lambda: count_open(silent) <= 4)
        assert count_open(silent[-4:]) == 4
        # Others are served meanwhile, old and new.
        assert ask(established, "/v2/health/live")[0] == 200
        for _ in range(3):
            assert ask(stack.enter_context(shaken(secured)), "/v2/health/live")[0] == 200


def test_a_handshake_has_its_time_and_what_follows_has_more(secured: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        established = stack.enter_context(shaken(secured))
        assert ask(established, "/v2/health/live")[0] == 200
        monkeypatch.setattr(arriving, "HANDSHAKE_TIMEOUT_S", 0.3)
        silent = [stack.enter_context(connect(secured)) for _ in range(10)]
        wait_for(lambda: count_open(silent) == 0)
        assert ask(established, "/v2/health/live")[0] == 200
        assert len(secured.connections._arriving) == 0


class Handshake:
    """A connection whose handshake is not complete."""

    def __init__(self, address: str, number: int) -> None:
        self.address, self.number, self.is_cut_off = address, number, False

    def fileno(self) -> int:
        return self.number

    def settle(self) -> None:
        pass

    def cut_off(self) -> None:
        self.is_cut_off = True


def test_of_handshakes_one_address_gets_its_share() -> None:
    connections = Connections(8)
    patient = Handshake("192.0.2.1", 1)
    assert not connections.arrive(patient)
    greedy = [Handshake("192.0.2.2", 2 + i) for i in range(20)]
    for one in greedy:
        connections.arrive(one)
    assert not patient.is_cut_off
    assert [one.is_cut_off for one in greedy] == [True] * 16 + [False] * 4


def test_a_handshake_makes_room_where_the_system_has_no_more_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: socket.socket) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    connections = Connections(8)
    handshakes = [Handshake("192.0.2.1", 1 + i) for i in range(2)]
    for one in handshakes:
        connections.arrive(one)
    monkeypatch.setattr(socket.socket, "accept", fail)
    with arriving.Entrance(socket.create_server(("127.0.0.1", 0)), connections) as entrance:
        for count in (1, 2):
            # By which asyncio goes on with what else there is to do.
            with pytest.raises(BlockingIOError):
                entrance.accept()
            assert [one.is_cut_off for one in handshakes].count(True) == count
        with pytest.raises(OSError, match="too many open files"):
            entrance.accept()


# --- clients that do not read ---

LONG_BODY = json.dumps(
    {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}],
        "parameters": {"binary_data_output": True},
    }
).encode()
LONG_BYTES = 16 << 20


@pytest.fixture(scope="module", params=["http", "https"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The options by which a server speaks HTTP or HTTPS."""
    if request.param == "http":
        return {}
    folder = signed_by_itself(tmp_path_factory.mktemp("tls"))
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


@pytest.fixture
def lengthy(files: dict[str, str]) -> Iterator[Server]:
    """A server that takes four connections, and whose answers are longer than what the systems keep of them."""
    registry = ModelRegistry()
    registry.add("net", *long())
    with contextlib.closing(registry), Server(create_app(registry), max_connections=4, **files) as server:  # type: ignore[arg-type]
        yield server
        wait_for(lambda: not opened(server))


@pytest.fixture
def outcomes(lengthy: Server) -> list[Outcome]:
    found: list[Outcome] = []
    lengthy.app.listeners.append(found.append)
    return found


def opened(server: Server) -> set[GuardedProtocol]:
    """The connections that are open, whether they count or not."""
    return set(server._server.server_state.connections)  # type: ignore[arg-type]


def connect_slowly(server: Server) -> socket.socket:
    """A connection on which the client's system keeps little of what the client does not read."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    link.settimeout(30)
    link.connect(("127.0.0.1", server.port))
    if server.url.startswith("http:"):
        return link
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(link)


def ask_for_much(link: socket.socket, more: str = "") -> None:
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(LONG_BODY)}\r\n{more}\r\n"
    link.sendall(head.encode() + LONG_BODY)


def check_long_answer(stream: io.BufferedIOBase) -> None:
    head = b"".join(iter(stream.readline, b"\r\n"))
    length = re.search(rb"content-length: (\d+)", head)
    assert length
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(stream.read(int(length[1]))) == int(length[1]) > LONG_BYTES


def soon(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether a condition comes to hold within a time."""
    end_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.005)
    return condition()


def test_answers_that_nobody_reads_do_not_pile_up(lengthy: Server, outcomes: list[Outcome]) -> None:
    with connect_slowly(lengthy) as link, link.makefile("rb") as stream:
        asked = 0
        while asked < 8 and soon(lambda count=asked: len(outcomes) == count, 3):
            ask_for_much(link)
            asked += 1
        (connection,) = opened(lengthy)
        # Over TLS, what is not sent lies in two places.
        places = {connection.transport, connection._wire}
        assert outcomes
        assert sum(place.get_write_buffer_size() for place in places) < 2.5 * LONG_BYTES
        # Once they are read, the connection goes on: nothing that was asked is lost.
        for _ in range(asked):
            check_long_answer(stream)
        ask_for_much(link)
        check_long_answer(stream)


def test_connections_count_until_they_are_closed_whether_their_clients_read_or_not(lengthy: Server) -> None:
    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(12):
            link = stack.enter_context(connect_slowly(lengthy))
            ask_for_much(link)
            statuses.append(link.recv(12))
        wait_for(lambda: len(opened(lengthy)) == len(lengthy.connections))
        assert sum(not one.spare for one in opened(lengthy)) == 4
        assert statuses == [b"HTTP/1.1 200"] * 4 + [b"HTTP/1.1 503"] * 8


def test_an_idle_connection_that_makes_room_is_closed_whatever_its_client_does(lengthy: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(connect_slowly(lengthy))
        assert soon(lambda: len(opened(lengthy)) == len(lengthy.connections) == 4, 10)


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_a_client_that_never_reads_is_cut_off(lengthy: Server, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(guarded, "timeout_for", lambda timeout_s, size: 0.1)
    with connect_slowly(lengthy) as link:
        # Over TLS, a server sees only by the second answer that the first is not read.
        for _ in range(1 if more else 2):
            ask_for_much(link, more)
        wait_for(lambda: opened(lengthy))
        wait_for(lambda: not opened(lengthy))


# --- errors ---


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / FTP/1.1\r\n\r\n",
    ],
    ids=["TLS", "SSH", "HTTP/2", "FTP"],
)
def test_what_is_no_request_is_refused_in_json(server: Server, request_bytes: bytes) -> None:
    with connect(server) as link:
        link.sendall(request_bytes)
        answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "not valid HTTP/1.1" in error_in(answer)


def test_an_unexpected_error_is_json_and_the_connection_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ServedModel) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(ServedModel, "metadata", fail)
    with connect(server) as link:
        for _ in range(2):
            status, _, told = ask(link)
            assert status == 500
            assert "secret" not in told["error"]


@pytest.mark.parametrize("path", ["/v2/models/net/", "/v2/health/live/", "//evil.example/v2/models/net/"])
def test_nothing_is_redirected(server: Server, path: str) -> None:
    with connect(server) as link:
        status, headers, told = ask(link, path)
        assert status == 404
        assert told["error"]
        assert "location" not in headers


def test_an_old_client_needs_no_host(server: Server) -> None:
    with connect(server) as link:
        link.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
        assert read_all(link).startswith(b"HTTP/1.1 200 ")


def test_what_is_wrong_with_a_head_is_told_under_the_clients_id(server: Server) -> None:
    with connect(server) as link:
        link.sendall(b"GET /v2/load HTTP/1.1\r\nX-Request-Id: mine\r\n\r\n")
        answer = read_all(link)
    assert "Host" in error_in(answer)
    assert b"x-request-id: mine\r\n" in answer


@pytest.mark.parametrize("slash", ["%2F", "%2f"])
def test_an_encoded_slash_parts_no_path(server: Server, slash: str) -> None:
    """A proxy that keeps clients from a path would not have seen this one."""
    with connect(server) as link:
        assert ask(link, f"/v2{slash}load")[0] == 404
        assert ask(link, f"/v2/models{slash}net")[0] == 404
        assert ask(link, f"/v2/models/a{slash}b")[0] == 404
        for path in ("repository%2Findex", "models%2Fnet/infer"):
            link.sendall(
                f"POST /v2/{path.replace('%2F', slash)} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
            )
            assert answer_on(link)[0] == 404
        assert ask(link, "/v2/mod%65ls/net")[0] == 200


def test_places_of_connections_whose_requests_are_answered_before_their_bodies_come_are_not_kept(small: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            link = stack.enter_context(connect(small))
            link.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            assert answer_on(link)[0] == 200
        assert ask(stack.enter_context(connect(small)))[0] == 200


# --- upgrades ---

UPGRADE = (
    b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
)


@pytest.mark.parametrize("offer", [UPGRADE, b"Host: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"])
def test_an_offered_upgrade_is_ignored(server: Server, offer: bytes) -> None:
    body = json.dumps({"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]})
    head = b"POST /v2/models/net/infer HTTP/1.1\r\n" + offer + b"Content-Length: %d\r\n\r\n" % len(body)
    with connect(server) as link:
        for split_at in (0, 40, len(head), len(head) + 10):
            data = head + body.encode()
            for piece in (data[:split_at], data[split_at:]):
                link.sendall(piece)
                time.sleep(0.02)
            status, _, told = answer_on(link)
            assert (status, told["outputs"][0]["name"]) == (200, "output")
        link.sendall(b"GET /v2/health/live HTTP/1.1\r\n" + offer + b"\r\n")
        assert answer_on(link)[2] == {"live": True}
        assert ask(link)[0] == 200


def test_a_thousand_offers_in_one_piece_of_data_are_ignored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "MAX_WAITING", 10_000)
    with serving(nn.Linear(1000, 2).eval(), torch.zeros(1, 1000)) as server, connect(server) as link:
        # A large request, for whose like the server then has a large buffer.
        zeros = {"name": "input", "datatype": "FP32", "shape": [64, 1000], "data": [0] * 64_000}
        body = json.dumps({"inputs": [zeros]}).encode()
        large = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        link.sendall(large)
        assert answer_on(link)[0] == 200
        link.sendall((b"GET /v2/health/live HTTP/1.1\r\n" + UPGRADE + b"\r\n") * 1000)
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 1000 and (piece := link.recv(1 << 16)):
            received += piece
    assert statuses_in(received) == [200] * 1000


def test_a_request_for_a_tunnel_is_refused(server: Server) -> None:
    with connect(server) as link:
        link.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
        answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "no proxy" in error_in(answer)


# --- requests that are sent before earlier ones are answered ---

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


HOLDING = threading.Event()
BEGUN, STEPS = threading.Semaphore(0), threading.Semaphore(0)


def hold(x: torch.Tensor) -> torch.Tensor:
    """Take until the test says so, and so long that the request is never run by the thread that receives it."""
    time.sleep(2e-3)
    if HOLDING.is_set() and float(x.max()) > 0:
        BEGUN.release()
        STEPS.acquire(timeout=60)
    return x * 1


fx.wrap("hold")


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(hold(x))


@pytest.fixture(params=["direct", "asgi"])
def holding(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server whose model answers each ``HELD`` once the test lets it."""
    registry = ModelRegistry(profiler=None)
    registry.add("net", Held().eval(), X)
    while BEGUN.acquire(blocking=False) or STEPS.acquire(blocking=False):
        pass
    HOLDING.set()
    with contextlib.closing(registry), Server(create_app(registry), direct=request.param == "direct") as server:
        yield server
        HOLDING.clear()
        STEPS.release(10)


HELD_BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1] * 4}]}).encode()
HELD = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(HELD_BODY) + HELD_BODY


def statuses_in(received: bytes) -> list[int]:
    return [int(one) for one in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def test_nothing_is_read_while_requests_wait_for_earlier_ones(holding: Server) -> None:
    with connect(holding, 60) as link:
        link.sendall(HELD * 3)
        assert BEGUN.acquire(timeout=30)
        (connection,) = opened(holding)
        wait_for(lambda: len(connection.pipeline) == 2)
        STEPS.release()
        assert BEGUN.acquire(timeout=30)
        # One is answered, one runs, and one waits.
        assert connection.flow.read_paused
        for _ in range(20):
            link.sendall(LIVE * 100)
        STEPS.release(2)
        link.shutdown(socket.SHUT_WR)
        received = read_all(link)
    assert statuses_in(received)[:3] == [200] * 3


def test_with_too_many_requests_waiting_the_connection_ends_after_their_answers(holding: Server) -> None:
    with connect(holding, 60) as link:
        link.sendall(HELD)
        assert BEGUN.acquire(timeout=30)
        # All in one piece, and then some for which the server no longer reads.
        for _ in range(20):
            link.sendall(LIVE * (guarded.MAX_WAITING * 3))
        (connection,) = opened(holding)
        wait_for(lambda: connection._dropping is not None)
        assert len(connection.pipeline) == guarded.MAX_WAITING
        STEPS.release()
        received = read_all(link)
    assert statuses_in(received) == [200] * (1 + guarded.MAX_WAITING)
    check_serves(holding, "x")


@pytest.mark.parametrize("between", [b"", LIVE], ids=["at once", "after another"])
@pytest.mark.parametrize(
    "wrong",
    [b"nonsense\r\n\r\n", CHUNKED.replace(b"2\r\n{}\r\n", b"zz\r\n")],
    ids=["no request", "no chunk"],
)
def test_what_is_wrong_with_a_request_takes_no_earlier_one_its_answer(
    holding: Server, between: bytes, wrong: bytes
) -> None:
    with connect(holding, 60) as link:
        link.sendall(HELD)
        assert BEGUN.acquire(timeout=30)
        link.sendall(between + wrong)
        (connection,) = opened(holding)
        wait_for(lambda: connection._dropping is not None)
        STEPS.release()
        assert statuses_in(read_all(link)) == [200] * (2 if between else 1)
    check_serves(holding, "x")


def test_a_head_has_its_time_while_the_server_reads(holding: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "HEAD_TIMEOUT_S", 0.2)
    with connect(holding, 60) as link:
        link.sendall(HELD * 2 + HELD[:30])
        assert BEGUN.acquire(timeout=30)
        (connection,) = opened(holding)
        wait_for(lambda: connection._in_head)
        link.sendall(HELD[30:])
        time.sleep(0.5)
        STEPS.release(3)
        for _ in range(3):
            assert answer_on(link)[0] == 200


# --- bodies ---


@pytest.fixture(scope="module", params=["direct", "asgi"])
def hasty(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that gives a body 0.3 s, and the time of what has come."""
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Linear(4, 2).eval(), X)
    app = create_app(registry, body_timeout_s=0.3)
    with contextlib.closing(registry), Server(app, direct=request.param == "direct") as server:
        yield server


POST = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "begun",
    [
        POST + b"Content-Length: 1000000\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"POST /v2/probe HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\na",
    ],
    ids=["announced", "chunked", "probe"],
)
def test_a_body_that_stalls_is_given_up_however_long_it_was_to_be(hasty: Server, begun: bytes) -> None:
    with connect(hasty, 30) as link:
        link.sendall(begun)
        status, _, told = answer_on(link)
    assert (status, "a body must arrive" in told["error"]) == (408, True)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_the_time_of_what_has_come(hasty: Server, chunked: bool) -> None:
    body = HELD_BODY.replace(b'"x"', b'"input"') + b" " * 700_000
    if chunked:
        head, body = b"Transfer-Encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        head = b"Content-Length: %d\r\n" % len(body)
    with connect(hasty, 30) as link:
        link.sendall(POST + head + b"\r\n" + body[:600_000])
        time.sleep(1)
        link.sendall(body[600_000:])
        assert answer_on(link)[0] == 200
