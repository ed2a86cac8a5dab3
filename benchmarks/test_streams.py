"""A clip of frames by ``SplitModule.map``, beside one call after another and calls from a pool of threads.

AlexNet on photographs over emulated links. The device is paced to take what its profile says, 0.4 s for the whole
model, and runs one part at a time, so that only the link, the server and the runtime differ; the server is a process on
a core of its own where there is one. ``map`` chooses its cut for the rate, and the others use the same one. The medians
of single calls say what each stage takes alone: the head with encoding, the bytes at the link's rate each way, the
tail. No pipeline answers more often than once in the slowest stage's time, which is the ``bound_s`` of a frame.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import torchsurgeon as ts
from benchmarks.support.paced_device import paced, warm
from benchmarks.support.served import alexnet
from benchmarks.support.side_by_side import SideBySide
from benchmarks.support.tail_process import TailProcess, two_cores
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import PRESETS
from torchsurgeon.transport import HttpTransport

Backend = Callable[[torch.nn.Module], Callable[..., Any]]

DEVICE_S = 0.4
FRAMES = 10
WORKERS = 4


@dataclasses.dataclass
class Sides:
    """A paced device and the port of a server, and what a SplitModule between them is told."""

    model: torch.nn.Module
    x: torch.Tensor
    port: int
    known: dict[str, Any]


@pytest.fixture(scope="module")
def sides(device: torch.device) -> Iterator[Sides]:
    everywhere = os.sched_getaffinity(0)
    own, other = two_cores()
    with TailProcess(alexnet, core=other) as server:
        if own is not None:
            os.sched_setaffinity(0, {own})
        model, x = alexnet(0)
        model, x = model.to(device), x.to(device)
        graph, here, pace = paced(model, x, DEVICE_S)
        with HttpTransport(server.url) as direct:
            there = ts.LayerProfile.from_json(direct.get_json("/v2/models/model/profile"))
        known = {"device_profile": here, "server_profile": there, "backend": one_at_a_time(pace.wrap)}
        with ts.SplitModule(model, x, server=server.url, **known) as first:
            # Not over the link, which requests that are given up would leave full.
            warm(first, x, ts.Frontier.build(graph, here, there).rows)
        yield Sides(model, x, server.port, known)
        os.sched_setaffinity(0, everywhere)


def one_at_a_time(backend: Backend) -> Backend:
    """The same device for several threads: while it runs one part, the others wait."""
    busy = threading.Lock()

    def wrap(module: torch.nn.Module) -> Callable[..., Any]:
        run = backend(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            with busy:
                return run(*args, **kwargs)

        return call

    return wrap


def stages(split: ts.SplitModule, x: torch.Tensor, link: ts.Link) -> dict[str, float]:
    """Seconds that each stage of a frame takes alone."""
    taken: dict[str, list[float]] = {"head": [], "uplink": [], "tail": [], "downlink": []}
    for _ in range(9):
        split(x)
        last = split.last
        assert last is not None
        taken["head"].append(last.head_s + last.encode_s)
        taken["uplink"].append(link.uplink_s(last.sent_bytes))
        taken["tail"].append(last.tail_s)
        taken["downlink"].append(link.downlink_s(last.received_bytes))
    return {stage: statistics.median(times) for stage, times in taken.items()}


@pytest.mark.benchmark(group=f"a clip of {FRAMES} frames", min_rounds=3)
@pytest.mark.parametrize("name", ["3g", "lte", "wifi"])
def test_clip(name: str, side_by_side: SideBySide, sides: Sides) -> None:
    x, clip = sides.x, [sides.x] * FRAMES
    with ExitStack() as stack:
        emulator = stack.enter_context(LinkEmulator(0, "127.0.0.1", sides.port, PRESETS[name]))
        server = f"http://127.0.0.1:{emulator.port}"
        streaming, calling = (
            stack.enter_context(ts.SplitModule(sides.model, x, server=server, **sides.known)) for _ in range(2)
        )
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS))
        streaming(x)
        list(streaming.map(clip))
        assert streaming.last is not None
        cut = calling.partition = streaming.partition = streaming.last.partition
        alone = stages(calling, x, PRESETS[name])
        found = side_by_side(
            {
                "one by one": lambda: [calling(frame) for frame in clip],
                f"{WORKERS} threads": lambda: list(pool.map(calling, clip)),
                "map": lambda: list(streaming.map(clip)),
            }
        )
    slowest = max(alone, key=alone.__getitem__)
    for stats in found.values():
        stats.extra_info |= {"cut": cut.name, "stages_s": alone, "slowest": slowest, "bound_s": alone[slowest]}
        stats.extra_info["answers_a_s"] = FRAMES / stats.stats.median
        stats.extra_info["of_the_bound"] = FRAMES * alone[slowest] / stats.stats.median
