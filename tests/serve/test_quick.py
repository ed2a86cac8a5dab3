"""Quick requests run where they are received, and what the scheduler does to one of them changes nothing in that."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time

import pytest
import torch
from torch import Tensor, fx, nn

from torchsurgeon.serve import ModelRegistry, Server, create_app, quick
from torchsurgeon.serve.quick import LoneClient, QuickRequests
from torchsurgeon.serve.worker import Worker

QUICK_S, SLOW_S = 1e-4, 1e-2


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


def test_the_lengths_that_are_remembered_are_bounded() -> None:
    requests = QuickRequests()
    for size in range(10_000):
        requests.took(size, QUICK_S)
    assert len(requests._kinds) <= 256


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
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]})
    registry = ModelRegistry(profiler=None)
    registry.add("net", Noted().eval(), torch.rand(1, 4))
    with Server(create_app(registry)) as server:
        one, other = (http.client.HTTPConnection("127.0.0.1", server.port, timeout=20) for _ in range(2))

        def ask(link: http.client.HTTPConnection) -> str:
            THREADS.clear()
            link.request("POST", "/v2/models/net/infer", body)
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
