"""Several requests of one model at once: only where that is sound, and with each one's own bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from serving import serving
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from waiting import wait_for

import torchsurgeon as ts
from torchsurgeon.cutting.partition import cut
from torchsurgeon.serve import ModelRegistry, concurrency
from torchsurgeon.serve.concurrency import default_concurrency, why_in_turn
from torchsurgeon.serve.fairness import Place
from torchsurgeon.serve.worker import Worker
from torchsurgeon.transport import HttpTransport

X = torch.rand(1, 8, generator=torch.Generator().manual_seed(0))
MEETING: list[threading.Barrier] = []
LAST = {"value": 0.0}
seen = 0


class Whole(nn.Module):
    """A module that tests keep whole, so that its own code runs on the server."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.history, self.last = nn.Linear(8, 8), [torch.zeros(1)], torch.zeros(1)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale

    def reset(self) -> None:
        self.last = torch.zeros(1)  # assigned by a method that no call reaches


class Assigning(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last * 2


class Filling(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.history[0] = self.linear(x)
        return self.history[0] * 2


class Inside(Whole):
    """Assigns in a method that its forward calls, and not in itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.keep(x)
        return self.last * 2

    def keep(self, x: Tensor) -> None:
        self.last = self.linear(x)


class Indirect(Whole):
    def forward(self, x: Tensor) -> Tensor:
        setattr(self, "last", self.linear(x))  # noqa: B010
        return self.last * 2


class OfTheWorld(Whole):
    def forward(self, x: Tensor) -> Tensor:
        global seen
        seen += 1
        return self.linear(x)


class OfAnother(Whole):
    def forward(self, x: Tensor) -> Tensor:
        LAST["value"] = 1.0
        return self.linear(x)


class Net(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), middle, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def meet(x: Tensor) -> Tensor:
    """Wait until as many requests run at once as the test has asked for."""
    for barrier in MEETING:
        barrier.wait(20)
    return x * 1


fx.wrap("meet")


class Meeting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(meet(x))


def reason(middle: nn.Module, whole: bool = True) -> str | None:
    graph = ts.trace(Net(middle).eval(), X, leaf_modules=["middle"] if whole else ())
    return why_in_turn(graph, [X])


@pytest.mark.parametrize("kind", [Assigning, Filling, Inside, Indirect, OfTheWorld, OfAnother])
def test_a_layer_whose_code_writes_to_what_another_call_may_read_is_found(kind: type[Whole]) -> None:
    why = reason(kind())
    assert why is not None
    assert "layer 'middle'" in why
    assert any(name in why for name in ("last", "history", "seen", "LAST"))


def test_a_layer_whose_code_only_reads_runs_at_once_and_so_does_what_was_followed() -> None:
    assert reason(Whole()) is None
    # What it assigns was followed, so that no code of it runs on the server.
    assert reason(Assigning(), whole=False) is None
    pair = nn.Sequential(nn.LSTM(8, 8, batch_first=True), nn.Identity())
    assert why_in_turn(ts.trace(pair.eval(), X[None]), [X[None]]) is None
    norm = nn.Sequential(nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2), nn.Identity())
    assert reason(norm[0]) is None


def test_a_hook_that_assigns_is_found() -> None:
    middle = nn.Linear(8, 8)

    def hook(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        module.last = result
        return module.last * 2

    middle.register_forward_hook(hook)
    why = reason(middle)
    assert why is not None
    assert "last" in why


def test_what_a_call_leaves_is_found_where_its_code_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "_written_by", lambda step: [])
    why = reason(Assigning())
    assert why is not None
    assert why.startswith("a call of it leaves something in middle.last")


def test_a_layer_under_settings_of_the_whole_process_is_found() -> None:
    class Attending(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]

    why = reason(Attending(), whole=False)
    assert why is not None
    assert "attention" in why


def test_as_many_requests_run_at_once_as_use_each_core_once() -> None:
    assert default_concurrency() >= 1
    registry = ModelRegistry(profiler=None, concurrency=3)
    assert registry.add("net", nn.Linear(8, 2).eval(), X).worker.concurrency == 3
    whole = registry.add("whole", Net(Assigning()).eval(), X, leaf_modules=["middle"])
    assert whole.worker.concurrency == 1
    registry.close()


@pytest.fixture
def meeting() -> Iterator[Callable[[int], None]]:
    def gather(count: int) -> None:
        MEETING.append(threading.Barrier(count))

    yield gather
    MEETING.clear()


@pytest.mark.parametrize("direct", [True, False])
def test_requests_of_one_model_run_at_once(meeting: Callable[[int], None], direct: bool) -> None:
    with serving(Meeting().eval(), X, concurrency=2, profiler=None) as server, HttpTransport(server.url, 30) as way:
        meeting(2)
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(way.infer, "net", {"x": X * i}, max_answer_bytes=1000) for i in (1, 2)]
            answers = [one.result(30).tensors["output"] for one in asked]
        model = server.app.registry.get("net").graph.model
        MEETING.clear()
        with torch.no_grad():
            assert all(torch.equal(answer, model(X * i)) for i, answer in zip((1, 2), answers, strict=True))


def test_every_answer_has_its_own_bits_while_many_run_at_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(2304, 7),
    )
    with serving(model.eval(), torch.rand(1, 3, 16, 16), concurrency=4, profiler=None) as server:
        graph = server.app.registry.get("net").graph
        points = graph.points[:-1]

        def ask(seed: int) -> bool:
            x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            point = points[seed % len(points)]
            with torch.no_grad(), HttpTransport(server.url, 30) as way:
                boundary = cut(graph, point).head(x)
                sent = dict(zip([spec.name for spec in point.tensors], boundary, strict=True))
                answers = [way.infer("net", sent, max_answer_bytes=1000).tensors["output"] for _ in range(5)]
                return all(torch.equal(one, model(x)) for one in answers)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(40)))


def test_what_measures_runs_alone() -> None:
    worker = Worker("test", 3)
    running = overlapped = 0
    lock = threading.Lock()

    def job() -> None:
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.002)
        with lock:
            running -= 1

    def measure() -> None:
        nonlocal overlapped
        for _ in range(5):
            overlapped += running
            time.sleep(0.002)

    jobs = [worker.submit(job) for _ in range(30)]
    alone = [worker.submit_alone(measure) for _ in range(3)]
    jobs += [worker.submit(job) for _ in range(30)]
    cancelled = worker.submit_alone(measure)
    cancelled.cancel()
    for one in (*jobs, *alone, worker.submit(job)):
        one.result(20)
    assert overlapped == 0
    assert worker._slow == 0
    worker.close()


def test_a_measurement_that_has_begun_waits_for_what_runs_and_not_for_what_waits() -> None:
    worker, ran = Worker("test", 3), list[str]()
    busy, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        busy.wait(60)

    running = worker.submit(wait)
    assert begun.wait(20)
    measuring = worker.submit_alone(lambda: ran.append("measured"))
    wait_for(lambda: len(worker._waiting) == 0)
    urgent = [worker.submit(lambda: ran.append("urgent"), place=Place("urgent", 0)) for _ in range(20)]
    busy.set()
    for one in (running, measuring, *urgent):
        one.result(20)
    assert ran == ["measured"] + ["urgent"] * 20
    worker.close()


def test_measurements_that_wait_when_a_worker_is_closed_are_made() -> None:
    for _ in range(20):
        worker = Worker("test", 3)
        measuring = [worker.submit_alone(lambda: "measured") for _ in range(3)]
        jobs = [worker.submit(lambda: "ran", place=Place("urgent", 0)) for _ in range(3)]
        worker.close()
        assert [one.result(20) for one in measuring] == ["measured"] * 3
        assert [one.result(20) for one in jobs] == ["ran"] * 3
        for thread in worker._threads:
            thread.join(20)
            assert not thread.is_alive()


def test_a_measurement_that_fails_tells_why_and_stops_nobody() -> None:
    worker = Worker("test", 2)

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        worker.submit_alone(fail).result(20)
    assert worker.submit(lambda: 3).result(20) == 3
    with torch.no_grad():
        end_s = time.monotonic() + 20
        while worker.now(lambda: 4) != 4:
            assert time.monotonic() < end_s
    worker.close()
