"""What a SplitModule adds to an inference: checking, estimating, deciding, bookkeeping, and being able to fall back.

On the device it is compared with the model itself. Over a server it is compared with the same done by hand: the head is
called, its tensors are sent with the transport and checksums both ways, and the answer is taken. The model is tiny, so
that little else is timed. The profiles say that the device is slow behind that partition and the server before it, so
that a SplitModule which decides cuts there, too.

* ``by a thread``: by hand, sent by another thread, which is the simplest way to be free when the answer is late.
* ``fixed``: a SplitModule with the same partition and ``fallback="error"``, which checks weights and answers.
* ``adaptive``: one that also estimates and decides at every inference, among all cuts.
* ``with fallback``: one that can fall back as well, and so has to be free when the answer is late.

Every call checks that the model is still the one that was traced (``premises``) and that its weights are those of the
handshake (``weights``), and reads a few of their bytes. That is timed by itself, on models of 150 modules and on one of
2,000, and compared with one pass over the modules and one over the tensors, which do nothing but look at each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import torchsurgeon as ts
from benchmarks.support.networks import Network
from benchmarks.support.served import SLOWER, tiny
from benchmarks.support.side_by_side import SideBySide
from benchmarks.support.tail_process import TailProcess, in_process
from torchsurgeon.models.checksums import Sample
from torchsurgeon.models.premises import Premises
from torchsurgeon.models.weights import Snapshot
from torchsurgeon.tracing.reading import plain_tensors, read_model
from torchsurgeon.transport import HttpTransport, Transport

AT = 2


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with TailProcess(tiny) as server:
        yield server.url


@pytest.mark.benchmark(group="all on the device")
@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_large", "resnet50"])
def test_on_the_device(name: str, side_by_side: SideBySide, network: Network) -> None:
    model, x = network(name)
    with ts.SplitModule(model, x, partition="device") as split:
        side_by_side({"the model": lambda: model(x), "SplitModule": lambda: split(x)})


@pytest.mark.benchmark(group="all on the device, a tiny model", min_time=2e-3)
def test_staying(side_by_side: SideBySide, device: torch.device, url: str) -> None:
    model, x = tiny(0)
    model, x = model.to(device), x.to(device)
    here = ts.profile(ts.trace(model, x), meter=None)
    with ts.SplitModule(model, x, server=url, device_profile=here, server_profile=here.scaled(SLOWER)) as split:
        side_by_side({"the model": lambda: model(x), "SplitModule, adaptive": lambda: split(x)})


@pytest.mark.benchmark(group="a tiny model with a server", min_time=10e-3)
@pytest.mark.parametrize("where", ["in this process", "over HTTP"])
def test_sending(where: str, side_by_side: SideBySide, device: torch.device, url: str) -> None:
    with ExitStack() as stack:
        transport = stack.enter_context(HttpTransport(url) if where == "over HTTP" else in_process(tiny))
        side_by_side(ways_over(transport, device, stack))


@pytest.mark.benchmark(group="what every call checks")
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "2,000 modules"])
def test_checking(name: str, side_by_side: SideBySide, network: Network) -> None:
    model = many_modules() if name == "2,000 modules" else network(name)[0]
    reading = read_model(model)
    premises, weights = Premises(model, reading), Snapshot(model, plain_tensors(model, reading).values())
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    side_by_side(
        {
            "one look at each module": lambda: [module.training for module in modules],
            "one look at each tensor": lambda: [tensor.data_ptr() for tensor in tensors],
            "premises": premises.hold,
            "weights": weights.same_weights,
            "a few bytes of the weights": Sample(weights.tensors).same,
        }
    )


def many_modules() -> nn.Module:
    blocks = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)) for _ in range(500))
    return nn.Sequential(*blocks).eval()


def slowed(profile: ts.LayerProfile, factors: NDArray[np.float64]) -> ts.LayerProfile:
    """Return a profile in which each layer takes so many times as long."""
    samples_s = profile.samples_s * factors
    return dataclasses.replace(profile, samples_s=samples_s, whole_s=samples_s.sum(axis=1))


def ways_over(transport: Transport, device: torch.device, stack: ExitStack) -> dict[str, Callable[[], object]]:
    model, x = tiny(0)
    model, x = model.to(device), x.to(device)
    graph = ts.trace(model, x)
    head = ts.cut(graph, AT).head
    names = [spec.name for spec in graph.point(AT).tensors]
    answered = graph.outputs[0].name
    sender = stack.enter_context(ThreadPoolExecutor(1))
    options: dict[str, Any] = {"max_answer_bytes": 1 << 16, "crc32": True}

    def by_hand() -> torch.Tensor:
        tensors = dict(zip(names, head(x), strict=True))
        return transport.infer("model", tensors, **options).tensors[answered].to(device)

    def by_a_thread() -> torch.Tensor:
        tensors = dict(zip(names, head(x), strict=True))
        return sender.submit(transport.infer, "model", tensors, **options).result().tensors[answered].to(device)

    here = ts.profile(graph, meter=None)
    before = np.arange(len(graph.layers)) < AT
    known: dict[str, Any] = {
        "server": transport,
        "device_profile": slowed(here, np.where(before, 1.0, SLOWER)),
        "server_profile": slowed(here, np.where(before, SLOWER, 1.0)),
    }
    fixed = stack.enter_context(ts.SplitModule(model, x, partition=AT, fallback="error", **known))
    adaptive = stack.enter_context(ts.SplitModule(model, x, fallback="error", **known))
    with_fallback = stack.enter_context(ts.SplitModule(model, x, **known))
    return {
        "by hand": by_hand,
        "by a thread": by_a_thread,
        "fixed": lambda: fixed(x),
        "adaptive": lambda: adaptive(x),
        "with fallback": lambda: with_fallback(x),
    }
