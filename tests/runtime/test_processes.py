"""A split model in programs of several processes, and in one that opens and closes split models all day long."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, PATIENCE_S, right, split_of, truth, until
from serving import serving
from torch import nn
from torch.utils.data import DataLoader
from transports import Held
from tries import least_of
from workers import Answers

import torchsurgeon as ts
from torchsurgeon import _interrupts
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport

# A child process that hangs is ended after this time, which is far longer than it needs.
_HANGS_S = round(PATIENCE_S)


def in_fork(work: Callable[[], bool]) -> bool:
    """Whether ``work`` returns True in a forked process, instead of hanging or raising there."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(_HANGS_S)
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def right_in_every_way(split: ts.SplitModule) -> bool:
    """Whether calls, futures and streams give the model's own answers."""
    inputs = [torch.full((1, 3, 32, 32), float(number)) for number in range(4)]
    expected = [truth(x) for x in inputs]
    given = [[split(x) for x in inputs], [split.submit(x).result() for x in inputs], list(split.map(inputs))]
    return all(torch.equal(a, b) for answers in given for a, b in zip(answers, expected, strict=True))


# --- fork ---


@pytest.fixture
def held(server: Server) -> Iterator[Held]:
    with Held(HttpTransport(server.url)) as transport:
        yield transport
        transport.go.set()


@pytest.mark.parametrize("way", ["call", "submit", "map"])
def test_a_fork_while_another_threads_request_is_on_its_way(held: Held, way: str) -> None:
    calls: dict[str, Callable[[ts.SplitModule], Any]] = {
        "call": lambda split: split(EXAMPLE),
        "submit": lambda split: split.submit(EXAMPLE).result(),
        "map": lambda split: next(split.map([EXAMPLE])),
    }

    def in_child() -> bool:
        held.go.set()
        return right_in_every_way(split) and split.last is not None and split.last.server is not None

    with split_of(held, partition=2, fallback="error", codec="auto") as split, ThreadPoolExecutor(1) as pool:
        assert right_in_every_way(split)
        held.hold()
        answer = pool.submit(calls[way], split)
        assert held.begun.wait(PATIENCE_S)
        assert in_fork(in_child)
        held.go.set()
        assert torch.equal(answer.result(PATIENCE_S), truth(EXAMPLE))
        assert right_in_every_way(split)


def test_a_fork_while_another_thread_is_in_the_head(server: Server) -> None:
    begun, go, parent = threading.Event(), threading.Event(), os.getpid()
    go.set()

    def backend(module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun.set()
            assert os.getpid() != parent or go.wait(PATIENCE_S)
            return module(*args, **kwargs)

        return run

    with (
        split_of(server, partition=2, backend=backend, fallback="error") as split,
        ThreadPoolExecutor(1) as pool,
    ):
        assert right(split)
        begun.clear()
        go.clear()
        answer = pool.submit(right, split)
        assert begun.wait(PATIENCE_S)
        assert in_fork(lambda: right_in_every_way(split))
        go.set()
        assert answer.result(PATIENCE_S)


def test_a_fork_while_another_thread_shakes_hands(server: Server) -> None:
    class Slow(Held):
        def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
            self.begun.set()
            assert self.go.wait(PATIENCE_S)
            return super().get_json(path, timeout_s=timeout_s)

    with Slow(HttpTransport(server.url)) as slow, split_of(slow, partition=2) as split:
        slow.hold()
        preparing = threading.Thread(target=split.prepare)
        preparing.start()
        assert slow.begun.wait(PATIENCE_S)

        def in_child() -> bool:
            slow.go.set()
            return right_in_every_way(split)

        assert in_fork(in_child)
        slow.go.set()
        preparing.join()
        assert right(split)


class Once:
    """Holds up whoever calls it first, in the process that made it, until ``go`` is set; then calls ``function``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.process = function, os.getpid()
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if os.getpid() == self.process and not self.begun.is_set():
            self.begun.set()
            assert self.go.wait(PATIENCE_S)
        return self.function(*args, **kwargs)


def held_up(monkeypatch: pytest.MonkeyPatch, where: str) -> Once:
    """Hold up whoever first calls a function of the package; ``where`` is its module and name."""
    room, _, name = f"torchsurgeon.{where}".rpartition(".")
    once = Once(getattr(importlib.import_module(room), name))
    monkeypatch.setattr(f"{room}.{name}", once)
    return once


@pytest.mark.parametrize(
    ("where", "partition"),
    [("runtime.lossless._Cut", 2), ("tracing.graph.Configuration", "auto"), ("planning.frontier.lower_hull", "auto")],
)
def test_a_fork_while_another_thread_computes_what_is_computed_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, where: str, partition: Any
) -> None:
    once = held_up(monkeypatch, where)
    options: dict[str, Any] = {"codec": "auto", "partition": partition}
    with split_of(server, **options) as split, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(right, split)
        try:
            assert once.begun.wait(PATIENCE_S)

            def in_child() -> bool:
                with split_of(server, **options) as another:
                    for one in (split, another):
                        until(lambda one=one: one.stats()["servers"][0]["usable"], one)  # type: ignore[misc]
                    return right_in_every_way(split) and right_in_every_way(another)

            assert in_fork(in_child)
        finally:
            once.go.set()
        assert answer.result(PATIENCE_S)


def test_a_fork_while_another_thread_traces_a_model(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    once = held_up(monkeypatch, "tracing.recorder.settings")

    def in_child() -> bool:
        with split_of(server, partition=2, fallback="error") as split:
            return right_in_every_way(split)

    with ThreadPoolExecutor(1) as pool:
        graph = pool.submit(ts.trace, nn.ReLU().eval(), EXAMPLE)
        assert once.begun.wait(PATIENCE_S)
        # The fork waits until nobody traces.
        timer = threading.Timer(0.1, once.go.set)
        timer.start()
        assert in_fork(in_child)
        timer.join()
        assert graph.result(PATIENCE_S).layers


# --- workers ---

_MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
_INPUTS = torch.rand(6, 3, 8, 8)


@pytest.fixture(scope="module")
def small_server() -> Iterator[Server]:
    with serving(_MODEL, _INPUTS[:1]) as running:
        yield running


def answered_by(server: Server, batches: Any) -> bool:
    """Whether each batch of two is the model's own answer, and came from the server."""
    pairs = list(zip(batches, _INPUTS.split(2), strict=True))
    return all(torch.equal(answer, truth(x, _MODEL)) and where == server.url for (answer, where), x in pairs)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_split_the_model_themselves(small_server: Server, start: str) -> None:
    collate = Answers(_MODEL, _INPUTS[:1], server=small_server.url, name="net", partition=1, fallback="error")
    loader = DataLoader(
        _INPUTS,  # type: ignore[arg-type]
        batch_size=2,
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context=start,
    )
    assert answered_by(small_server, loader)


def test_forked_workers_of_a_data_loader_use_the_split_that_there_is(small_server: Server) -> None:
    options: dict[str, Any] = {"name": "net", "partition": 1, "fallback": "error"}
    with ts.SplitModule(_MODEL, _INPUTS[:1], server=small_server.url, **options) as split:
        split(_INPUTS[:1])

        def collate(samples: list[torch.Tensor]) -> tuple[torch.Tensor, str | None]:
            answer = split(torch.stack(samples))
            assert split.last is not None
            return answer, split.last.server

        def loader(workers: int) -> DataLoader[torch.Tensor]:
            start = "fork" if workers else None
            return DataLoader(
                _INPUTS,  # type: ignore[arg-type]
                batch_size=2,
                num_workers=workers,
                collate_fn=collate,
                multiprocessing_context=start,
            )

        assert answered_by(small_server, loader(2))
        assert answered_by(small_server, loader(0))


# PyTorch warns of what cannot be pickled before it hands on the error.
@pytest.mark.filterwarnings("ignore:Got pickle error when attempting to start a worker Process:UserWarning")
def test_a_split_that_is_sent_to_a_spawned_worker_is_refused_with_what_to_do_instead() -> None:
    with ts.SplitModule(_MODEL, _INPUTS[:1], partition="device") as split:
        loader = DataLoader(
            _INPUTS,  # type: ignore[arg-type]
            num_workers=1,
            collate_fn=split,
            multiprocessing_context="spawn",
        )
        with pytest.raises(TypeError, match=r"\.model"):
            next(iter(loader))


def answers_of_a_child(url: str, answers: Queue[Any]) -> None:
    with ts.SplitModule(_MODEL, _INPUTS[:1], server=url, name="net", partition=1, fallback="error") as split:
        answers.put([split(x).tolist() for x in _INPUTS.split(1)])


def test_a_child_process_makes_a_split_of_its_own(small_server: Server) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=answers_of_a_child, args=(small_server.url, answers))
    child.start()
    assert answers.get(timeout=PATIENCE_S) == [truth(x, _MODEL).tolist() for x in _INPUTS.split(1)]
    child.join()
    assert child.exitcode == 0


# --- opening and closing ---

# What leaks at each of a thousand cycles leaks at each of these, too.
_CYCLES = 20
_LOOKS, _BETWEEN_LOOKS_S = 10, 0.1


def test_split_models_that_come_and_go_leave_nothing_behind(server: Server) -> None:
    def cycle(number: int) -> None:
        split = split_of(server, partition=2)
        assert right(split)
        if number % 3 == 1:
            assert torch.equal(split.submit(EXAMPLE).result(), truth(EXAMPLE))
            assert len(list(split.map([EXAMPLE] * 2))) == 2
        if number % 3:
            split.close()

    def kept_now() -> int:
        # Threads that have ended are kept until others start: 64 of them and more, each with a dozen objects.
        _interrupts._ended.clear()
        gc.collect()
        return len(gc.get_objects()) + threading.active_count() + len(os.listdir("/proc/self/fd"))

    def kept() -> int:
        # The last split's threads end, and the server compares its weights, a little while after the call returns.
        counts = []
        for _ in range(_LOOKS):
            counts.append(kept_now())
            time.sleep(_BETWEEN_LOOKS_S)
        return min(counts)

    def growth() -> int:
        before = kept()
        for number in range(_CYCLES):
            cycle(number)
        return kept() - before

    gc.collect()
    # So that what other tests have left is not looked through, which takes a second each time.
    gc.freeze()
    try:
        growth()
        # What other code keeps once, it keeps in one try; a cycle that leaves something behind shows in each.
        assert least_of(growth, enough=_CYCLES // 2) <= _CYCLES // 2
    finally:
        gc.unfreeze()
