"""Who drives a request: the thread that calls, while it has nothing better to do than to wait for the answer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, PATIENCE_S, degraded, remote, right, split_of
from tcp import listening, read_message
from transports import Relay

import torchsurgeon as ts
from torchsurgeon.runtime import pending
from torchsurgeon.runtime import pool as pool_module
from torchsurgeon.runtime.driven import Driven
from torchsurgeon.runtime.pool import Pool, Task
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport, Transport, connection
from torchsurgeon.transport.connection import Connection
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps, complete
from torchsurgeon.wire import header

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


@pytest.mark.parametrize("owner", ["the transport", "HttpTransport", "Transport"])
def test_an_infer_that_is_assigned_is_asked(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    with HttpTransport(server.url) as transport, split_of(transport, partition="stem") as split:
        assert right(split)
        own, asked = transport.infer, []

        def infer(*args: Any, **options: Any) -> Any:
            asked.append(args)
            return own(*args[-2:], **options)

        target = {"the transport": transport, "HttpTransport": HttpTransport, "Transport": Transport}[owner]
        monkeypatch.setattr(target, "infer", infer)
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
        end_s = time.monotonic() + PATIENCE_S
        while split._engine.servers.peers[0].under_way or not split._engine._pool.idle:
            assert time.monotonic() < end_s
            time.sleep(0.01)


@contextmanager
def in_halves(port: int, between: list[Callable[[], object]]) -> Iterator[str]:
    """The URL of what hands messages on to a server, and each answer in halves; between them it calls a function."""

    def attend(device: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", port)) as link:
            while message := read_message(device):
                link.sendall(b"\r\n\r\n".join(message))
                answer = read_message(link)
                assert answer is not None
                whole = b"\r\n\r\n".join(answer)
                device.sendall(whole[: len(whole) // 2])
                between[0]()
                device.sendall(whole[len(whole) // 2 :])

    with listening(attend) as own_port:
        yield f"http://127.0.0.1:{own_port}"


def test_where_an_answer_stops_half_way_the_device_answers_and_another_thread_goes_on_reading(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    between: list[Callable[[], object]] = [time.monotonic]
    held, taken = threading.Event(), []
    original = Pool.take

    def take(self: Pool, task: Any) -> None:
        if isinstance(task, Driven) and between[0] == held.wait:
            taken.append(task)
        original(self, task)

    monkeypatch.setattr(Pool, "take", take)
    with in_halves(server.port, between) as url, split_of(url, partition="stem") as split:
        for _ in range(5):
            assert right(split)
        assert remote(split)
        between[0] = held.wait
        assert right(split)
        assert degraded(split).startswith("late: ")
        assert len(taken) == 1
        held.set()


@pytest.mark.parametrize("most_bytes", [EXAMPLE.nbytes - 1, EXAMPLE.nbytes])
def test_a_request_of_many_bytes_is_sent_by_another_thread(
    server: Server,
    patient: None,
    drivers: list[threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    most_bytes: int,
) -> None:
    monkeypatch.setattr(pending, "_LIGHT_BYTES", most_bytes)
    with split_of(server, partition="server") as split:
        for _ in range(2):
            assert right(split)
            assert remote(split)
        assert (threading.main_thread() in drivers) == (most_bytes >= EXAMPLE.nbytes)


def test_answers_are_tensors_of_the_same_kind_whoever_reads_them(server: Server, patient: None) -> None:
    with torch.inference_mode(), split_of(server, partition="stem") as split:
        kinds = set()
        for _ in range(4):
            kinds.add(split(EXAMPLE).is_inference())
            assert remote(split)
        assert len(kinds) == 1


@contextmanager
def on_signal(handler: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def strike_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Raise the signal once, where the calling thread next calls a function."""
    original = getattr(owner, name)

    def struck(*args: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(owner, name, original)
            signal.raise_signal(signal.SIGUSR1)
        return original(*args)

    monkeypatch.setattr(owner, name, struck)


@pytest.mark.parametrize("moment", ["waiting", "taking a connection", "reading"])
def test_a_handler_may_close_the_module_while_its_call_is_under_way(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    between: list[Callable[[], object]] = [time.monotonic]
    held = threading.Event()

    def strike_and_wait() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        held.wait()

    with in_halves(server.port, between) as url, split_of(url, partition="stem") as split, on_signal(split.close):
        assert right(split)
        assert right(split)
        if moment == "waiting":
            between[0] = strike_and_wait
        else:
            taking = moment == "taking a connection"
            strike_in(monkeypatch, *((HttpTransport, "_check_open") if taking else (Connection, "_receive")))
        assert right(split)
        held.set()
        assert re.match("(unavailable|late): |^$", degraded(split)), degraded(split)
        assert not split._engine.servers.peers[0].under_way
        with pytest.raises(ts.ServerUnavailableError, match="closed"):
            split(EXAMPLE)


@contextmanager
def raising_at(
    function: Callable[..., Any], number: int, first: Callable[[], object] = lambda: None
) -> Iterator[list[int]]:
    """Raise ``Full`` at the line of this number that runs in a function, as a handler may; yields where it was.

    Args:
        function: the function.
        number: the line's, from 1.
        first: called there before it is raised.
    """
    code, raised, left = function.__code__, list[int](), number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not code:
            return None
        left -= event == "line"
        if left == 0 and not raised:
            raised.append(frame.f_lineno)
            first()
            raise Full
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield raised
    finally:
        sys.settrace(before)


class Full(BlockingIOError):
    """What a handler raises that writes to a full pipe."""


@pytest.mark.parametrize("kind", [Full, StopIteration, ValueError, TimeoutError])
@pytest.mark.parametrize("where", ["sending", "reading", "decoding"])
def test_what_a_handler_raises_while_the_calling_thread_drives_comes_out_as_it_is(
    server: Server, patient: None, monkeypatch: pytest.MonkeyPatch, where: str, kind: type[Exception]
) -> None:
    struck = kind("struck")

    def handle() -> None:
        raise struck

    owner, name = {
        "sending": (connection.Connection, "_send"),
        "reading": (connection, "_simple_head"),
        "decoding": (header, "check_header_length"),
    }[where]
    with split_of(server, partition="stem") as split, on_signal(handle):
        assert right(split)
        assert right(split)
        strike_in(monkeypatch, owner, name)
        with pytest.raises(kind) as caught:
            split(EXAMPLE)
        assert caught.value is struck
        assert not split._engine.servers.peers[0].under_way
        assert right(split)
        assert remote(split)
        assert split.stats()["degraded"] == {}


def test_what_strikes_a_caller_that_has_asked_by_itself_leaves_nothing_under_way(server: Server) -> None:
    for line in itertools.count(1):
        with split_of(server, partition=2, fallback="error") as split:
            assert right(split)
            with raising_at(Pool.forget, line) as raised, contextlib.suppress(Full):
                split(EXAMPLE)
            assert split._engine._pool.idle
            assert right(split)
        if not raised:
            break


# --- steps ---


@contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def reading(link: socket.socket, closed: list[str], count: int = 1, *, closes: bool = False) -> Steps[bytes]:
    """Read so many pieces; ``closed`` notes that it has put everything in order, and ``link`` may be closed with it."""
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
        if closes:
            link.close()


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
        assert pool.idle


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


def test_tasks_may_end_while_the_pool_is_ended(pool: Pool) -> None:
    class Ends(Task[None]):
        @property
        def interrupt(self) -> Callable[[], object]:  # type: ignore[override]
            pool._given.clear()  # as other threads do at any moment, whose tasks have ended
            return functools.partial(interrupted.append, self)

    interrupted: list[Task[None]] = []
    tasks = {Ends(None, None) for _ in range(3)}
    pool._given.update(tasks)
    pool.end()
    assert set(interrupted) == tasks


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

    with on_signal(pool.end), ends() as (ours, _):
        task = Driven(steps(), Deadline(PATIENCE_S), pool)
        task.begin()
        assert task.wait(PATIENCE_S)
        assert isinstance(task.error, TimeoutError)
        assert closed == ["closed"]


def test_given_up_while_it_waits_it_has_no_answer(pool: Pool) -> None:
    """As where a signal handler gives the call up."""
    closed: list[str] = []
    with ends() as (ours, _):
        task = Driven(reading(ours, closed, closes=True), Deadline(PATIENCE_S), pool)
        task.begin()
        with on_signal(task.give_up):
            timer = threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
            timer.start()
            assert task.wait(PATIENCE_S)
            timer.join()
        assert not task.answered()
        assert isinstance(task.error, ts.ServerUnavailableError)
        assert closed == ["MainThread"]


def test_it_waits_no_longer_than_it_is_told_however_quickly_more_comes(pool: Pool) -> None:
    def steps() -> Steps[int]:
        poller = select.poll()
        poller.register(ours, select.POLLIN)
        count = 0
        while (yield poller):
            count += 1
        return count

    with ends() as (ours, theirs):
        theirs.send(b"always there, since nobody reads it")
        task = Driven(steps(), Deadline(PATIENCE_S), pool)
        task.begin()
        for _ in range(3):
            assert not task.wait(0.0)
        assert not task.wait(0.02)
        task.give_up()


def test_what_waits_for_a_thread_is_put_in_order_where_the_pool_ends() -> None:
    closed: list[str] = []
    busy, begun, pool = threading.Event(), threading.Event(), Pool("goes-on", most=1)
    pool.submit(lambda: (begun.set(), busy.wait()))
    assert begun.wait(PATIENCE_S)
    with ends() as (ours, _):
        task = Driven(reading(ours, closed), Deadline(PATIENCE_S), pool)
        task.begin()
        task.hand_over()
        pool.end()
        busy.set()
        assert task.wait(PATIENCE_S)
        assert isinstance(task.error, TimeoutError)
        assert closed == ["goes-on"]
        assert pool.idle
    pool.close()


def test_what_strikes_a_caller_that_gives_a_task_to_the_pool_starts_no_needless_threads(pool: Pool) -> None:
    def run() -> None:
        task = pool.submit(lambda: None)
        assert task.wait(PATIENCE_S)
        task.result()

    run()
    struck = 0
    for line in itertools.count(1):
        with raising_at(Pool.take, line) as raised, contextlib.suppress(Full):
            run()
        struck += bool(raised)
        end_s = time.monotonic() + PATIENCE_S
        while not pool.idle:
            assert time.monotonic() < end_s, f"something is left where line {raised} was struck"
            time.sleep(0.001)
        if not raised:
            break
    assert struck > 5
    for _ in range(20):
        run()
    assert pool.idle
    assert len(pool._threads) <= 2


def test_what_strikes_a_caller_leaves_a_thread_for_the_next_task() -> None:
    """Even if a thread has taken the caller's task by then, and goes on with it."""
    for line in itertools.count(1):
        one, go, begun = Pool("goes-on"), threading.Event(), threading.Event()
        try:
            assert one.submit(lambda: None).wait(PATIENCE_S)
            wait = functools.partial(begun.wait, 0.1)
            with raising_at(Pool.take, line, wait) as raised, contextlib.suppress(Full):
                one.submit(lambda begun=begun, go=go: (begun.set(), go.wait()))
            next_task = one.submit(lambda: "ended")
            assert next_task.wait(PATIENCE_S), f"it waits behind the other where line {raised} was struck"
            assert next_task.result() == "ended"
        finally:
            go.set()
            one.close()
        if not raised:
            break


def test_a_pool_forgets_what_was_handed_over_to_it(pool: Pool) -> None:
    def steps() -> Steps[None]:
        yield None

    for _ in range(2 * pool_module.MOST_THREADS):
        task = Driven(steps(), Deadline(PATIENCE_S), pool)
        task.begin()
        assert task.wait(PATIENCE_S)
        task.result()
    assert pool.idle
    assert not pool.crowded
