"""Quick requests run where they are received, and what the scheduler does to one of them changes nothing in that."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time

import pytest
import torch
from messages import joined
from torch import Tensor, fx, nn

from torchsurgeon import wire
from torchsurgeon.serve import ModelRegistry, Server, create_app, quick
from torchsurgeon.serve.failure import BusyError
from torchsurgeon.serve.intake import Intake
from torchsurgeon.serve.quick import LoneClient, QuickRequests
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.worker import Worker

QUICK_S, SLOW_S, VERY_SLOW_S = 1e-4, 1e-2, 0.2


def test_one_slow_request_does_not_move_a_model_to_its_thread_and_several_do() -> None:
    requests = QuickRequests()
    assert not requests.expects(100)
    requests.took(100, QUICK_S)
    assert requests.expects(100)
    assert not requests.expects(101)
    for _ in range(50):
        requests.took(100, SLOW_S)
        requests.took(100, QUICK_S)
        requests.took(100, QUICK_S)
        assert requests.expects(100)
    for _ in range(8):
        requests.took(100, SLOW_S)
    assert not requests.expects(100)


def test_as_many_quick_requests_as_slow_ones_are_enough_to_win_the_place() -> None:
    requests = QuickRequests()
    for _ in range(20):
        requests.took(100, SLOW_S)
    assert not requests.expects(100)
    for _ in range(20):
        for duration_s in (QUICK_S, SLOW_S, QUICK_S, SLOW_S):
            requests.took(100, duration_s)
    assert requests.expects(100)


def test_one_quick_request_does_not_bring_a_slow_model_back_and_several_do() -> None:
    requests = QuickRequests()
    for duration_s in (SLOW_S, SLOW_S, SLOW_S, SLOW_S, QUICK_S, QUICK_S):
        requests.took(100, duration_s)
        assert not requests.expects(100)
    for _ in range(8):
        requests.took(100, QUICK_S)
    assert requests.expects(100)


def test_a_request_that_has_kept_everybody_waiting_moves_its_kind_to_a_thread_at_once() -> None:
    requests = QuickRequests()
    for _ in range(20):
        requests.took("kind", QUICK_S)
    requests.took("kind", VERY_SLOW_S)
    assert not requests.expects("kind")
    for _ in range(8):
        requests.took("kind", QUICK_S)
    assert requests.expects("kind")


def test_what_seems_to_take_too_long_is_tried_now_and_then_and_corrected_by_that() -> None:
    requests = QuickRequests()
    assert requests.hoped_s("kind", QUICK_S) == 0
    requests.took("kind", VERY_SLOW_S)
    assert requests.hoped_s("kind", 2 * VERY_SLOW_S) == VERY_SLOW_S
    # Whoever is too late already is not tried.
    assert [requests.hoped_s("kind", left_s) for left_s in (-1.0, 0.0)] == [VERY_SLOW_S] * 2
    # One is let through, and no other one before it has ended.
    assert [requests.hoped_s("kind", 0.15) for _ in range(3)] == [0, VERY_SLOW_S, VERY_SLOW_S]
    requests.took("kind", SLOW_S)
    assert requests.hoped_s("kind", 0.15) == SLOW_S
    # Requests that were as quick once, and are stopped at their deadlines now, are refused again.
    requests.failed("kind", 0.15, at_least_s=0.15)
    assert requests.hoped_s("kind", 0.14) == 0.15
    requests._known("kind").tried_s -= 10 * 0.15
    assert [requests.hoped_s("kind", 0.14) for _ in range(3)] == [0, 0.15, 0.15]
    requests.failed("kind", 0.14, at_least_s=0.14)
    assert requests.hoped_s("kind", 0.14) == 0.15
    # So are those of which no one was ever answered.
    requests.failed("never", 0.15, at_least_s=0.15)
    assert [requests.hoped_s("never", 0.1) for _ in range(3)] == [0, 0.15, 0.15]
    assert not requests.brief("never")


def test_the_kinds_that_are_remembered_are_bounded_and_those_that_are_asked_for_stay() -> None:
    requests = QuickRequests()
    requests.took("kept", QUICK_S)
    for size in range(10_000):
        requests.took(size, QUICK_S)
        assert requests.expects("kept")
    assert len(requests._kinds) <= 256


def test_requests_at_two_cuts_whose_bodies_are_equally_long_are_told_apart() -> None:
    """As those of a transformer are, whose layers all give tensors of one size."""
    ran: list[Received] = []
    intake = Intake("net", lambda request: ran.append(request), lambda requests: [])  # type: ignore[arg-type]

    def request(name: str) -> Received:
        header = f'{{"inputs":[{{"name":"{name}"}}]}}'.encode()
        return Received(memoryview(bytearray(header + bytes(64))), len(header), 0.0, 0.0)

    early, late = request("layers.01"), request("layers.11")
    assert len(early.body) == len(late.body)
    for _ in range(20):
        assert intake.took([late], QUICK_S) == QUICK_S
        assert intake.took([early], VERY_SLOW_S) == VERY_SLOW_S
        assert (intake.quick(late.alike), intake.brief(late.alike)) == (True, True)
        assert (intake.quick(early.alike), intake.brief(early.alike)) == (False, False)
    # Neither takes longer than it does on an idle server.
    assert intake.slowdown == pytest.approx(1.0)
    assert intake.took_of_several([early, late], VERY_SLOW_S) == [VERY_SLOW_S, QUICK_S]
    early.due_s = time.perf_counter() + VERY_SLOW_S / 2
    intake._admission._each_s = 0.0
    # One of them is tried.
    intake.submit(early).result(20)
    assert ran == [early]
    with pytest.raises(BusyError, match="cannot answer within the request's deadline"):
        intake.submit(early)
    intake.worker.close()


def test_a_client_is_alone_once_it_has_asked_for_a_while_and_another_ends_that() -> None:
    lone = LoneClient()
    assert [lone.asks("a:1") for _ in range(40)] == [False] * 32 + [True] * 8
    assert not lone.asks("b:2")
    assert not any(lone.asks("a:1") for _ in range(32))
    assert lone.asks("a:1")
    assert not any(lone.asks("") for _ in range(40))


def test_brief_requests_are_those_that_are_expected_to_end_soon() -> None:
    requests = QuickRequests()
    assert not requests.brief(100)
    requests.took(100, SLOW_S)
    requests.took(101, 10 * SLOW_S)
    assert requests.brief(100)
    assert not requests.brief(101)


THREADS: list[str] = []


def note_thread(x: Tensor) -> Tensor:
    THREADS.append(threading.current_thread().name)
    time.sleep(0.001)
    return x


fx.wrap("note_thread")


class Noted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(note_thread(x))


def test_requests_of_a_client_that_is_alone_run_where_they_are_received(monkeypatch: pytest.MonkeyPatch) -> None:
    # However long they take on a busy machine.
    monkeypatch.setattr(quick, "_BRIEF_S", 60.0)
    message = wire.encode_request({"x": torch.ones(1, 4)})
    body, headers = bytes(joined(message)), {"Inference-Header-Content-Length": str(message.header_bytes)}
    registry = ModelRegistry(profiler=None)
    registry.add("net", Noted().eval(), torch.rand(1, 4))
    with Server(create_app(registry)) as server:
        one, other = (http.client.HTTPConnection("127.0.0.1", server.port, timeout=20) for _ in range(2))

        def ask(link: http.client.HTTPConnection) -> str:
            THREADS.clear()
            link.request("POST", "/v2/models/net/infer", body, headers)
            assert link.getresponse().read()
            (thread,) = THREADS
            return thread

        with contextlib.closing(one), contextlib.closing(other):
            assert ask(one).startswith("torchsurgeon-net")
            threads = [ask(one) for _ in range(50)]
            assert threads[0].startswith("torchsurgeon-net")
            assert not threads[-1].startswith("torchsurgeon-net")
            assert ask(other).startswith("torchsurgeon-net")
            assert ask(one).startswith("torchsurgeon-net")
    registry.close()


class Cuts(nn.Module):
    """Two cuts whose tensors are of one size, and whose names are equally long."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.later, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(note_thread(self.later(self.early(x))))


def test_a_slow_cut_runs_in_a_thread_although_a_quick_one_has_bodies_of_the_same_length() -> None:
    registry = ModelRegistry(profiler=None)
    served = registry.add("net", Cuts().eval(), torch.rand(1, 4))

    def message(name: str) -> tuple[bytes, int]:
        encoded = wire.encode_request({name: torch.rand(1, 4)})
        assert encoded.header_bytes is not None
        return b"".join(bytes(part) for part in encoded.buffers), encoded.header_bytes

    messages = {name: message(name) for name in ("early", "later")}
    assert len(messages["early"][0]) == len(messages["later"][0])
    body, header_bytes = messages["later"]
    # However long they take on a busy machine.
    served.intake.took([Received(memoryview(body), header_bytes, 0.0, 0.0)], QUICK_S)
    with (
        Server(create_app(registry)) as server,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as link,
    ):

        def ask(name: str) -> str:
            body, header_bytes = messages[name]
            THREADS.clear()
            link.request("POST", "/v2/models/net/infer", body, {"Inference-Header-Content-Length": str(header_bytes)})
            assert link.getresponse().read()
            (thread,) = THREADS
            return thread

        assert ask("early").startswith("torchsurgeon-net")
        assert not ask("later").startswith("torchsurgeon-net")
        assert ask("early").startswith("torchsurgeon-net")
    registry.close()


@pytest.mark.parametrize("client", ["alone", "not alone"])
@pytest.mark.parametrize("form", ["JSON", "a long header"])
def test_requests_that_have_only_their_length_in_common_never_run_where_they_are_received(
    form: str, client: str
) -> None:
    """Otherwise cheap ones, padded, could have one of a large batch keep the whole server waiting."""
    registry = ModelRegistry(profiler=None)
    served = registry.add("net", Noted().eval(), torch.zeros(1, 4))
    if form == "JSON":
        entry = {"name": served.graph.inputs[0].name, "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}
        body, headers = json.dumps({"inputs": [entry]}).encode(), {}
    else:
        message = wire.encode_request({served.graph.inputs[0].name: torch.zeros(1, 4)})
        data, size = bytes(joined(message)), message.header_bytes or 0
        body = data[:size].ljust(5000) + data[size:]
        headers = {"Inference-Header-Content-Length": "5000"}
    served.intake.took([Received(memoryview(body), None, 0.0, 0.0)], QUICK_S)
    with (
        Server(create_app(registry)) as server,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as link,
    ):
        if client == "alone":
            server.app.direct.lone.asks = lambda peer: True
        for _ in range(3):
            THREADS.clear()
            link.request("POST", "/v2/models/net/infer", body, headers)
            assert link.getresponse().read()
            assert [name.startswith("torchsurgeon-net") for name in THREADS] == [True]
    registry.close()


@pytest.mark.parametrize("kind", ["quick", "slow"])
def test_a_quick_job_waits_for_quick_ones_only(kind: str) -> None:
    worker = Worker("test")
    begun, end = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        end.wait(10)

    with torch.no_grad():
        running = worker.submit(job, quick=kind == "quick")
        waiting = worker.submit(lambda: None, quick=kind == "quick")
        assert begun.wait(10)
        # This one does not end in time, whatever it was expected to do.
        assert worker.now(lambda: "done") is None
        end.set()
        running.result(10)
        waiting.result(10)
        assert worker.now(lambda: "done") == "done"
        with torch.enable_grad():
            assert worker.now(lambda: "done") is None
    worker.close()
