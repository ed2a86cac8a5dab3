"""A clock that jumps, an hour ahead or back, costs no answer, and the server is used again soon after."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from classifier import net, remote, right, serve, split_of, until
from known_machines import FAST, device

import torchsurgeon as ts
from torchsurgeon.adapting import Decider, SlowdownEstimator
from torchsurgeon.adapting.sharing import Sharing
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.serve import Server
from torchsurgeon.tracing.step import Step
from torchsurgeon.transport import HttpTransport
from torchsurgeon.transport.base import Timing
from torchsurgeon.transport.deadline import Deadline

HOUR_S = 3600.0
ROOMS = ("torchsurgeon.runtime", "torchsurgeon.transport", "torchsurgeon.adapting")


class Clock:
    """Stands for the module ``time``, its clocks ``ahead_s`` of the true ones."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all that runs on the device. The server's does not jump."""
    clock = Clock()
    for name, module in list(sys.modules.items()):
        if name.startswith(ROOMS) and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", clock)
    for made in (SlowdownEstimator, Decider):
        monkeypatch.setitem(made.__init__.__kwdefaults__, "now_s", clock.monotonic)
    return clock


class Hook:
    """Calls ``what`` once when a layer runs, on whichever side has it; a model's own hooks would be part of it."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.what: Callable[[], object] | None = None
        Watching.hooks[id(layer)] = self

    def runs(self) -> None:
        what, self.what = self.what, None
        if what is not None:
            what()


class Watching:
    """Calls the hook of a layer before its step."""

    hooks: ClassVar[dict[int, Hook]] = {}

    def before(self, step: Step, environment: Any) -> None:
        hook = self.hooks.get(id(step.target))
        if hook is not None:
            hook.runs()

    def after(self, step: Step, environment: Any, token: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segment, "watcher", Watching())


@pytest.fixture(scope="module")
def hooked() -> Iterator[tuple[Server, Hook]]:
    """A server, and what happens while it works."""
    model = net()
    with serve(model) as running:
        yield running, Hook(model.head)


def numbers(told: Any) -> Iterator[float]:
    for value in told.values() if isinstance(told, dict) else told if isinstance(told, list) else [told]:
        if isinstance(value, (dict, list)):
            yield from numbers(value)
        elif isinstance(value, (int, float)):
            yield value


def sound(split: ts.SplitModule) -> bool:
    """Whether what is told of the past and believed of the present can be."""
    return all(math.isfinite(value) and value >= 0 for value in numbers(split.stats()))


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S], ids=["ahead", "back"])
@pytest.mark.parametrize("partition", [2, "auto"])
def test_a_jump_costs_no_answer(
    partition: int | str, jump_s: float, clock: Clock, hooked: tuple[Server, Hook], known: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    where, at_server = hooked
    model = net()
    at_head = Hook(model.stem)
    with split_of(where, model, partition=partition, link=FAST, backend=device, **known) as split:
        for by_s in (jump_s, -jump_s):

            def jump(by_s: float = by_s) -> None:
                clock.ahead_s += by_s

            for place in ("between calls", "in the head", "at the server"):
                until(lambda: remote(split), split)
                if place == "between calls":
                    jump()
                elif place == "in the head":
                    at_head.what = jump
                else:
                    at_server.what = jump
                for _ in range(5):
                    assert right(split), place
                    assert sound(split), (place, split.stats())
                # Where nothing runs before the cut.
                at_head.what = None
            until(lambda: remote(split), split)
            assert sound(split)


class Jumping(HttpTransport):
    """Its next probe ends with a jump of the clock by ``jump_s``."""

    def __init__(self, url: str, clock: Clock) -> None:
        super().__init__(url)
        self.clock, self.jump_s, self.probes, self.probing = clock, 0.0, 0, False

    def probe(self, *args: Any, **options: Any) -> Timing:
        self.probing = True
        timing = super().probe(*args, **options)
        self.probing = False
        self.clock.ahead_s += self.jump_s
        self.jump_s = 0.0
        self.probes += 1
        return timing


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S], ids=["ahead", "back"])
@pytest.mark.parametrize("place", ["in a pause", "in a probe"])
def test_a_link_that_is_better_is_noticed_after_a_jump(
    place: str, jump_s: float, clock: Clock, server: Server, known: dict[str, Any]
) -> None:
    torch.set_num_threads(1)

    def a_moment_later(split: ts.SplitModule) -> bool:
        """So that the pauses between probes, which are as long as probes over this link are costly, soon pass.

        A ping is due at every look of the keeper's thread, too.
        """
        if not where.probing:
            clock.ahead_s += 5.0
        return right(split)

    with (
        LinkEmulator(0, "127.0.0.1", server.port, FAST) as emulator,
        Jumping(f"http://127.0.0.1:{emulator.port}", clock) as where,
        split_of(where, link=FAST, backend=device, **known) as split,
    ):
        until(lambda: remote(split), split)
        # So slow that the device is better, even where it counts as twice as slow: a call in which the clock jumps does
        # that, and probes are sent only while no call shows the link.
        emulator.set_link(ts.Link("slower", 2e6, 2e6, 0.5))
        until(lambda: split.partition == split.graph.points[-1], split)
        if place == "in a probe":
            where.jump_s = jump_s
            until(lambda: where.jump_s == 0.0, split, a_moment_later)
            probes = where.probes
            # A server on trial is sent two in a row.
            until(lambda: where.probes > probes + 1, split, a_moment_later)
        else:
            clock.ahead_s += jump_s
            emulator.set_link(FAST)
            until(lambda: remote(split), split)
        assert sound(split)


def test_no_wait_is_longer_than_its_timeout(clock: Clock) -> None:
    deadline = Deadline(5.0)
    clock.ahead_s -= HOUR_S
    assert 0 < deadline.left_s() <= 5.0
    clock.ahead_s += 2 * HOUR_S
    with pytest.raises(TimeoutError):
        deadline.left_s()


def test_transfers_before_and_after_a_jump_do_not_overlap() -> None:
    sharing = Sharing()
    assert sharing.alone(1000, HOUR_S, HOUR_S + 1.0, 0) == (1000, 1.0)
    for begin_s in range(40):
        assert sharing.alone(1000, float(begin_s), begin_s + 0.5, 0) == (1000, 0.5)
