"""What a signal handler raises while a call runs comes out of the call as it is, and is blamed on no server."""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, LAYERS, MODEL, degraded, net, remote, right, split_of, until
from known_machines import FAST
from serving import serving

import torchsurgeon as ts
from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import InProcessTransport

# How many signals strike each way of calling; 10,000 have been tried.
_STRIKES = 150
_PACKAGE = Path(ts.__file__).parent


class Late(Exception):
    """As the exception of a task queue's time limit."""


class LateTimeout(TimeoutError):
    """Of a type that sockets raise, too."""


class LateOs(ConnectionError):
    pass


class LateType(TypeError):
    """Of a type that a model raises for a call it does not take."""


class LateRuntime(RuntimeError):
    """Of a type that locks and threads raise."""


class LateServer(ts.ServerUnavailableError):
    """Of a type that this package raises."""


class LateValue(ValueError):
    """Of a type that parsers raise."""


class LateBlocking(BlockingIOError):
    """Of a type that sockets raise which do not wait, as a full pipe in a handler does."""


class LateBase(BaseException):
    """As those that test runners raise."""


KINDS = [
    *(Late, LateTimeout, LateOs, LateType, LateRuntime, LateServer, LateValue, LateBlocking, LateBase),
    *(KeyboardInterrupt, SystemExit),
]


class Striker:
    """Raises ``kind`` in the main thread by a signal, at a random moment of what ``struck`` runs."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind, self.fired, self.armed = kind, 0, False
        self._random = random.Random(0)

    def handle(self, *_: object) -> None:
        if self.armed:
            self.fired += 1
            raise self.kind("struck")

    def dropped(self, unraisable: Any) -> bool:
        """Count a strike as one that never was, if Python dropped it in a destructor of somebody else's object."""
        trace = unraisable.exc_traceback
        ours = trace is None or Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)
        if ours or not isinstance(unraisable.exc_value, self.kind):
            return False
        self.fired -= 1
        return True

    def struck(self, function: Callable[[], Any], within_s: float) -> tuple[bool, Any]:
        """Return whether it was struck, or what it returned."""
        try:
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + self._random.random() * within_s)
                result = function()
            finally:
                self.armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except self.kind:
            return True, None
        return False, result


@contextmanager
def striking(kind: type[BaseException]) -> Iterator[Striker]:
    striker = Striker(kind)
    # Python drops what a handler raises while garbage is collected whose end runs code, such as that of other tests.
    gc.collect()
    gc.disable()
    before = signal.signal(signal.SIGALRM, striker.handle)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None if striker.dropped(unraisable) else hook(unraisable)
    try:
        yield striker
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
        gc.enable()


def strike(kind: type[BaseException], call: Callable[[], Any], strikes: int = _STRIKES) -> None:
    """Strike ``call`` so often; every strike comes out, and every answer is right."""
    call()
    begin_s = time.perf_counter()
    for _ in range(5):
        call()
    # About as long as a call takes, however busy the machine is from one moment to the next.
    within_s = (time.perf_counter() - begin_s) / 5
    with striking(kind) as striker:
        got = tries = 0
        while striker.fired < strikes and tries < 20 * strikes:
            tries += 1
            was, result = striker.struck(call, within_s)
            got += was
            # So about a quarter of the calls ends before it is struck.
            within_s *= 1.02 if was else 0.95
            assert torch.is_grad_enabled()
            if was and tries % 2:
                # Its connection is closed, and another thread opens the next. Every other call to be struck finds one
                # open, so that the calling thread sends the request.
                was, result = False, call()
            if not was:
                assert all(torch.equal(one, TRUTH) for one in result)
        assert (got, striker.fired >= strikes) == (striker.fired, True)


with torch.no_grad():
    TRUTH = MODEL(EXAMPLE)


def unharmed(split: ts.SplitModule) -> None:
    """The server has not been counted as failed, nothing waits, and the next call is the server's."""
    assert split.stats()["degraded"] == {}
    assert [one["opened"] for one in split.stats()["servers"]] == [0]
    until(lambda: remote(split), split)
    end_s = time.monotonic() + 60.0
    while split._engine.servers.peers[0].under_way:
        assert time.monotonic() < end_s, "a request is still under way"
        time.sleep(0.01)


# Python drops a ValueError while it resolves a name, which with fallback="error" the calling thread does.
@pytest.mark.parametrize(
    ("fallback", "kind"),
    [("local", kind) for kind in KINDS] + [("error", kind) for kind in KINDS if kind is not LateValue],
)
def test_what_a_handler_raises_comes_out_of_a_call(
    server: Server, patient: None, kind: type[BaseException], fallback: Any
) -> None:
    with split_of(server, partition=1, fallback=fallback) as split:
        strike(kind, lambda: [split(EXAMPLE)])
        unharmed(split)


@pytest.mark.parametrize("kind", [Late, LateTimeout])
@pytest.mark.parametrize("way", ["map", "submit", "deadline", "in process", "all on the server"])
def test_what_a_handler_raises_comes_out_of_every_way_to_call(
    server: Server, patient: None, kind: type[BaseException], way: str
) -> None:
    registry = ModelRegistry(profiler=None)
    registry.add("net", net(), EXAMPLE)
    where = InProcessTransport(create_app(registry)) if way == "in process" else server
    options: dict[str, Any] = {"fallback": "error"} if way == "in process" else {}
    if way == "deadline":
        options["deadline_s"] = 100.0
    with split_of(where, partition="server" if way == "all on the server" else 1, **options) as split:
        calls: dict[str, Callable[[], Any]] = {
            "map": lambda: list(split.map([EXAMPLE] * 3, depth=2)),
            "submit": lambda: [split.submit(EXAMPLE).result()],
        }
        strike(kind, calls.get(way, lambda: [split(EXAMPLE)]))
        unharmed(split)
    registry.close()


def test_what_a_handler_raises_comes_out_of_a_call_that_chooses_its_cut(
    server: Server, patient: None, known: dict[str, Any]
) -> None:
    heard = []
    with split_of(server, link=ts.Link("known", 1e9, 1e9, 1e-4), on_replan=heard.append, **known) as split:
        strike(LateTimeout, lambda: [split(EXAMPLE)])
        unharmed(split)


@pytest.mark.parametrize("fallback", ["local", "error"])
def test_a_struck_first_call_leaves_nothing_locked(server: Server, patient: None, fallback: Any) -> None:
    with striking(LateTimeout) as striker:
        got = 0
        for _ in range(25):
            with split_of(server, partition=1, fallback=fallback) as split:
                was, _result = striker.struck(lambda split=split: split(EXAMPLE), 0.02)
                got += was
                # The first call's handshake may still be under way.
                until(lambda split=split: remote(split), split)
        assert got == striker.fired


def test_a_struck_map_leaves_no_threads(server: Server, patient: None) -> None:
    with split_of(server, partition=1) as split:
        strike(Late, lambda: list(split.map([EXAMPLE] * 3, depth=2)), 60)
        end_s = time.monotonic() + 60.0
        while any("heads" in one.name or "answers" in one.name for one in threading.enumerate()):
            assert time.monotonic() < end_s
            time.sleep(0.01)


@pytest.mark.parametrize(("fallback", "partition"), [("local", "auto"), ("local", 2), ("error", 2)])
def test_ctrl_c_at_any_moment_of_a_modules_life_leaves_no_thread_behind(
    server: Server, known: dict[str, Any], fallback: Any, partition: Any
) -> None:
    def life() -> None:
        with split_of(server, partition=partition, fallback=fallback, link=FAST, **known) as split:
            split(EXAMPLE)
            list(split.map([EXAMPLE] * 4))
            split.submit(EXAMPLE).result()

    def own() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("torchsurgeon-")}

    life()
    begin_s = time.perf_counter()
    life()
    takes_s, before = time.perf_counter() - begin_s, own()
    with striking(KeyboardInterrupt) as striker:
        for _ in range(25):
            striker.struck(life, takes_s)
            gc.collect()
            end_s = time.monotonic() + 60.0
            while own() - before:
                assert time.monotonic() < end_s, own() - before
                time.sleep(0.01)
        assert striker.fired


def test_what_a_handler_raises_in_a_listener_comes_out(server: Server, known: dict[str, Any]) -> None:
    def listen(_: object) -> None:
        signal.raise_signal(signal.SIGALRM)

    with (
        striking(LateTimeout) as striker,
        split_of(server, link=ts.Link("known", 1e9, 1e9, 1e-4), on_replan=listen, **known) as split,
    ):
        assert right(split)
        # The link becomes slow, so that the cut changes, and the listener is told.
        peer = split._engine.servers.peers[0]
        peer.adopt(ts.Link("slow", 1e3, 1e3, 5.0))
        striker.armed = True
        with pytest.raises(LateTimeout):
            all(right(split) for _ in range(50))
        striker.armed = False
        assert degraded(split) == ""
        assert len(split.graph.layers) == LAYERS


def test_a_deadline_that_was_struck_as_it_was_set_does_not_stay(server: Server) -> None:
    with split_of(server, partition=1) as split, striking(Late) as striker:

        def within() -> None:
            with split.deadline(5.0):
                pass

        for _ in range(300):
            striker.struck(within, 3e-5)
            assert split._deadlines.now(None) is None


def test_a_handlers_exception_is_told_from_the_same_exception_of_the_code_that_it_strikes() -> None:
    class Handler:
        def __call__(self, signum: int, frame: object) -> None:
            self.inner(frame)

        def inner(self, _: object) -> None:
            raise TimeoutError

    def lambda_raises(*_: object) -> None:
        raise TimeoutError

    def nested() -> None:
        signal.raise_signal(signal.SIGALRM)

    def own() -> None:
        raise TimeoutError

    before = signal.getsignal(signal.SIGALRM)
    try:
        for handler in (Handler(), lambda_raises, lambda signum, frame: lambda_raises()):
            signal.signal(signal.SIGALRM, handler)
            for function, expected in ((nested, True), (own, False)):
                with pytest.raises(TimeoutError) as caught:
                    function()
                assert by_signal_handler(caught.value) is expected
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_server_that_fails_while_signals_strike_still_counts_as_failed(patient: None) -> None:
    with serving(net(), EXAMPLE) as server:
        split = split_of(server, partition=1)
        assert right(split)
    with striking(Late) as striker:
        for _ in range(50):
            striker.struck(lambda: split(EXAMPLE), 1e-3)
    assert right(split)
    assert degraded(split)
    split.close()
