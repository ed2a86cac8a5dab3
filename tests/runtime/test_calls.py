"""The cut follows link, load and device; deadlines are kept; threads and connections end."""

from __future__ import annotations

import gc
import itertools
import math
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, GRAPH, LAYERS, PATIENCE_S, degraded, net, profile, remote, right, split_of, until
from known_machines import FAST, SLOW, device
from serving import serving
from torch import nn
from transports import Between, Held, Relay, Silent
from waiting import wait_for

import torchsurgeon as ts
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.planning import Battery
from torchsurgeon.runtime import ModelCall, servers
from torchsurgeon.runtime import device as device_module
from torchsurgeon.runtime import engine as engine_module
from torchsurgeon.runtime import pending as pending_module
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.device import settle
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.pool import Task
from torchsurgeon.runtime.waiting import Waiting
from torchsurgeon.serve import Server
from torchsurgeon.transport import Answer, HttpTransport
from torchsurgeon.transport.base import Timing
from torchsurgeon.transport.deadline import Deadline

# --- answering ---


class Catching(nn.Module):
    """Answers in another way where an operator raises an error for the values that it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        try:
            y = torch.linalg.cholesky(y)
        except torch.linalg.LinAlgError:
            y = y - 1.0
        return torch.relu(y)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("partition", [1, 2])
def test_a_model_that_catches_what_a_layer_raises_answers_itself(partition: int) -> None:
    model, example = Catching().eval(), torch.eye(3)
    with serving(model, example, name="catching") as running:
        options: dict[str, Any] = {"server": running.url, "name": "catching", "partition": partition}
        with ts.SplitModule(model, example, **options) as split:
            assert torch.equal(split(example), model(example))
            assert split.last is not None
            assert split.last.degraded is None
            assert torch.equal(split(-example), model(-example))
            assert "unlike: a part of the model raised" in str(split.last.degraded)
            assert torch.equal(split(example), model(example))
        with ts.SplitModule(model, example, fallback="error", **options) as split:
            assert torch.equal(split(example), model(example))
            with pytest.raises((torch.linalg.LinAlgError, ts.ServerError)):
                split(-example)


class Choosy(nn.Module):
    """Takes another way for large inputs, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = self.first(x)
        return self.second(y) * scale if x.shape[-1] < 64 else y


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("partition", ["server", 1])
def test_a_call_that_the_trace_does_not_hold_for_is_answered_here(partition: Any) -> None:
    torch.manual_seed(0)
    model = Choosy().eval()
    unlike: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((torch.rand(1, 3, 80, 80),), {}),
        ((EXAMPLE,), {"scale": 2.0}),
    ]
    with serving(model, EXAMPLE, name="choosy") as running:
        options: dict[str, Any] = {"server": running.url, "name": "choosy", "partition": partition}
        with ts.SplitModule(model, EXAMPLE, **options) as split:
            for args, kwargs in unlike:
                with torch.no_grad():
                    assert torch.equal(split(*args, **kwargs), model(*args, **kwargs))
                assert split.last is not None
                assert str(split.last.degraded).startswith("unlike: ")
            split(EXAMPLE)
            assert split.last.degraded is None
            with pytest.raises(RuntimeError, match="channels"):
                split(torch.rand(1, 5, 32, 32))
        with ts.SplitModule(model, EXAMPLE, fallback="error", **options) as split, pytest.raises(TypeError):
            split(EXAMPLE, scale=2.0)


@pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")
@pytest.mark.parametrize("partition", ["auto", 2])
def test_a_module_that_is_moved_still_answers(server: Server, known: dict[str, Any], partition: Any) -> None:
    with split_of(server.url, partition=partition, **known) as split:
        assert right(split)
        split.double()
        with torch.no_grad():
            expected = net().double()(EXAMPLE.double())
        for _ in range(3):
            assert torch.equal(split(EXAMPLE.double()), expected)
            assert split.last is not None
            assert split.last.server is None, "its model is not this one"
        split.float()
        assert right(split)


@pytest.mark.parametrize("partition", ["auto", 2])
@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_a_module_that_is_moved_to_another_dtype_before_its_first_call_answers(
    server: Server, partition: Any, dtype: torch.dtype
) -> None:
    model, x = net().to(dtype), EXAMPLE.to(dtype)
    with split_of(server, partition=partition) as split:
        split.to(dtype).prepare()
        for _ in range(3):
            assert right(split, x, model)
            assert split.last is not None
            assert str(split.last.degraded).startswith("unserved: no server is in use: unlike: argument 'x'")
        split.float()
        split.model.load_state_dict(net().state_dict())
        until(lambda: split.last is not None and split.last.degraded is None, split)


# --- adapting ---


def test_the_cut_follows_the_link_and_comes_back(server: Server, known: dict[str, Any]) -> None:
    changes: list[Any] = []
    with (
        LinkEmulator(0, "127.0.0.1", server.port, FAST) as emulator,
        split_of(f"http://127.0.0.1:{emulator.port}", on_replan=changes.append, backend=device, **known) as split,
    ):
        until(lambda: split.partition is not None and split.partition.index == 0, split)
        emulator.set_link(SLOW)
        until(lambda: split.last is not None and split.partition == split.graph.points[-1], split)
        assert changes
        assert changes[-1].row.on_device
        emulator.set_link(FAST)
        until(lambda: split.partition is not None and split.partition.index == 0, split)
        assert changes[-1].changed
        assert split.decisions[-1].row.index == 0
        assert split.stats()["pings"] > 0


def test_the_cut_follows_the_servers_load(server: Server, known: dict[str, Any]) -> None:
    with HttpTransport(server.url) as inner:
        between = Between(inner)
        with split_of(between, link=FAST, backend=device, **known) as split:
            until(lambda: split.partition is not None and split.partition.index == 0, split)
            between.told = {"queue_s": 2.0}
            until(lambda: split.partition == split.graph.points[-1], split)
            assert split.last is not None
            assert split.last.degraded is None
            between.told = {}
            until(lambda: split.partition is not None and split.partition.index == 0, split)


def test_a_fixed_cut_over_a_link_on_which_answers_take_long_is_waited_for_in_the_end(server: Server) -> None:
    slow = ts.Link("slow", 8 * EXAMPLE.nbytes / 1.3, 1e7, 0.01)
    with (
        LinkEmulator(0, "127.0.0.1", server.port, slow) as emulator,
        split_of(f"http://127.0.0.1:{emulator.port}", partition="server") as split,
    ):
        until(lambda: split.last is not None and split.last.degraded is None, split)
        assert split.last is not None
        assert split.last.total_s > 1.0
        # What was sent before, and given up, has been sent all the same.
        assert split.stats()["sent_bytes"] > EXAMPLE.nbytes


def test_decisions_are_kept_up_to_a_bound_and_say_what_they_rest_on(server: Server, known: dict[str, Any]) -> None:
    with split_of(server.url, link=FAST, backend=device, **known) as split:
        for _ in range(300):
            split(EXAMPLE)
        assert len(split.decisions) == 256
        decision = split.decisions[-1]
        assert decision.estimates.link.round_trip.value > 0
        assert split.last is not None
        assert split.last.decision is decision
        stats = split.stats()
        assert stats["inferences"] == sum(stats["rows"].values()) == 300
        assert stats["servers"][0]["breaker"] == "closed"
        assert stats["sent_bytes"] >= 300 * EXAMPLE.nbytes


def test_a_decision_stands_for_the_calls_that_follow_at_once(
    server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with split_of(server.url, link=FAST, backend=device, **known) as split:
        assert right(split)
        # As if every call of this test followed within two milliseconds.
        monkeypatch.setattr("torchsurgeon.runtime.choice._STANDS_S", 1e3)
        (peer,) = split._engine.servers.peers
        assert right(split)
        first = split.decisions[-1]
        assert right(split)
        assert split.last is not None
        assert split.last.decision is split.decisions[-1] is first
        assert right(split, torch.rand(2, 3, 32, 32)), "another size costs something else"
        larger = split.decisions[-1]
        assert larger is not first
        assert larger.estimates.scale == 2
        peer.doubted = True
        assert right(split, torch.rand(2, 3, 32, 32))
        assert split.decisions[-1] is not larger


@pytest.mark.parametrize(("batch", "here"), [(1, True), (64, False)])
def test_a_call_is_cut_where_its_own_size_says(server: Server, known: dict[str, Any], batch: int, here: bool) -> None:
    far = ts.Link("far", 1e9, 1e9, 0.3)
    with (
        LinkEmulator(0, "127.0.0.1", server.port, far) as emulator,
        split_of(f"http://127.0.0.1:{emulator.port}", link=far, **known) as split,
    ):
        assert right(split, torch.rand(batch, 3, 32, 32))
        decision = split.decisions[0]
        assert decision.row.on_device == here
        assert decision.estimates.scale == batch


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("fallback", ["local", "error"])
def test_another_cut_shakes_no_hands_again(server: Server, fallback: str) -> None:
    class Counting(Between):
        told_json = 0

        def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
            self.told_json += 1
            return super().get_json(path, timeout_s=timeout_s)

    with HttpTransport(server.url) as inner:
        counting = Counting(inner)
        with split_of(counting, partition=1, fallback=fallback) as split:
            assert right(split)
            before = counting.told_json
            for cut in (2, 0, 3):
                split.partition = cut
                assert right(split)
                assert split.last is not None
                assert split.last.sent_bytes
            assert counting.told_json == before


def test_each_server_is_reckoned_with_by_its_own_profile(server: Server, known: dict[str, Any]) -> None:
    class Told(Between):
        layer_s = 0.0

        def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
            if path.endswith("/profile"):
                return profile(self.layer_s).to_json()
            return super().get_json(path, timeout_s=timeout_s)

    with HttpTransport(server.url) as inner:
        slow, quick = Told(inner), Told(inner)
        slow.layer_s, quick.layer_s = 1.0, 1e-4
        with split_of([slow, quick], link=FAST, device_profile=known["device_profile"].scaled(1000.0)) as split:
            split.prepare()
            before = slow.asked, quick.asked
            for _ in range(5):
                assert right(split)
            assert slow.asked - before[0] <= 1  # a ping at most
            assert quick.asked - before[1] >= 5
            assert split.server_profile is not None
            assert split.server_profile.total_s == pytest.approx(1.0 * LAYERS)


def test_at_a_fixed_cut_the_quicker_of_two_servers_is_asked_and_the_other_once(server: Server) -> None:
    class Slow(Between):
        def infer(self, *args: Any, **options: Any) -> Any:
            time.sleep(0.3)
            return super().infer(*args, **options)

    with HttpTransport(server.url) as inner:
        slow, quick = Slow(inner), Between(inner)
        with split_of([slow, quick], partition="server") as split:
            for _ in range(8):
                assert right(split)
            assert slow.asked <= 2
            assert quick.asked >= 6


def test_at_a_fixed_cut_a_server_that_took_long_once_is_asked_again_the_later_the_slower_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen(seconds: float) -> SimpleNamespace:
        one = SimpleNamespace(asked_s=-1e9)
        one.expected_duration = lambda cut: SimpleNamespace(value=seconds)
        return one

    def pauses_s(times: float) -> list[float]:
        quick, slow = seen(0.2), seen(0.2 * times)
        choice, now_s = SimpleNamespace(_preferred=None), itertools.count(0.0, 5.0)
        monkeypatch.setattr(servers, "time", SimpleNamespace(monotonic=lambda: next(now_s)))
        asked: list[float] = []
        for step in range(2000):
            peer = servers.Servers._quickest(choice, [quick, slow], 1)  # type: ignore[arg-type]
            peer.asked_s = 5.0 * step
            if peer is slow:
                asked.append(5.0 * step)
        return [later - before for before, later in itertools.pairwise(asked)]

    assert set(pauses_s(2.0)) == {10.0}
    for times in (4.0, 10.0):
        found = pauses_s(times)
        assert found
        assert min(found) >= 10.0 * times**2
        assert max(found) <= 10.0 * times**2 + 5.0


@pytest.mark.parametrize("fallback", ["local", "error"])
def test_no_more_is_sent_in_an_hour_than_is_allowed(server: Server, fallback: Any) -> None:
    bound = 3.5 * EXAMPLE.nbytes
    with split_of(server, partition="server", hourly_bytes=bound, fallback=fallback) as split:
        for _ in range(3):
            assert right(split)
        for _ in range(3):
            if fallback == "local":
                assert right(split)
                assert split.last is not None
                assert str(split.last.degraded).startswith("metered: ")
            else:
                with pytest.raises(ts.ServerUnavailableError, match="hourly_bytes"):
                    split(EXAMPLE)
        assert split.stats()["sent_bytes"] <= bound
    with pytest.raises(ts.errors.AdaptError, match="hourly_bytes must be a positive number"):
        split_of(server, partition="server", hourly_bytes=0)


@pytest.mark.usefixtures("patient")
def test_requests_under_way_count_among_what_is_sent_in_an_hour(server: Server) -> None:
    with (
        HttpTransport(server.url) as inner,
        Held(inner) as held,
        split_of(held, partition="server", hourly_bytes=2.5 * EXAMPLE.nbytes, timeout_s=PATIENCE_S) as split,
    ):
        assert right(split)
        held.hold()
        first = split.submit(EXAMPLE)
        assert held.begun.wait(PATIENCE_S)
        with torch.no_grad():
            expected = net()(EXAMPLE)
            assert torch.equal(split.submit(EXAMPLE).result(), expected)
            assert split.stats()["degraded"] == {"metered": 1}
            held.go.set()
            assert torch.equal(first.result(), expected)
        assert split.stats()["degraded"] == {"metered": 1}


@pytest.mark.usefixtures("patient")
def test_a_late_request_counts_among_what_is_sent_in_an_hour_before_it_ends(server: Server) -> None:
    class Lasting(Relay):
        def infer(self, *args: Any, **options: Any) -> Answer:
            answer = super().infer(*args, **options)
            assert go.wait(PATIENCE_S)
            return answer

    go = threading.Event()
    go.set()
    bound = 2.5 * EXAMPLE.nbytes
    with (
        HttpTransport(server.url) as inner,
        split_of(Lasting(inner), partition="server", hourly_bytes=bound) as split,
    ):
        assert right(split)
        go.clear()
        assert right(split)
        assert degraded(split).startswith("late: ")
        assert right(split)
        assert degraded(split).startswith("metered: ")
        go.set()
        wait_for(lambda: split._engine._pool.idle)
        assert not split._engine.servers._allowance._reserved
        assert split.stats()["sent_bytes"] <= bound


@pytest.mark.parametrize("fallback", ["local", "error"])
def test_calls_that_are_decided_at_the_same_time_do_not_send_the_same_bytes(server: Server, fallback: Any) -> None:
    """Each has seen before its head that one more request may be sent, and only one may."""
    with split_of(server, partition=2, hourly_bytes=1e6, fallback=fallback) as split:
        assert right(split)
        servers_ = split._engine.servers
        way = servers_.fixed
        assert way is not None
        servers_._allowance.hourly_bytes = split.stats()["sent_bytes"] + 1.5 * way.point.size_bytes
        together = threading.Barrier(4)
        head = split._engine.parts.head

        def heads(*args: Any) -> Any:
            run = head(*args)

            def slowly(*tensors: Any) -> Any:
                together.wait(PATIENCE_S)
                return run(*tensors)

            return slowly

        def call(_: int) -> str:
            try:
                return "right" if right(split) else "wrong"
            except ts.ServerUnavailableError as error:
                return str(error)

        with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(4) as pool:
            patched.setattr(split._engine.parts, "head", heads)
            found = sorted(pool.map(call, range(4)))
        if fallback == "local":
            assert found == ["right"] * 4
            assert split.stats()["degraded"] == {"metered": 3}
        else:
            assert [one.startswith("no request may be sent: ") for one in found] == [True] * 3 + [False]
        assert split.stats()["servers"][0]["opened"] == 0, "no server is at fault"
        assert split.stats()["sent_bytes"] <= servers_._allowance.hourly_bytes + 1000


@pytest.mark.parametrize("bound", [100_000.0, 10_000.0])
def test_measuring_the_link_counts_among_what_is_sent_in_an_hour(
    server: Server, known: dict[str, Any], bound: float
) -> None:
    # What is asked to make a server ready does not count; without a bound, 2.4 MB measure so quick a link.
    asked_bytes = 50_000
    with (
        LinkEmulator(0, "127.0.0.1", server.port, FAST) as emulator,
        split_of(f"http://127.0.0.1:{emulator.port}", hourly_bytes=bound, backend=device, **known) as split,
    ):
        if bound > 2 << 14:
            until(lambda: remote(split), split)
        else:
            assert right(split)
            assert not remote(split)
            assert "hourly_bytes" in degraded(split)
        assert emulator.counts().uplink_bytes <= bound + asked_bytes


def test_measured_codecs_are_chosen_among(server: Server, known: dict[str, Any]) -> None:
    from torchsurgeon.codec import CodecCost, CodecRow, CodecTable

    def row(codec: str, size: float, within: bool) -> CodecRow:
        return CodecRow(0, "input", EXAMPLE.nbytes, CodecCost(codec, size, 1e-5, 1e-5, codec == "zstd", within))

    rows = (row("raw", EXAMPLE.nbytes, True), row("zstd", 3000.0, True), row("int4", 10.0, False))
    table = CodecTable("Sequential", GRAPH.fingerprint, 1, 1, "", rows)
    link = ts.Link("narrow", 2e6, 2e6, 1e-3)
    with split_of(server.url, link=link, codecs=table, **known) as split:
        assert right(split)
        assert split.decisions[0].row.codec == "zstd"
        assert list(split.stats()["rows"]) == ["input, zstd"] or "zstd" in next(iter(split.stats()["rows"]))


def test_an_objective_follows_the_battery() -> None:
    level = 1.0
    battery = ts.Objective.battery(lambda: level, s_per_j=2.0)
    assert battery.now() == ts.Objective(latency=1.0)
    level = 0.5
    assert battery.now().latency == pytest.approx(0.5)
    assert battery.now().energy == pytest.approx(1.0)
    level = 0.1
    assert battery.now() == ts.Objective(energy=2.0)
    level = float("nan")
    with pytest.raises(ts.PlanError, match="nan"):
        battery.now()
    with pytest.raises(ts.PlanError, match="s_per_j"):
        Battery(lambda: 1.0, s_per_j=0.0)


# --- deadlines ---


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_that_is_none_is_refused(server: Server, deadline_s: float) -> None:
    with pytest.raises(ts.DeadlineError, match="must be a positive"):
        split_of(server.url, deadline_s=deadline_s)
    split = split_of(server.url)
    with pytest.raises(ts.DeadlineError, match="must be a positive"), split.deadline(deadline_s):
        pass
    split.close()


def test_a_deadline_that_cannot_be_kept_is_refused_at_once_with_the_best(server: Server, known: dict[str, Any]) -> None:
    with HttpTransport(server.url) as inner:
        between = Between(inner)
        with split_of(between, link=ts.Link("far", 1e6, 1e6, 2.0), **known) as split:
            split(EXAMPLE)
            asked = between.asked
            with (
                pytest.raises(ts.DeadlineError, match=r"best possible .*, all on the device") as caught,
                split.deadline(1e-5),
            ):
                split(EXAMPLE)
            assert caught.value.best_s > 1e-5
            assert between.asked - asked <= 1
            assert right(split)


@pytest.mark.parametrize("partition", ["auto", 2])
def test_an_answer_that_would_be_late_is_finished_here(
    server: Server, known: dict[str, Any], patient: None, partition: str | int
) -> None:
    with HttpTransport(server.url) as inner:
        between = Between(inner)
        options = {**known, "link": FAST} if partition == "auto" else {}
        with split_of(between, partition=partition, **options) as split:

            def late() -> bool:
                between.delay_s = 0.0
                until(lambda: remote(split), split)
                between.delay_s = 20.0
                begin_s = time.monotonic()
                with split.deadline(0.5):
                    assert right(split)
                assert time.monotonic() - begin_s < 5
                return degraded(split).split(":")[0] in ("late", "deadline")

            # On a busy machine a decision may be for the device alone, and nothing is late then.
            end_s = time.monotonic() + PATIENCE_S
            while not late():
                assert time.monotonic() < end_s, split.last
            assert split.last is not None
            assert split.last.local_s > 0


def test_a_deadline_holds_for_its_thread_and_module_only(server: Server) -> None:
    with split_of(server.url, partition="device") as split, split_of(server.url, partition="device") as other:
        with split.deadline(1e-9):
            with pytest.raises(ts.DeadlineError):
                split(EXAMPLE)
            with split.deadline(None):
                assert right(split)
            assert right(other)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(right, split).result()
        assert right(split)


def test_with_fallback_error_a_deadline_ends_the_request(server: Server) -> None:
    with HttpTransport(server.url) as inner:
        between = Between(inner)
        with split_of(between, partition=2, fallback="error", deadline_s=5.0) as split:
            assert right(split)
            between.delay_s = 20.0
            with split.deadline(0.2), pytest.raises((ts.ServerUnavailableError, TimeoutError)):
                split(EXAMPLE)


# --- the end ---


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("torchsurgeon")}


@pytest.fixture
def watched(server: Server) -> Server:
    """The server, which is in this process, and begins to watch its weights at its first request."""
    with split_of(server.url, partition=2) as split:
        assert right(split)
    return server


def test_closing_ends_every_thread_even_from_two_at_once(watched: Server) -> None:
    before = threads()
    split = split_of(watched.url, partition=2)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: right(split), range(20)))
        assert threads() > before
        list(pool.map(lambda _: split.close(), range(2)))
    assert threads() <= before
    with pytest.raises(ts.ServerUnavailableError, match="closed"):
        split(EXAMPLE)
    split.partition = "device"
    assert right(split)


def test_a_module_that_is_dropped_ends_its_threads_and_leaves_a_given_transport_open(watched: Server) -> None:
    before = threads()
    with HttpTransport(watched.url) as transport:
        split = split_of(transport, partition=2)
        assert right(split)
        gone = weakref.ref(split)
        del split
        gc.collect()
        assert gone() is None
        # A finalizer asks the threads to end, and does not wait for them.
        end_s = time.monotonic() + PATIENCE_S
        while not threads() <= before:
            assert time.monotonic() < end_s, threads() - before
            time.sleep(0.01)
        with split_of(transport, partition=2) as another:
            assert right(another)


def test_closing_in_the_middle_of_a_call_still_answers_it(server: Server) -> None:
    with HttpTransport(server.url) as inner:
        between = Between(inner)
        split = split_of(between, partition=2)
        assert right(split)
        between.delay_s = 20.0
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(right, split)
            time.sleep(0.05)
            split.close()
            assert answer.result(10)


def test_closing_in_the_middle_of_a_call_does_not_have_the_next_server_asked(server: Server) -> None:
    with HttpTransport(server.url) as one, HttpTransport(server.url) as two:
        first = Held(one)
        split = split_of([first, two], partition=2)
        assert right(split)
        first.hold()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(right, split)
            assert first.begun.wait(PATIENCE_S)
            split._engine._pool.end()
            first.go.set()
            assert answer.result(PATIENCE_S)
        assert split.last is not None
        assert split.last.server is None
        split.close()


@pytest.mark.parametrize("partition", [2, "auto"])
def test_closing_interrupts_a_call_that_waits_in_its_own_thread(
    server: Server, known: dict[str, Any], partition: Any
) -> None:
    with HttpTransport(server.url) as inner:
        between = Between(inner)
        split = split_of(between, partition=partition, fallback="error", link=FAST, **known)
        assert right(split)
        between.delay_s = 20.0
        begin_s = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(split, EXAMPLE)
            time.sleep(0.2)
            split.close()
            with pytest.raises(ts.ServerUnavailableError, match="was closed"):
                answer.result(10)
        assert time.monotonic() - begin_s < 10


def test_what_is_fetched_when_a_server_is_made_ready_obeys_the_deadline_of_the_call(
    server: Server, known: dict[str, Any]
) -> None:
    class Measuring(Between):
        def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
            if path.endswith("/profile"):
                asked_s.append(timeout_s)
                time.sleep(min(timeout_s or 20.0, 20.0))
                raise ts.ServerUnavailableError("it still measures")
            return super().get_json(path, timeout_s=timeout_s)

    asked_s: list[float | None] = []
    begin_s = time.monotonic()
    with HttpTransport(server.url) as inner:
        options = {"link": FAST, "device_profile": known["device_profile"], "fallback": "error", "deadline_s": 0.5}
        with split_of(Measuring(inner), **options) as split, pytest.raises(ts.ServerUnavailableError):
            split(EXAMPLE)
    assert asked_s
    assert asked_s[0] is not None
    assert 0 < asked_s[0] <= 0.5
    assert time.monotonic() - begin_s < 15


@pytest.mark.usefixtures("patient")
def test_a_forked_child_has_threads_and_connections_of_its_own(server: Server) -> None:
    with split_of(server.url, partition=2) as split:
        assert right(split)
        child = os.fork()
        if not child:
            status = 1
            try:
                fine = all(right(split, torch.full((1, 3, 32, 32), float(i))) for i in range(20))
                status = 0 if fine and split.last is not None and split.last.server is not None else 2
            finally:
                os._exit(status)
        try:
            assert all(right(split, torch.full((1, 3, 32, 32), -float(i))) for i in range(20))
        finally:
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.usefixtures("patient")
def test_calls_leave_nothing_behind(server: Server) -> None:
    with split_of(server.url, partition=2) as split:
        for _ in range(100):
            split(EXAMPLE)
        before = len(threads()), len(os.listdir("/proc/self/fd"))
        for _ in range(500):
            split(EXAMPLE)
        assert (len(threads()), len(os.listdir("/proc/self/fd"))) == before


def test_a_fallback_there_is_not_is_refused(server: Server) -> None:
    with pytest.raises(ts.PlanError, match="fallback"):
        split_of(server.url, fallback="none")


def test_preparing_does_what_the_first_call_would(server: Server, known: dict[str, Any]) -> None:
    with split_of(server.url, link=FAST, **known) as split:
        assert split.prepare() is split
        assert split.stats()["servers"][0]["usable"]
        assert split.stats()["inferences"] == 0
    with (
        split_of("http://127.0.0.1:9", partition=2, fallback="error") as split,
        pytest.raises(ts.ServerUnavailableError),
    ):
        split.prepare()


class Nested(nn.Module):
    """Takes pictures in a list, and a mask beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, pictures: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(pictures[0] + pictures[1]) * mask)  # type: ignore[no-any-return]


def test_a_calls_size_counts_tensors_in_lists_too() -> None:
    example = [torch.rand(4, 8), torch.rand(4, 8)], torch.rand(4, 1)
    twice = [torch.rand(8, 8), torch.rand(8, 8)], torch.rand(8, 1)
    with ts.SplitModule(Nested().eval(), example, partition="device") as split:
        parts = split._engine.parts
        assert ModelCall(parts, example, {}).scale() == 1.0
        assert ModelCall(parts, twice, {}).scale() == 2.0


def test_the_rest_of_a_call_begun_elsewhere_says_nothing_of_how_slow_this_device_is(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]
) -> None:
    with split_of([], partition="device", device_profile=known["device_profile"]) as split:
        recorded: list[float] = []
        monkeypatch.setattr(
            split._engine.times, "record_duration", lambda taken_s, foretold_s: recorded.append(taken_s)
        )
        split(EXAMPLE)
        assert len(recorded) == 1
        point = split.graph.points[2]
        tensors = ts.cut(split.graph, point).head(EXAMPLE)
        split.finish(tuple(spec.name for spec in point.tensors), *tensors)
        assert len(recorded) == 1


def test_a_deadline_counts_all_of_what_the_server_takes_for_an_input_smaller_than_the_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = EXAMPLE.expand(32, -1, -1, -1).contiguous()
    with serving(net(), batch) as other, HttpTransport(other.url) as inner:
        between = Between(inner)
        with ts.SplitModule(net(), batch, server=between, name="net", partition=1) as split:
            between.delay_s = 0.2
            for _ in range(3):
                assert right(split)
            # The device takes longer than any deadline here, so that it depends on the server.
            monkeypatch.setattr(split._engine.times, "_unhindered_s", lambda way: (0.0, 3200.0))
            with pytest.raises(ts.DeadlineError) as caught, split.deadline(0.02):
                split(EXAMPLE)
            assert caught.value.best_s >= 0.1


@pytest.mark.parametrize("partition", [2, "auto"])
def test_a_transport_that_does_not_know_when_answers_came_costs_none(
    server: Server, known: dict[str, Any], partition: Any
) -> None:
    class Timeless(Relay):
        def infer(self, *args: Any, **options: Any) -> Answer:
            answer = super().infer(*args, **options)
            never = dict.fromkeys(("send_start_s", "send_end_s", "first_byte_s", "end_s"), math.nan)
            return answer._replace(timing=answer.timing._replace(**never))

    with HttpTransport(server.url) as inner:
        options = known | {"link": FAST, "partition": partition}
        with split_of(Timeless(inner), **options) as split:
            for _ in range(3):
                assert right(split)
            assert split.stats()["servers"][0]["answers"] > 0


def test_the_link_is_observed_while_other_requests_wait_in_the_server(server: Server, monkeypatch: Any) -> None:
    """They have come in behind a request whose transfer is over, and so have not shared the uplink with it."""
    with split_of(server, partition=1) as split:
        assert right(split)
        peer = split._engine.servers.peers[0]
        observed: list[float] = []
        monkeypatch.setattr(peer.state.link, "observe", lambda **what: observed.append(what["up_s"]))
        told = {"receive_s": 0.005, "queue_s": 0.0, "compute_s": 0.150, "decode_s": 0.0}
        for number in range(20):
            begun_s = 0.05 * number
            peer._asking = {object(): begun_s + 0.05 * behind for behind in (1, 2, 3)}
            timing = Timing(100_000, 4_000, begun_s, begun_s + 0.004, begun_s + 0.155, begun_s + 0.156)
            peer.observe(Answer({}, told, timing), 0.150)
        peer._asking = {}
        assert observed == pytest.approx([0.005] * 20)


# --- what other threads do meanwhile ---


def test_a_deadline_is_kept_where_the_plan_is_made_anew_while_a_call_is_decided(
    server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with split_of(server, link=FAST, **known) as split:
        assert right(split)
        engine = split._engine
        choose, planned = engine.servers.choose, 0

        def choose_and_plan(*args: Any, **options: Any) -> Any:
            nonlocal planned
            choice = choose(*args, **options)
            for peer in engine.servers.peers:
                engine._connector.plan_again(peer)
                planned += 1
            return choice

        monkeypatch.setattr(engine.servers, "choose", choose_and_plan)
        with split.deadline(PATIENCE_S):
            for _ in range(3):
                assert right(split)
        assert planned == 3


def test_running_the_parts_to_learn_what_they_take_is_not_the_calls_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with split_of(server, partition=2) as split:
        assert right(split)
        times = split._engine.times
        original, slept_s, asked = times._time, 2.0, list[Any]()

        def slowly(way: Any) -> Any:
            asked.append(way)
            time.sleep(slept_s)
            return original(way)

        monkeypatch.setattr(times, "_time", slowly)
        begun_s = time.perf_counter()
        with split.deadline(PATIENCE_S):
            split(EXAMPLE)
        taken_s = time.perf_counter() - begun_s
        assert split.last is not None
        assert asked
        assert split.last.total_s <= taken_s - slept_s


@pytest.mark.usefixtures("patient")
def test_what_one_server_is_foretold_to_take_is_not_expected_of_another(
    server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HttpTransport(server.url) as one, HttpTransport(server.url) as two:
        first = Silent(one)
        with split_of([first, two], link=FAST, **known) as split:
            split.prepare()
            until(lambda: remote(split), split)
            foretold: list[tuple[int, float]] = []
            for number, peer in enumerate(split._engine.servers.peers):
                monkeypatch.setattr(
                    peer,
                    "observe",
                    lambda answer, predicted_s, number=number, **_: foretold.append((number, predicted_s)),
                )
            monkeypatch.setattr(split._engine.servers, "_peer", lambda *_: split._engine.servers.peers[0])
            first.down = True
            assert right(split)
            calls = [predicted_s for number, predicted_s in foretold if number == 1]
            assert 0.0 in calls
            assert split.last is not None
            assert split.last.server == split._engine.servers.peers[1].label
            # What that server takes is learned from its own answers.
            assert split._engine.servers.peers[1].expected_duration(split.last.partition) is not None
            first.down = False


def test_an_error_in_choosing_a_cut_costs_no_answer(
    server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("for this test")

    for fallback in ("local", "error"):
        with split_of(server, link=FAST, fallback=fallback, **known) as split:
            assert right(split)
            monkeypatch.setattr("torchsurgeon.runtime.choice.Adaptive.standing", broken)
            if fallback == "local":
                assert right(split)
                assert degraded(split).startswith("choice")
                assert "choosing where to cut failed" in caplog.text
            else:
                with pytest.raises(ZeroDivisionError):
                    split(EXAMPLE)
            monkeypatch.undo()
            assert right(split)


def test_an_error_in_asking_whether_a_deadline_can_be_kept_costs_no_answer(
    server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("for this test")

    with split_of(server, link=FAST, **known) as split:
        assert right(split)
        monkeypatch.setattr("torchsurgeon.runtime.choice.Adaptive.latencies", broken)
        with split.deadline(60.0):
            assert right(split)
        assert "whether the deadline can be kept is not known" in caplog.text


@pytest.mark.parametrize("partition", ["device", 2])
def test_a_deadline_costs_no_answer_where_the_model_does_not_run_its_example_any_more(
    server: Server, partition: Any, caplog: pytest.LogCaptureFixture
) -> None:
    x = EXAMPLE.double()
    with split_of(server, partition=partition) as split:
        split.model.double()
        with split.deadline(PATIENCE_S):
            assert right(split, x, net().double())
        assert "whether the deadline can be kept is not known" in caplog.text


class Branches(nn.Module):
    """Two branches, so that two layers on the device may be either of two sets."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.usefixtures("patient")
def test_cuts_with_as_many_layers_on_the_device_have_times_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Branches().eval(), torch.rand(1, 8)
    with serving(model, x) as server, ts.SplitModule(model, x, server=server.url, name="net") as split:
        layers = {layer.name: layer.index for layer in split.graph.layers}
        left, right_ = (split.graph.point_of([layers[f"{one}.0"], layers[f"{one}.1"]]) for one in ("left", "right"))
        assert left.index == right_.index
        split.partition = left
        split(x)
        (peer,) = split._engine.servers.peers
        assert peer.expected_duration(left) is not None
        assert peer.expected_duration(right_) is None
        times = split._engine.times
        monkeypatch.setattr(times, "_time", lambda way: (1.0, 2.0) if way.point == left else (3.0, 4.0))
        assert times.expected_s(Way(left, whole=False)) == (1.0, 2.0)
        assert times.expected_s(Way(right_, whole=False)) == (3.0, 4.0)


@pytest.mark.usefixtures("patient")
def test_other_requests_that_come_do_not_begin_a_calls_patience_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience_s = 0.5
    with HttpTransport(server.url) as inner, Silent(inner) as silent, split_of(silent, partition=2) as split:
        assert right(split)
        late = Failure("late", "for this test")
        monkeypatch.setattr(Waiting, "patience", lambda *_, **__: (patience_s, late))
        more = iter([True] * 20)
        monkeypatch.setattr(Waiting, "crowded", lambda *_: next(more, False))
        waited_s: list[float] = []
        wait = Task.wait

        def recorded(task: Task[Any], timeout_s: float) -> bool:
            waited_s.append(max(timeout_s, 0.0))
            return wait(task, timeout_s)

        monkeypatch.setattr(Task, "wait", recorded)
        silent.silent = True
        assert right(split)
        assert patience_s * 0.5 < sum(waited_s) <= 2 * patience_s
        assert next(more, None) is None, "it has looked each time whether others have come"


def test_what_strikes_the_beginning_of_learning_does_not_end_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with split_of(server, partition=2) as split:
        assert right(split)
        learner = split._engine._learner

        def struck(*_: Any) -> None:
            learner._stop()  # as a task does that is given up
            raise KeyboardInterrupt

        monkeypatch.setattr(learner, "_due", lambda: True)
        with monkeypatch.context() as striking:
            striking.setattr(learner._pool, "submit", struck)
            with pytest.raises(KeyboardInterrupt):
                learner.start()
            with pytest.raises(KeyboardInterrupt):
                learner.build(Way(split.graph.points[2], whole=False))
        assert not learner._busy
        assert not learner._stopped
        assert not learner._asked
        monkeypatch.undo()


def test_a_deadline_that_is_over_when_a_changed_server_is_to_be_compared_is_no_bare_timeout(server: Server) -> None:
    with split_of(server, partition=2) as split:
        assert right(split)
        over = Deadline(1e-9)
        time.sleep(0.01)
        with pytest.raises(ts.ServerUnavailableError, match="no time left to compare"):
            split._engine.servers.peers[0]._left_s(over)


def test_what_fails_while_servers_are_looked_after_is_logged_and_tried_again(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with split_of(server, partition=2) as split:
        assert right(split)
        keeper = split._engine._keeper
        original, failed = keeper.look, threading.Event()

        def look() -> Any:
            if not failed.is_set():
                failed.set()
                raise RuntimeError("for this test")
            looked.set()
            return original()

        looked = threading.Event()
        monkeypatch.setattr(keeper, "look", look)
        keeper.wake()
        assert looked.wait(PATIENCE_S)
        assert "looking after the servers failed" in caplog.text


def test_clocks_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(device))
    )
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    there, here = SimpleNamespace(is_cuda=True, device="cuda:1"), torch.zeros(1)
    settle({"a": [here, there], "b": (there, 3)})
    assert waited == ["cuda:1"]
    settle(here)
    capturing[0] = True
    settle(there)
    assert len(waited) == 1


@pytest.mark.parametrize("partition", ["device", 2])
def test_what_is_recorded_of_this_device_was_measured_after_its_gpu_had_ended(
    server: Server, monkeypatch: pytest.MonkeyPatch, partition: Any
) -> None:
    computing_s = 0.3
    for module in (device_module, engine_module, pending_module):
        monkeypatch.setattr(module, "settle", lambda values: time.sleep(computing_s))
    with HttpTransport(server.url) as inner, Silent(inner) as silent, split_of(silent, partition=partition) as split:
        assert right(split)
        silent.down = True
        assert right(split)
        assert split.last is not None
        assert split.last.head_s >= computing_s
        assert partition == "device" or split.last.local_s >= computing_s
