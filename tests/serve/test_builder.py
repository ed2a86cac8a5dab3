"""A backend builds each tail once, and however many requests come meanwhile, few of them wait to be built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from waiting import wait_for

import torchsurgeon as ts
from torchsurgeon.backends import Backend, Part
from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.errors import ModelFailedError, ModelNotReadyError
from torchsurgeon.serve import ModelRegistry
from torchsurgeon.serve.builder import TailBuilder
from torchsurgeon.serve.received import Received

X = torch.rand(1, 8, generator=torch.Generator().manual_seed(0))
# How many tails wait at most.
MOST = 8


class Slow(Backend):
    """Builds only once it may, and counts what it builds."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__()
        self.built: list[Part] = []
        self.begun, self.may = threading.Semaphore(0), threading.Event()

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        self.begun.release()
        self.may.wait(20)
        self.built.append(part)
        return part.segment


@pytest.fixture
def slow() -> Iterator[Slow]:
    found = Slow()
    yield found
    found.may.set()


def layers(count: int) -> ts.LayerGraph:
    return ts.trace(nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)]).eval(), X)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_requests_whose_plans_are_not_kept_ask_for_their_tail_once(slow: Slow) -> None:
    graph = layers(3)
    builder = TailBuilder("net", graph, slow, 64)
    names = tuple(spec.name for spec in graph.inputs)
    tail = tail_for(graph, names, flat=True)
    copied: list[Tensor] = []

    class Watched(Tensor):
        def clone(self) -> Tensor:  # type: ignore[override]
            copied.append(self)
            return super().clone()

    builder.run(names, tail)(X)
    assert slow.begun.acquire(timeout=20)
    for _ in range(50):
        # As a request under a codec that varies has it, or one with an id of its own that nobody has seen.
        builder.run(names, tail)(X.as_subclass(Watched))
    assert builder._jobs.qsize() == 0
    assert not copied
    slow.may.set()
    wait_for(lambda: [one.tried for one in builder.built()] == [True])
    builder.close()
    assert len(slow.built) == 1


def test_of_many_tails_only_some_wait_and_the_others_are_built_when_they_are_asked_for_again(slow: Slow) -> None:
    graph = layers(MOST + 6)
    builder = TailBuilder("net", graph, slow, 64)
    cuts = [tuple(spec.name for spec in point.tensors) for point in graph.points[:-1]]
    tails = [tail_for(graph, names, flat=True) for names in cuts]

    def ask() -> None:
        for names, tail in zip(cuts, tails, strict=True):
            builder.run(names, tail)(X)

    ask()
    assert slow.begun.acquire(timeout=20)
    ask()
    assert builder._jobs.qsize() == MOST
    slow.may.set()

    def all_built() -> bool:
        ask()
        return all(one.tried for one in builder.built())

    wait_for(all_built)
    assert len(slow.built) == len(cuts) > MOST + 1
    builder.close()


def test_a_server_that_is_closed_builds_nothing_more(slow: Slow) -> None:
    graph = layers(6)
    builder = TailBuilder("net", graph, slow, 64)
    for point in graph.points[:-1]:
        names = tuple(spec.name for spec in point.tensors)
        builder.run(names, tail_for(graph, names, flat=True))(X)
    assert slow.begun.acquire(timeout=20)
    assert builder._thread is not None
    builder.close()
    slow.may.set()
    builder._thread.join(20)
    assert not builder._thread.is_alive()
    assert len(slow.built) == 1


def test_a_tail_is_built_for_others_where_the_model_refuses_what_was_sent_first(slow: Slow) -> None:
    slow.may.set()
    registry = ModelRegistry(profiler=None)
    served = registry.add(
        "net", nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)).eval(), torch.tensor([[1, 2]]), backend=slow
    )

    def ask(last: int) -> None:
        body = b'{"inputs":[{"name":"input","datatype":"INT64","shape":[1,2],"data":[1,%d]}]}' % last
        served.answer(Received(memoryview(body), None, 0.0, 0.0))

    (builder,) = served.backends.builders.values()
    for _ in range(2):
        with pytest.raises(ModelFailedError):
            ask(9)
        wait_for(lambda: not any(tail.asked for tail in builder._tails.values()))
    assert not slow.built

    def is_built() -> bool:
        ask(2)
        return all(one.tried for one in builder.built())

    wait_for(is_built)
    assert len(slow.built) == 1
    registry.close()


def test_who_asks_for_a_profile_that_is_being_measured_is_told_so_without_waiting_for_a_thread(slow: Slow) -> None:
    slow.may.set()
    registry = ModelRegistry(concurrency=1)
    served = registry.add("net", nn.Linear(8, 2).eval(), X, backend=slow)
    (builder,) = served.backends.builders.values()
    builder.measuring = True
    busy, begun = threading.Event(), threading.Event()
    served.profile().result(60)
    running = served.worker.submit(lambda: (begun.set(), busy.wait(20)))
    assert begun.wait(20)
    with pytest.raises(ModelNotReadyError, match="is being measured; ask again"):
        served.profile("slow")
    assert served.profile("eager").done()
    with pytest.raises(ts.ProtocolError):
        served.profile("none")
    busy.set()
    running.result(20)
    registry.close()
