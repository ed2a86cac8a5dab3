"""A module that the program drops ends its threads and connections, whatever refers to what."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, net, right, split_of, until
from tcp import listening

import torchsurgeon as ts
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport, InProcessTransport

_PATIENCE_S = 60.0


def ours() -> list[str]:
    names = ("torchsurgeon-request", "torchsurgeon-keeper", "torchsurgeon-heads", "torchsurgeon-answers")
    return [thread.name for thread in threading.enumerate() if thread.name in (*names, "torchsurgeon-in-process")]


def sockets() -> set[str]:
    """The connections of this process's clients, of which servers in this process have as many again."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if name.startswith("socket:"):
            found.add(name)
    return found


def gone(references: list[weakref.ref[Any]]) -> None:
    """Everything is collected, and no thread of theirs runs any more."""
    end_s = time.monotonic() + _PATIENCE_S
    while any(one() is not None for one in references) or ours():
        assert time.monotonic() < end_s, (references, ours())
        gc.collect()
        time.sleep(0.01)


class Owner:
    """An object of the program that owns a split, and that the split is told to call."""

    split: ts.SplitModule
    others: tuple[Any, ...] = ()

    def changed(self, _: object) -> None:
        pass

    def compile(self, module: torch.nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: (self, module(*args, **kwargs))[1]


class Mine(HttpTransport):
    owner: Owner


def by_method(owner: Owner, url: str) -> ts.SplitModule:
    return split_of(url, on_replan=owner.changed)


def by_lambda(owner: Owner, url: str) -> ts.SplitModule:
    return split_of(url, on_replan=lambda decision: owner.changed(decision))


def by_partial(owner: Owner, url: str) -> ts.SplitModule:
    return split_of(url, on_replan=functools.partial(Owner.changed, owner))


def by_fixed_cut(owner: Owner, url: str) -> ts.SplitModule:
    return split_of(url, on_replan=owner.changed, partition=1)


def by_backend(owner: Owner, url: str) -> ts.SplitModule:
    return split_of(url, backend=owner.compile, partition=1)


def by_transport(owner: Owner, url: str) -> ts.SplitModule:
    transport = Mine(url)
    transport.owner = owner
    return split_of(transport, partition=1)


def by_model(owner: Owner, url: str) -> ts.SplitModule:
    model = net()
    split = split_of(url, model, partition=1)
    object.__setattr__(model, "owner", owner)
    return split


def by_future(owner: Owner, url: str) -> ts.SplitModule:
    split = split_of(url, partition=1)
    future = split.submit(EXAMPLE)
    future.add_done_callback(owner.changed)
    future.result(_PATIENCE_S)
    owner.others = (future,)
    return split


def by_map(owner: Owner, url: str) -> ts.SplitModule:
    split = split_of(url, partition=1)
    answers = split.map((owner, EXAMPLE)[1] for _ in range(9))
    next(answers)
    owner.others = (answers,)
    return split


def by_error(owner: Owner, url: str) -> ts.SplitModule:
    split = split_of(url, partition=1, fallback="error")
    owner.split = split
    split(EXAMPLE)
    try:
        split(torch.ones(3))
    except Exception as error:
        owner.others = (error,)
    return split


WAYS = [
    by_method, by_lambda, by_partial, by_fixed_cut, by_backend, by_transport, by_model, by_future, by_map, by_error,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_owner_that_its_split_refers_to_goes_with_its_threads(
    server: Server, way: Callable[[Owner, str], ts.SplitModule]
) -> None:
    references: list[weakref.ref[Any]] = []
    before = sockets()
    for _ in range(3):
        owner = Owner()
        owner.split = way(owner, server.url)
        with torch.no_grad():
            owner.split(EXAMPLE)
        references += [weakref.ref(owner), weakref.ref(owner.split)]
        del owner
    gone(references)
    end_s = time.monotonic() + _PATIENCE_S
    while len(sockets() - before) > 0:
        assert time.monotonic() < end_s, "a connection stays open"
        gc.collect()
        time.sleep(0.01)


def test_an_owner_goes_while_a_server_does_not_answer_the_handshake() -> None:
    def swallow(link: Any) -> None:
        while link.recv(1 << 16):
            pass

    with listening(swallow) as port:
        owner = Owner()
        owner.split = split_of(f"http://127.0.0.1:{port}", on_replan=owner.changed, partition=1, timeout_s=0.5)
        assert right(owner.split)
        reference = weakref.ref(owner)
        del owner
        gone([reference])


def test_a_function_that_nothing_else_refers_to_stays_as_long_as_the_split(
    server: Server, known: dict[str, Any]
) -> None:
    heard: list[Any] = []
    link = ts.Link("known", 1e9, 1e9, 1e-4)
    with split_of(server, link=link, on_replan=lambda one: heard.append(one), **known) as split:
        assert right(split)
        gc.collect()
        split._engine.servers.peers[0].adopt(ts.Link("slow", 1e3, 1e3, 5.0))
        until(lambda: bool(heard), split)


def test_an_in_process_transport_that_is_dropped_ends_its_thread() -> None:
    transport = InProcessTransport(lambda *_: None)
    reference = weakref.ref(transport)
    assert "torchsurgeon-in-process" in ours()
    del transport
    gone([reference])


@pytest.fixture
def busy(server: Server) -> Iterator[tuple[ts.SplitModule, threading.Event]]:
    """A split whose first head waits for the event, and whose other calls therefore wait for that."""
    go, begun = threading.Event(), threading.Event()
    split = split_of(server, partition=1)
    assert right(split)

    def head(*_: Any) -> Any:
        begun.set()
        assert go.wait(_PATIENCE_S)
        raise ts.ServerUnavailableError("over")

    split._engine.stream().submit(head)
    assert begun.wait(_PATIENCE_S)
    yield split, go
    go.set()
    split.close()


def test_futures_of_a_closed_module_say_why_they_were_cancelled(
    busy: tuple[ts.SplitModule, threading.Event],
) -> None:
    split, go = busy
    future = split.submit(EXAMPLE)
    threading.Timer(0.05, go.set).start()
    split.close()
    assert future.cancelled()
    with pytest.raises(CancelledError, match="the SplitModule has been closed"):
        future.result()
    with pytest.raises(CancelledError, match="the SplitModule has been closed"):
        future.exception()


def test_futures_of_a_dropped_module_say_why_they_were_cancelled(server: Server) -> None:
    go, begun = threading.Event(), threading.Event()

    def head() -> Any:
        begun.set()
        assert go.wait(_PATIENCE_S)
        raise ts.ServerUnavailableError("over")

    split = split_of(server, partition=1)
    split._engine.stream().submit(head)
    assert begun.wait(_PATIENCE_S)
    future = split.submit(EXAMPLE)
    threading.Timer(0.05, go.set).start()
    del split
    gc.collect()
    with pytest.raises(CancelledError, match="was dropped: keep a reference to it"):
        future.result(_PATIENCE_S)


def test_a_future_that_its_owner_cancelled_says_nothing_of_the_module(
    busy: tuple[ts.SplitModule, threading.Event],
) -> None:
    split, _ = busy
    future = split.submit(EXAMPLE)
    assert future.cancel()
    with pytest.raises(CancelledError) as caught:
        future.result()
    assert str(caught.value) == ""


def test_an_awaited_call_of_a_closed_module_is_an_error_and_no_cancellation(
    busy: tuple[ts.SplitModule, threading.Event],
) -> None:
    split, go = busy

    async def main() -> None:
        call = asyncio.create_task(split.acall(EXAMPLE))
        await asyncio.sleep(0)
        threading.Timer(0.05, go.set).start()
        await asyncio.to_thread(split.close)
        with pytest.raises(ts.ServerUnavailableError, match="the SplitModule has been closed; make a new one"):
            await call

    asyncio.run(main())


def test_dropped_connections_are_closed_without_a_warning(server: Server) -> None:
    assert Path("/proc/self/fd").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transport = HttpTransport(server.url)
        transport.probe(1, 1)
        del transport
        gc.collect()
