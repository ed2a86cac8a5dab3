"""Who drives a request: the thread that calls, while it has nothing better to do than to wait for the answer."""

from __future__ import annotations

import functools
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from classifier import EXAMPLE, PATIENCE_S, degraded, remote, right, split_of
from tcp import listening, read_message
from transports import Relay

import torchsurgeon as ts
from torchsurgeon.runtime import pool as pool_module
from torchsurgeon.runtime.driven import Driven
from torchsurgeon.runtime.pool import Pool
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport
from torchsurgeon.transport.connection import Connection
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps, complete

# --- calls ---


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that begin exchanges, one after the other."""
    threads: list[threading.Thread] = []
    original = Connection.exchange

    def exchange(self: Connection, *args: Any) -> Any:
        threads.append(threading.current_thread())
        return original(self, *args)

    monkeypatch.setattr(Connection, "exchange", exchange)
    return threads


def test_the_calling_thread_sends_over_a_connection_that_is_open(
    server: Server, patient: None, drivers: list[threading.Thread]
) -> None:
    with split_of(server, partition="stem") as split:
        assert right(split)
        drivers.clear()
        for _ in range(3):
            assert right(split)
            assert remote(split)
        assert drivers == [threading.main_thread()] * 3


@pytest.mark.parametrize("options", [{"codec": "int8"}, {"answer_codec": "float16"}])
def test_another_thread_computes_what_a_codec_has_to_compute(
    server: Server, patient: None, drivers: list[threading.Thread], options: dict[str, Any]
) -> None:
    with split_of(server, partition="stem", **options) as split:
        for _ in range(3):
            split(EXAMPLE)
            assert remote(split)
        assert threading.main_thread() not in drivers


def test_another_thread_asks_a_transport_with_an_infer_of_its_own(server: Server, patient: None) -> None:
    threads: list[threading.Thread] = []

    class Noting(Relay):
        def infer(self, *args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread())
            return super().infer(*args, **options)

    with Noting(HttpTransport(server.url)) as transport, split_of(transport, partition="stem") as split:
        assert right(split)
        assert remote(split)
        assert threads
        assert threading.main_thread() not in threads


def test_an_infer_that_is_assigned_to_a_transport_is_asked(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HttpTransport(server.url) as transport, split_of(transport, partition="stem") as split:
        assert right(split)
        own, asked = transport.infer, []

        def infer(*args: Any, **options: Any) -> Any:
            asked.append(args)
            return own(*args, **options)

        monkeypatch.setattr(transport, "infer", infer)
        assert right(split)
        assert remote(split)
        assert asked


def test_a_connection_is_opened_by_another_thread(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    original = Connection._connect

    def connect(self: Connection, deadline: Deadline) -> socket.socket:
        threads.append(threading.current_thread())
        return original(self, deadline)

    monkeypatch.setattr(Connection, "_connect", connect)
    with split_of(server, partition="stem") as split:
        assert right(split)
        assert threads
        assert threading.main_thread() not in threads


def test_calls_of_many_threads_are_right_and_leave_nothing_under_way(server: Server, patient: None) -> None:
    with split_of(server, partition="stem") as split:
        wrong: list[int] = []

        def call() -> None:
            wrong.extend(i for i in range(20) if not right(split))

        threads = [threading.Thread(target=call) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        stats = split.stats()
        assert stats["degraded"] == {}


@contextmanager
def slowly(port: int, delay_s: list[float]) -> Iterator[str]:
    """The URL of what hands messages on to a server, and each answer in two halves, ``delay_s[0]`` apart."""

    def attend(device: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", port)) as link:
            while message := read_message(device):
                link.sendall(b"\r\n\r\n".join(message))
                answer = read_message(link)
                assert answer is not None
                whole = b"\r\n\r\n".join(answer)
                device.sendall(whole[: len(whole) // 2])
                time.sleep(delay_s[0])
                device.sendall(whole[len(whole) // 2 :])

    with listening(attend) as own_port:
        yield f"http://127.0.0.1:{own_port}"


def test_where_an_answer_stops_half_way_the_device_answers_and_another_thread_goes_on_reading(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_s = [0.0]
    taken: list[Any] = []
    original = Pool.take

    def take(self: Pool, task: Any) -> None:
        if isinstance(task, Driven) and delay_s[0]:
            taken.append(task)
        original(self, task)

    monkeypatch.setattr(Pool, "take", take)
    with slowly(server.port, delay_s) as url, split_of(url, partition="stem") as split:
        for _ in range(5):
            assert right(split)
        assert remote(split)
        delay_s[0] = 2.0
        assert right(split)
        assert degraded(split).startswith("late: ")
        assert len(taken) == 1
        delay_s[0] = 0.0


# --- steps ---


@contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def reading(link: socket.socket, closed: list[str], count: int = 1) -> Steps[bytes]:
    """Read so many pieces; ``closed`` notes that it has put everything in order."""
    poller = select.poll()
    poller.register(link, select.POLLIN)
    read = b""
    try:
        for _ in range(count):
            if not (yield poller):
                raise TimeoutError
            read += link.recv(100)
        return read
    finally:
        closed.append(threading.current_thread().name)


@pytest.fixture
def pool() -> Iterator[Pool]:
    one = Pool("goes-on")
    yield one
    one.close()


def test_steps_are_completed_or_end_with_their_deadline() -> None:
    closed: list[str] = []
    with ends() as (ours, theirs):
        theirs.send(b"a")
        assert complete(reading(ours, closed), Deadline(PATIENCE_S)) == b"a"
        with pytest.raises(TimeoutError):
            complete(reading(ours, closed), Deadline(0.02))
        over = Deadline(PATIENCE_S)
        over.cancel()
        with pytest.raises(TimeoutError):
            complete(reading(ours, closed), over)
    assert len(closed) == 3


def test_it_waits_no_longer_than_it_is_told_and_goes_on_where_it_was(pool: Pool) -> None:
    closed: list[str] = []
    with ends() as (ours, theirs):
        task = Driven(reading(ours, closed, 2), Deadline(PATIENCE_S), pool)
        task.begin()
        assert task.here
        assert not task.wait(0.0)
        theirs.send(b"a")
        assert not task.wait(0.02)
        theirs.send(b"b")
        assert task.wait(PATIENCE_S)
        assert task.answered()
        assert task.result() == b"ab"
        assert closed == ["MainThread"]
        assert not pool.crowded


def test_another_thread_goes_on_where_it_was_handed_over(pool: Pool) -> None:
    closed: list[str] = []
    with ends() as (ours, theirs):
        task = Driven(reading(ours, closed, 2), Deadline(PATIENCE_S), pool)
        task.begin()
        theirs.send(b"a")
        assert not task.wait(0.02)
        task.hand_over()
        assert not task.here
        theirs.send(b"b")
        assert task.wait(PATIENCE_S)
        assert task.result() == b"ab"
        assert closed == ["goes-on"]


def test_what_may_wait_by_itself_is_never_run_by_the_thread_that_calls(pool: Pool) -> None:
    threads: list[str] = []

    def steps() -> Steps[int]:
        yield None
        threads.append(threading.current_thread().name)
        return 7

    task = Driven(steps(), Deadline(PATIENCE_S), pool)
    task.begin()
    assert task.wait(PATIENCE_S)
    assert (task.result(), threads) == (7, ["goes-on"])


def test_what_its_steps_raise_is_its_error(pool: Pool) -> None:
    with ends() as (ours, _):
        task = Driven(reading(ours, []), Deadline(0.02), pool)
        task.begin()
        assert task.wait(PATIENCE_S)
        assert not task.answered()
        assert isinstance(task.error, TimeoutError)


def test_given_up_it_puts_everything_in_order_at_once(pool: Pool) -> None:
    closed: list[str] = []
    with ends() as (ours, _):
        task = Driven(reading(ours, closed), Deadline(PATIENCE_S), pool)
        task.begin()
        task.give_up()
        assert closed == ["MainThread"]
        task.give_up()


def test_the_end_of_the_pool_ends_what_waits() -> None:
    closed: list[str] = []
    pool = Pool("goes-on")
    with ends() as (ours, theirs):
        deadline = Deadline(PATIENCE_S)
        task = Driven(reading(ours, closed), deadline, pool)
        deadline.interrupted_by(functools.partial(theirs.shutdown, socket.SHUT_RDWR))
        task.begin()
        threading.Timer(0.05, pool.end).start()
        assert task.wait(PATIENCE_S)
        assert deadline.cancelled
        closed.clear()
        late = Driven(reading(ours, closed), Deadline(PATIENCE_S), pool)
        with pytest.raises(ts.ServerUnavailableError, match="closed"):
            late.begin()
    pool.close()


@pytest.mark.parametrize("why", ["closed", "no thread"])
def test_where_no_thread_can_go_on_it_ends_with_an_error_that_says_so(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    pool = Pool("goes-on")

    def refuse(*_: Any) -> None:
        raise pool_module.NoThreadError("no thread could be started")

    with ends() as (ours, _):
        task = Driven(reading(ours, closed), Deadline(PATIENCE_S), pool)
        task.begin()
        if why == "closed":
            pool.end()
        else:
            monkeypatch.setattr(pool_module, "start_thread", refuse)
        task.hand_over()
        assert task.wait(PATIENCE_S)
        assert isinstance(task.error, ts.ServerUnavailableError)
        assert closed == ["MainThread"]
    pool.close()


def test_a_handler_may_end_the_pool_while_a_step_runs(pool: Pool) -> None:
    """The step is in the middle of something then, and ends with the deadline."""
    closed: list[str] = []

    def steps() -> Steps[int]:
        try:
            signal.raise_signal(signal.SIGUSR1)
            yield from reading(ours, [])
            return 7
        finally:
            closed.append("closed")

    before = signal.signal(signal.SIGUSR1, lambda *_: pool.end())
    try:
        with ends() as (ours, _):
            task = Driven(steps(), Deadline(PATIENCE_S), pool)
            task.begin()
            assert task.wait(PATIENCE_S)
            assert isinstance(task.error, TimeoutError)
            assert closed == ["closed"]
    finally:
        signal.signal(signal.SIGUSR1, before)
