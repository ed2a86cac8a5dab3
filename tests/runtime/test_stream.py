"""Streams of inferences: in order, overlapping, never more than asked for, and stopped cleanly."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from typing import Any

import pytest
import torch
from bundles import flat_profile
from paths import environment
from serving import serving
from torch import fx, nn
from transports import Between
from tries import least_of

import torchsurgeon as ts
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport

SOON_S = 20.0
"""Longer than anything here takes unless it never comes."""


class Watch:
    """Sees the head and the tail of each inference, by the number it is given, and can hold them up."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.heads: list[int] = []
        self.tails: list[int] = []
        self.before_head: Callable[[int], object] = lambda number: None
        self.before_tail: Callable[[int], object] = lambda number: None


watch = Watch()
# The attributes that a model's code names may not change once it is traced; a name in a text is not seen.
now = operator.attrgetter


def head_of(x: torch.Tensor) -> torch.Tensor:
    number = int(x[0, 0])
    with watch.lock:
        watch.heads.append(number)
    now("before_head")(watch)(number)
    return x * 1


def tail_of(x: torch.Tensor) -> torch.Tensor:
    number = int(x[0, 0])
    with watch.lock:
        watch.tails.append(number)
    now("before_tail")(watch)(number)
    return x + 1


fx.wrap("head_of")
fx.wrap("tail_of")


class Net(nn.Module):
    """One layer for the head, one for the tail, and one number that goes through both."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Identity()

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = tail_of(self.middle(head_of(x)))
        return y if scale is None else y * scale


def frame(number: int) -> torch.Tensor:
    return torch.full((1, 4), float(number))


def frames(count: int) -> list[torch.Tensor]:
    return [frame(number) for number in range(count)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Net().eval(), frame(0)) as running:
        yield running


@pytest.fixture(autouse=True)
def _nobody_watches() -> Iterator[None]:
    yield
    watch.before_head = watch.before_tail = lambda number: None


def watched(split: ts.SplitModule) -> ts.SplitModule:
    """The module once its first call is over, with nothing seen yet."""
    split(frame(0))
    watch.heads.clear()
    watch.tails.clear()
    return split


def split_of(server: Server, **options: Any) -> ts.SplitModule:
    return ts.SplitModule(
        Net().eval(), frame(0), server=server.url, name="net", **{"partition": "middle", "fallback": "error", **options}
    )


def numbers(answers: Any) -> list[int]:
    return [int(answer[0, 0]) - 1 for answer in answers]


def of_streams() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(("torchsurgeon-heads", "torchsurgeon-answers"))]


# --- map ---


@pytest.mark.parametrize("fallback", ["local", "error"])
@pytest.mark.parametrize("partition", ["server", "middle", "device"])
@pytest.mark.parametrize("depth", [1, 2, 4, 16])
def test_answers_come_in_order_and_are_the_models_own(
    server: Server, depth: int, partition: str, fallback: str
) -> None:
    given = [torch.rand(1 + number % 3, 4) for number in range(20)]
    model = Net().eval()
    with split_of(server, partition=partition, fallback=fallback) as split:
        for x, answer in zip(given, split.map(given, depth=depth), strict=True):
            assert torch.equal(answer, model(x))


def test_calls_are_given_as_the_example_is(server: Server) -> None:
    scale = torch.tensor(3.0)
    given = [(frame(1), scale), {"x": frame(2), "scale": scale}]
    with (
        serving(Net().eval(), (frame(0), scale)) as other,
        ts.SplitModule(Net().eval(), (frame(0), scale), server=other.url, name="net", partition="middle") as split,
    ):
        assert [float(answer[0, 0]) for answer in split.map(given)] == [6.0, 9.0]


def test_a_head_runs_while_the_tail_before_it_does(server: Server) -> None:
    next_head = threading.Event()

    def before_head(number: int) -> None:
        if number == 1:
            next_head.set()

    met: list[bool] = []

    def before_tail(number: int) -> None:
        if number == 0:
            met.append(next_head.wait(SOON_S))

    with watched(split_of(server)) as split:
        watch.before_head, watch.before_tail = before_head, before_tail
        assert numbers(split.map(frames(3), depth=2)) == [0, 1, 2]
    assert met == [True]


def test_heads_run_one_at_a_time_in_order(server: Server) -> None:
    inside = threading.Semaphore(1)

    def before_head(number: int) -> None:
        assert inside.acquire(blocking=False)
        time.sleep(0.002)
        inside.release()

    with watched(split_of(server)) as split:
        watch.before_head = before_head
        assert numbers(split.map(frames(12), depth=6)) == list(range(12))
    assert watch.heads == list(range(12))


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_are_taken_than_may_be_in_flight(server: Server, depth: int) -> None:
    taken = 0

    def source() -> Iterator[torch.Tensor]:
        nonlocal taken
        for x in frames(12):
            taken += 1
            yield x

    with split_of(server) as split:
        answers = split.map(source(), depth=depth)
        assert taken == 0, "nothing is taken before the first answer is asked for"
        for given, _ in enumerate(answers):
            assert taken - given <= depth
        assert taken == 12


def test_an_endless_source_is_no_trouble(server: Server) -> None:
    def source() -> Iterator[torch.Tensor]:
        number = 0
        while True:
            yield frame(number)
            number += 1

    with split_of(server) as split:
        answers = split.map(source())
        assert numbers(next(answers) for _ in range(10)) == list(range(10))
        answers.close()  # type: ignore[attr-defined]
        assert not of_streams()


def test_what_the_source_raises_comes_after_the_answers_before_it(server: Server) -> None:
    def source() -> Iterator[torch.Tensor]:
        yield from frames(3)
        raise LookupError("the camera was unplugged")

    with split_of(server) as split:
        answers = split.map(source())
        assert numbers(next(answers) for _ in range(3)) == [0, 1, 2]
        with pytest.raises(LookupError, match="unplugged"):
            next(answers)
        assert not of_streams()
        assert numbers(split.map(frames(2))) == [0, 1], "the module is none the worse"


@pytest.mark.parametrize("partition", ["server", "middle", "device"])
def test_a_camera_may_fill_the_same_buffer_again(server: Server, partition: str) -> None:
    buffer = torch.empty(1, 4)
    with split_of(server, partition=partition) as split:
        assert numbers(split.map((buffer.fill_(number) for number in range(20)), depth=4)) == [*range(20)]
        futures = [split.submit(buffer.fill_(number)) for number in range(20)]
        assert numbers(future.result(SOON_S) for future in futures) == [*range(20)]


def test_a_tensor_is_no_list_of_calls(server: Server) -> None:
    with split_of(server) as split:
        for calls in (torch.rand(3, 4), {"x": frame(1)}):
            with pytest.raises(TypeError, match="iterable of calls"):
                split.map(calls)


def test_a_call_that_the_model_refuses_comes_after_the_answers_before_it(server: Server) -> None:
    def before_head(number: int) -> None:
        if number == 2:
            raise ZeroDivisionError("frame 2 is black")

    with watched(split_of(server)) as split:
        watch.before_head = before_head
        answers = split.map(frames(9))
        assert numbers(next(answers) for _ in range(2)) == [0, 1]
        with pytest.raises(ZeroDivisionError, match="frame 2"):
            next(answers)
        assert not of_streams()


def test_closing_early_leaves_no_thread_and_begins_nothing_more(server: Server) -> None:
    with watched(split_of(server)) as split:
        answers = split.map(frames(50), depth=3)
        assert numbers([next(answers)]) == [0]
        answers.close()  # type: ignore[attr-defined]
        assert not of_streams()
        begun = len(watch.heads)
        assert begun <= 4
        assert numbers([split(frame(7))]) == [7]
        assert len(watch.heads) == begun + 1


def test_closing_early_does_not_wait_for_a_server_that_does_not_answer(server: Server) -> None:
    stuck, go = threading.Event(), threading.Event()

    def before_tail(number: int) -> None:
        if number == 1:
            stuck.set()
            go.wait(SOON_S)

    try:
        with watched(split_of(server, timeout_s=60.0)) as split:
            watch.before_tail = before_tail
            answers = split.map(frames(50), depth=2)
            assert numbers([next(answers)]) == [0]
            assert stuck.wait(SOON_S)
            answers.close()  # type: ignore[attr-defined]
            assert not of_streams()
            assert not go.is_set()
    finally:
        go.set()


def test_an_iterator_that_is_dropped_ends_its_threads(server: Server) -> None:
    with split_of(server) as split:
        answers = split.map(frames(50))
        next(answers)
        del answers
        gc.collect()
        assert not of_streams()


@pytest.mark.parametrize("depth", [0, -1, 17, 2.0, None])
def test_a_depth_that_cannot_be_is_refused_at_once(server: Server, depth: Any) -> None:
    with split_of(server) as split, pytest.raises(ts.AdaptError, match="1 to 16"):
        split.map(frames(2), depth=depth)


# --- submit ---


def test_submitted_calls_are_answered_each_by_its_own_future(server: Server) -> None:
    with split_of(server) as split:
        futures = [split.submit(x) for x in frames(40)]
        assert numbers(future.result(SOON_S) for future in futures) == list(range(40))


def test_a_future_can_be_cancelled_until_its_head_begins(server: Server) -> None:
    begun, go = threading.Event(), threading.Event()

    def before_head(number: int) -> None:
        if number == 0:
            begun.set()
            assert go.wait(SOON_S)

    with watched(split_of(server)) as split:
        watch.before_head = before_head
        running, waiting, last = (split.submit(frame(number)) for number in range(3))
        assert begun.wait(SOON_S)
        assert not running.cancel()
        assert waiting.cancel()
        go.set()
        assert numbers([running.result(SOON_S), last.result(SOON_S)]) == [0, 2]
        assert watch.heads == [0, 2]
        with pytest.raises(CancelledError):
            waiting.result()


def test_closing_ends_every_future(server: Server) -> None:
    begun = threading.Event()

    def before_tail(number: int) -> None:
        begun.set()
        time.sleep(0.05)

    split = watched(split_of(server))
    watch.before_tail = before_tail
    futures: list[Future[Any]] = [split.submit(x) for x in frames(30)]
    assert begun.wait(SOON_S)
    split.close()
    done, left = wait(futures, SOON_S)
    assert not left
    assert any(future.cancelled() for future in done)
    for future in done:
        if not future.cancelled() and future.exception() is None:
            assert numbers([future.result()]) == [futures.index(future)]
    assert not of_streams()


def test_after_closing_every_way_to_call_says_so(server: Server) -> None:
    split = split_of(server)
    split.submit(frame(1)).result(SOON_S)
    split.close()
    with pytest.raises(ts.ServerUnavailableError, match="closed"):
        split.submit(frame(1))
    with pytest.raises(ts.ServerUnavailableError, match="closed"):
        split.map(frames(1))
    with pytest.raises(ts.ServerUnavailableError, match="closed"):
        asyncio.run(split.acall(frame(1)))


def test_closing_in_the_middle_of_map_ends_it(server: Server) -> None:
    split = split_of(server)
    answers = split.map(frames(100), depth=2)
    next(answers)
    split.close()
    with pytest.raises(ts.ServerUnavailableError):
        list(answers)
    assert not of_streams()


def test_closing_in_a_head_or_in_what_a_future_calls_is_as_quick_as_elsewhere(server: Server) -> None:
    for name in ("head", "callback"):
        split, closed = watched(split_of(server)), threading.Event()

        def close(_: object, split: ts.SplitModule = split, closed: threading.Event = closed) -> None:
            split.close()
            closed.set()

        if name == "head":
            watch.before_head = close
            future = split.submit(frame(1))
        else:
            future = split.submit(torch.ones(3))  # which the head refuses
            future.add_done_callback(close)
        assert closed.wait(SOON_S)
        assert future.exception(SOON_S) is not None
        watch.before_head = lambda number: None


@pytest.mark.parametrize("way", ["submit", "map"])
def test_closing_does_not_wait_for_what_a_backend_runs(way: str) -> None:
    second, over = threading.Event(), threading.Event()
    waited_out: list[bool] = []

    def backend(part: nn.Module) -> Callable[..., Any]:
        def run(x: torch.Tensor) -> Any:
            if int(x[0, 0]) == 1:
                second.set()
                waited_out.append(not over.wait(SOON_S))
            return part(x)

        return run

    try:
        with ts.SplitModule(Net().eval(), frame(0), partition="device", backend=backend) as split:
            if way == "submit":
                future = split.submit(frame(1))
                assert second.wait(SOON_S)
                split.close()
                with pytest.raises(ts.ServerUnavailableError, match="this call has not ended"):
                    future.result(0)
            else:
                answers = split.map(frames(2), depth=2)
                next(answers)
                assert second.wait(SOON_S)
                answers.close()  # type: ignore[attr-defined]
        assert not waited_out
    finally:
        over.set()


def test_a_program_may_end_while_a_backend_still_runs_what_was_not_waited_for() -> None:
    program = """
import time, torch, torchsurgeon as ts
from torch import nn
def backend(part):
    def run(x):
        begun.set()
        time.sleep(1.0)
        return part(x)
    return run
import threading
begun = threading.Event()
split = ts.SplitModule(nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(1, 2), partition="device", backend=backend)
split.submit(torch.ones(1, 2))
begun.wait()
split.close()
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_fork_in_the_middle_of_map_can_neither_go_on_nor_hang(server: Server) -> None:
    with split_of(server) as split:
        answers = split.map(frames(20), depth=2)
        next(answers)
        child = os.fork()
        if not child:
            status = 1
            try:
                signal.alarm(int(SOON_S))
                with suppress(ts.ServerUnavailableError):
                    next(answers)
                    os._exit(2)
                status = 0 if numbers(split.map(frames(3))) == [0, 1, 2] else 3
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert numbers(answers) == list(range(1, 20))


def test_autocast_of_the_caller_is_that_of_the_answer(server: Server) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    x = torch.rand(2, 64)
    with ts.SplitModule(model, x, partition="device") as split, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            own, answer = model(x), split.submit(x).result(SOON_S)
        assert answer.dtype == own.dtype == torch.bfloat16
        assert torch.equal(answer, own)
        assert split.submit(x).result(SOON_S).dtype == torch.float32


# --- asyncio ---


def test_awaiting_does_not_block_the_loop(server: Server) -> None:
    go = threading.Event()

    def before_tail(number: int) -> None:
        if number == 1:
            assert go.wait(SOON_S)

    async def main(split: ts.SplitModule) -> list[int]:
        task = asyncio.create_task(split.acall(frame(1)))
        while not watch.tails:
            await asyncio.sleep(0.001)
        go.set()  # from the loop, which an await that blocked would never reach
        return numbers([await task, *await asyncio.gather(*map(split.acall, frames(5)))])

    with watched(split_of(server)) as split:
        watch.before_tail = before_tail
        assert asyncio.run(main(split)) == [1, 0, 1, 2, 3, 4]


def test_a_cancelled_task_never_begins(server: Server) -> None:
    begun, go = threading.Event(), threading.Event()

    def before_head(number: int) -> None:
        if number == 0:
            begun.set()
            assert go.wait(SOON_S)

    async def main(split: ts.SplitModule) -> None:
        first, second = (asyncio.create_task(split.acall(frame(number))) for number in range(2))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        assert numbers([await first]) == [0]

    with watched(split_of(server)) as split:
        watch.before_head = before_head
        asyncio.run(main(split))
    assert watch.heads == [0]


# --- what the runtime promises holds for each ---


def test_a_server_that_dies_in_the_middle_loses_no_answer() -> None:
    degraded = []
    with serving(Net().eval(), frame(0)) as server, split_of(server, fallback="local") as split:
        answers = split.map(frames(40), depth=4)
        got = [next(answers) for _ in range(10)]
        server.stop()
        for answer in answers:
            got.append(answer)
            assert split.last is not None
            degraded.append(split.last.degraded)
        assert numbers(got) == list(range(40))
        assert any(degraded)


def test_a_slow_uplink_shared_by_many_is_no_reason_to_give_up(server: Server) -> None:
    x = torch.rand(1, 64_000)
    model = nn.Sequential(nn.Identity(), nn.ReLU()).eval()
    with (
        serving(model, x, name="wide") as other,
        LinkEmulator(0, "127.0.0.1", other.port, ts.Link("slow", 2e7, 1e8, 0.002)) as link,
        ts.SplitModule(
            model, x, server=f"http://127.0.0.1:{link.port}", name="wide", partition="server", answer_codec="zstd"
        ) as split,
    ):
        for _ in range(3):
            split(x)

        def given_up() -> int:
            degraded = []
            for answer in split.map([x] * 24, depth=8):
                assert torch.equal(answer, model(x))
                assert split.last is not None
                degraded.append(split.last.degraded)
            return 24 - degraded.count(None)

        assert least_of(given_up, enough=4) <= 4
        known = split.stats()["servers"][0]["uplink_bit_s"]
        assert 1e7 < known < 4e7, "the link's rate, and not what one of eight requests gets of it"


def test_a_stream_is_cut_for_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, all on the server for latency, since it is twice as fast; for the rate the first of them on the
    device, which otherwise waits."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = torch.rand(1, 8)
    graph = ts.trace(model, x)
    with serving(model, x) as other, HttpTransport(other.url) as inner:
        between = Between(inner)
        # Both take what their profiles say, or they would be found out to be far quicker.
        monkeypatch.setattr("torchsurgeon.runtime.device.DeviceTimes.record_duration", lambda *_: None)
        between.told = {"compute_s": 0.010}
        slow = ts.Link("given", 1e9, 1e9, 1e-4)
        with ts.SplitModule(
            model,
            x,
            server=between,
            name="net",
            link=slow,
            device_profile=flat_profile(graph, 0.020 / 3),
            server_profile=flat_profile(graph, 0.010 / 3),
        ) as split:
            split(x)
            assert split.decisions[-1].row.index == 0
            between.told = {"compute_s": 0.010 * 2 / 3}
            assert all(torch.equal(answer, model(x)) for answer in split.map([x]))
            assert split.decisions[-1].row.index == 1
            split(x)
            assert split.decisions[-1].row.index == 0, "single calls have a history of their own"
            assert all(torch.equal(answer, model(x)) for answer in split.map([x], depth=1))
            assert split.decisions[-1].row.index == 0, "with one in flight, the rate is that of single calls"


def test_a_streams_answers_belong_to_the_context_that_asked(server: Server) -> None:
    """As spans do, whose parents are found there."""
    asked: contextvars.ContextVar[str] = contextvars.ContextVar("asked", default="nobody")
    seen: list[str] = []
    with watched(split_of(server)) as split:
        watch.before_head = lambda number: seen.append(asked.get())
        asked.set("this test")
        assert numbers(split.map(frames(2))) == [0, 1]
    assert seen == ["this test"] * 2
