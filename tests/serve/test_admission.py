"""Requests that cannot be answered in time are refused at once, and nothing is computed for who does not wait."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from waiting import wait_for

from torchsurgeon.errors import ProtocolError, RequestRefusedError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.admission import Admission, deadline_in
from torchsurgeon.serve.failure import BusyError, GoneError
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.quick import QuickRequests
from torchsurgeon.serve.received import Received
from torchsurgeon.transport import HttpTransport
from torchsurgeon.transport.http_bytes import _rounded_up

X = torch.ones(1, 4)
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}).encode()
HELD: list[threading.Event] = []
BEGUN = threading.Semaphore(0)
AFTER: list[float] = []


def hold(x: Tensor) -> Tensor:
    """Take as long as the test wants, and so long that the request is never run by the thread that receives it."""
    BEGUN.release()
    time.sleep(2e-3)
    for event in HELD:
        event.wait(20)
    return x * 1


def after(x: Tensor) -> Tensor:
    """Note that the layer behind ``hold`` ran."""
    AFTER.append(time.monotonic())
    return x * 1


fx.wrap("hold")
fx.wrap("after")


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(after(hold(x)))


@pytest.fixture(scope="module", params=["direct", "asgi"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    registry = ModelRegistry(profiler=None, max_queue=3, concurrency=1)
    registry.add("net", Held().eval(), X)
    with Server(create_app(registry), direct=request.param == "direct") as server:
        yield server
    registry.close()


@pytest.fixture
def outcomes(server: Server) -> Iterator[list[Outcome]]:
    found: list[Outcome] = []
    server.app.listeners.append(found.append)
    yield found
    server.app.listeners.clear()


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Requests that run stay in their first layer until this is set."""
    event = threading.Event()
    HELD.append(event)
    while BEGUN.acquire(blocking=False):
        pass
    AFTER.clear()
    yield event
    event.set()
    HELD.clear()


def begin(server: Server, **headers: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v2/models/net/infer", BODY, headers)
    return connection


def end(connection: http.client.HTTPConnection) -> tuple[int, dict[str, str], Any]:
    with contextlib.closing(connection):
        response = connection.getresponse()
        told = {name.lower(): value for name, value in response.getheaders()}
        return response.status, told, json.loads(response.read())


def served(server: Server) -> Any:
    return server.app.registry.get("net")


def fill(server: Server, count: int) -> list[http.client.HTTPConnection]:
    """Have one request run, and ``count`` wait."""
    found = [begin(server)]
    assert BEGUN.acquire(timeout=20)
    found += [begin(server) for _ in range(count)]
    wait_for(lambda: served(server).worker.waiting == count)
    return found


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(server: Server, held: threading.Event) -> None:
    waiting = fill(server, 3)
    start_s = time.monotonic()
    status, headers, body = end(begin(server))
    assert time.monotonic() - start_s < 10
    assert (status, headers["content-type"]) == (503, "application/json")
    assert int(headers["retry-after"]) >= 1
    assert "as many requests waiting as it takes (3)" in body["error"]
    held.set()
    assert [end(one)[0] for one in waiting] == [200] * 4
    assert end(begin(server))[0] == 200


def test_a_refused_client_keeps_its_connection(server: Server, held: threading.Event) -> None:
    waiting = fill(server, 3)
    connection = begin(server)
    response = connection.getresponse()
    assert (response.status, bool(response.read())) == (503, True)
    held.set()
    assert [end(one)[0] for one in waiting] == [200] * 4
    connection.request("POST", "/v2/models/net/infer", BODY)
    assert end(connection)[0] == 200


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(server: Server, held: threading.Event) -> None:
    served(server).intake._admission._each_s = 10.0
    waiting = fill(server, 1)
    start_s = time.monotonic()
    status, headers, body = end(begin(server, **{"Torchsurgeon-Deadline-S": "5"}))
    assert time.monotonic() - start_s < 4
    assert status == 503
    assert headers["retry-after"] == "10"
    assert "cannot answer within the request's deadline" in body["error"]
    held.set()
    assert [end(one)[0] for one in waiting] == [200] * 2
    served(server).intake._admission._each_s = 0.0


def test_a_deadline_that_passes_while_a_request_waits_or_runs_ends_it_between_two_layers(
    server: Server, held: threading.Event
) -> None:
    served(server).intake._admission._each_s = 0.0
    waiting = [begin(server, **{"Torchsurgeon-Deadline-S": "0.2"})]
    assert BEGUN.acquire(timeout=20)
    waiting.append(begin(server, **{"Torchsurgeon-Deadline-S": "0.200"}))
    wait_for(lambda: served(server).worker.waiting == 1)
    time.sleep(0.3)
    held.set()
    for one in waiting:
        status, headers, body = end(one)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "deadline passed" in body["error"]
    assert not AFTER
    assert not BEGUN.acquire(blocking=False)


@pytest.mark.parametrize("while_it", ["runs", "waits"])
def test_nothing_more_is_computed_for_a_client_that_has_left(
    server: Server, held: threading.Event, outcomes: list[Outcome], while_it: str
) -> None:
    waiting = fill(server, 1)
    outcomes.clear()
    waiting[0 if while_it == "runs" else 1].close()
    time.sleep(0.2)
    held.set()
    (kept,) = [one for one in waiting if one.sock is not None]
    assert end(kept)[0] == 200
    wait_for(lambda: len(outcomes) == 2)
    assert sorted(one.status for one in outcomes) == [200, 499]
    assert len(AFTER) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "1e3", "inf", "nan", "1,5", "", "9" * 30])
def test_a_deadline_that_is_no_number_of_seconds_is_refused(server: Server, value: str) -> None:
    status, _, body = end(begin(server, **{"Torchsurgeon-Deadline-S": value}))
    assert status == 400
    assert "Torchsurgeon-Deadline-S must be a number of seconds" in body["error"]
    assert body["error"].endswith(f"; got {value!r}")
    assert deadline_in(None) == math.inf
    with pytest.raises(ProtocolError):
        deadline_in(value.encode())


def test_requests_without_a_deadline_are_answered_however_long_it_takes(server: Server) -> None:
    assert end(begin(server))[0] == 200
    assert end(begin(server, **{"Torchsurgeon-Deadline-S": "20"}))[0] == 200


def test_a_slow_first_request_does_not_have_all_others_refused(
    server: Server, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.set()
    requests = QuickRequests()
    monkeypatch.setattr(served(server).intake, "_quick", requests)
    monkeypatch.setattr(served(server).intake._admission, "_each_s", 0.0)
    requests.took(len(BODY), 1000.0)
    assert [end(begin(server, **{"Torchsurgeon-Deadline-S": "20"}))[0] for _ in range(3)] == [200] * 3


def test_requests_that_are_stopped_at_their_deadlines_are_refused_at_once_then(
    server: Server, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = QuickRequests()
    monkeypatch.setattr(served(server).intake, "_quick", requests)
    tried = begin(server, **{"Torchsurgeon-Deadline-S": "1.5"})
    assert BEGUN.acquire(timeout=20)
    time.sleep(1.6)
    held.set()
    assert "deadline passed" in end(tried)[2]["error"]
    # The next one is tried, and ends in the time that it has left.
    held.clear()
    tried = begin(server, **{"Torchsurgeon-Deadline-S": "1.2"})
    assert BEGUN.acquire(timeout=20)
    time.sleep(1.3)
    held.set()
    assert "deadline passed" in end(tried)[2]["error"]
    assert "cannot answer within" in end(begin(server, **{"Torchsurgeon-Deadline-S": "1.55"}))[2]["error"]


def test_how_long_a_request_waits_is_estimated_from_those_before() -> None:
    admission = Admission("net", 10, 2)
    request = Received(memoryview(b""), None, 0.0, 0.0)
    assert admission.wait_s(5) == 0
    admission.took(0.4, 1)
    assert admission.wait_s(5) == pytest.approx(1.0)
    for _ in range(200):
        admission.took(0.4, 4)
    assert admission.wait_s(5) == pytest.approx(0.25, rel=0.01)
    admission.check(request, 9, 100.0)
    assert admission.full().wait_s == admission.displaced().wait_s == pytest.approx(0.5, rel=0.01)
    request.due_s = time.perf_counter() + 1.0
    admission.check(request, 5, 0.5)
    with pytest.raises(BusyError, match="5 requests come first, so an answer takes about 1"):
        admission.check(request, 5, 0.9)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_profile_takes_no_place_of_a_request_and_is_measured_once_for_all(concurrency: int) -> None:
    profiled, ended = list[object](), threading.Event()

    def profiler(graph: object) -> dict[str, Any]:
        profiled.append(graph)
        return {"layers": 3}

    registry = ModelRegistry(profiler=profiler, max_queue=2, concurrency=concurrency)
    net = registry.add("net", Plain().eval(), X)

    def hold_all() -> list[Any]:
        begun = threading.Barrier(concurrency + 1)
        ended.clear()
        found = [net.worker.submit(lambda: (begun.wait(20), ended.wait(20))) for _ in range(concurrency)]
        begun.wait(20)
        return found

    def ask(path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def answers(connections: list[http.client.HTTPConnection]) -> list[tuple[int, Any]]:
        return [(status, body) for status, _, body in map(end, connections)]

    with Server(create_app(registry)) as server:
        holding = hold_all()
        asking = []
        for _ in range(8):
            asking.append(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20))
            asking[-1].request("GET", "/v2/models/net/profile")
        wait_for(lambda: len(net.worker._waiting) == 1)
        # A client that leaves takes nothing from the others that wait for the same.
        asking.pop().close()
        load = ask("/v2/load")[1]["models"]["net"]
        assert (load["waiting"], load["waiting_clients"], sum(load["waiting_by_priority"].values())) == (0, 0, 0)
        inferences = [begin(server) for _ in range(2)]
        wait_for(lambda: net.worker.waiting == 2)
        assert end(begin(server))[0] == 503
        ended.set()
        assert [status for status, _ in answers(inferences)] == [200] * 2
        assert answers(asking) == [(200, {"layers": 3})] * 7
        assert len(profiled) == 1
        # What is known is told at once, however busy the model is.
        holding += hold_all()
        assert ask("/v2/models/net/profile") == (200, {"layers": 3})
        ended.set()
        for one in holding:
            one.result(20)
    registry.close()


def test_who_leaves_while_a_profile_is_waited_for_takes_it_from_nobody_else() -> None:
    registry = ModelRegistry(profiler=lambda graph: {"layers": 3}, concurrency=1)
    worker = registry.add("net", Plain().eval(), X).worker
    app, ended = create_app(registry), threading.Event()

    async def ask() -> tuple[int, bytes]:
        told: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            told.append(message)

        path = "/v2/models/net/profile"
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [], "client": None}
        await app({**scope, "root_path": "", "http_version": "1.1", "scheme": "http"}, receive, send)
        return told[0]["status"], b"".join(one.get("body", b"") for one in told[1:])

    async def leave() -> tuple[int, bytes]:
        leaving, staying = asyncio.create_task(ask()), asyncio.create_task(ask())
        while not len(worker._waiting):
            await asyncio.sleep(0.005)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        ended.set()
        return await asyncio.wait_for(staying, 20)

    busy = worker.submit(lambda: ended.wait(20))
    assert asyncio.run(leave()) == (200, b'{"layers":3}')
    assert busy.result(20)
    registry.close()


# --- the device's side ---


def test_a_call_with_a_deadline_of_its_own_tells_it_and_others_do_not() -> None:
    heads: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"

    def serve() -> None:
        for _ in range(2):
            link, _ = listening.accept()
            with link:
                heads.append(link.recv(65536).partition(b"\r\n\r\n")[0])
                link.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with HttpTransport(f"http://127.0.0.1:{listening.getsockname()[1]}", 10) as transport:
        for timeout_s in (None, 2.0):
            with contextlib.suppress(ProtocolError):
                transport.infer("net", {"x": X}, max_answer_bytes=1000, timeout_s=timeout_s)
    thread.join(20)
    listening.close()
    told = [[line for line in head.split(b"\r\n") if line.startswith(b"Torchsurgeon-Deadline-S")] for head in heads]
    assert told == [[], [b"Torchsurgeon-Deadline-S: 2"]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1801, "0.19"), (2.0, "2"), (1.23, "1.3"), (0.00001, "0.001"), (0.0123, "0.013"), (29.99, "30"), (99.1, "100")],
)
def test_a_deadline_is_told_with_two_digits_and_never_as_an_earlier_one(seconds: float, text: str) -> None:
    assert _rounded_up(seconds) == text
    assert deadline_in(text.encode()) >= seconds


def test_a_device_learns_that_the_server_is_busy(server: Server, held: threading.Event) -> None:
    waiting = fill(server, 3)
    with (
        HttpTransport(server.url, 10) as transport,
        pytest.raises(RequestRefusedError, match="try again later") as told,
    ):
        transport.infer("net", {"x": X}, max_answer_bytes=1000)
    assert told.value.status == 503
    held.set()
    assert [end(one)[0] for one in waiting] == [200] * 4


def test_requests_that_were_not_answered_do_not_say_how_long_answers_take() -> None:
    registry = ModelRegistry(profiler=None)
    served = registry.add("slow", Held().eval(), X)
    bad = BODY.replace(b"1.0", b"[]1", 1)
    with torch.no_grad():
        served.answer(Received(memoryview(BODY), None, 0.0, time.perf_counter()))
        for _ in range(20):
            with pytest.raises(GoneError):
                served.answer(Received(memoryview(BODY), None, 0.0, time.perf_counter(), gone=True))
            with pytest.raises(ProtocolError):
                served.answer(Received(memoryview(bad), None, 0.0, time.perf_counter()))
        served.answer(Received(memoryview(BODY), None, 0.0, time.perf_counter()))
    registry.close()
    # Otherwise the slow model would run in the thread that receives all requests.
    assert not served.quick(len(BODY))
    assert served.intake.slowdown < 100
