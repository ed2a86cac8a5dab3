"""The small classifier that tests of the runtime and of the server split: its servers, its profiles, its true answers.

``net``       the model, with the weights of a seed; ``EXAMPLE``, ``MODEL``, ``GRAPH`` and ``LAYERS`` go with it
``serve``     a server of it in this process; the fixture ``server`` is one that all tests share
``split_of``  it split against a server; ``right`` compares an answer of that with the model's own, and ``until`` calls
              it until something has happened
``profile``   its layers' times (and joules) on a machine of known speed
``remote``    whether the last answer is the server's, and ``degraded`` why it is not
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from serving import serving
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import Server

EXAMPLE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
# What is waited for comes in far less, but a machine that is busy with other things may take its time.
PATIENCE_S = 120.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.norm(self.stem(x))).mean((2, 3)))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval()


MODEL = net()
GRAPH = ts.trace(MODEL, EXAMPLE)
LAYERS = len(GRAPH.layers)


def truth(x: torch.Tensor, model: nn.Module = MODEL) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def serve(model: nn.Module = MODEL, port: int = 0) -> AbstractContextManager[Server]:
    return serving(model, EXAMPLE, port=port)


def split_of(where: Any, model: nn.Module | None = None, **options: Any) -> ts.SplitModule:
    """The classifier, or another ``model``, split against a server, a URL, a transport or a list of them."""
    where = where.url if isinstance(where, Server) else where
    return ts.SplitModule(net() if model is None else model, EXAMPLE, server=where, name="net", **options)


def right(split: ts.SplitModule, x: torch.Tensor = EXAMPLE, model: nn.Module = MODEL) -> bool:
    """Whether its answer is the model's own, to the bit."""
    with torch.no_grad():
        return torch.equal(split(x), model(x))


def until(what: Callable[[], bool], split: ts.SplitModule, call: Callable[[ts.SplitModule], bool] = right) -> None:
    """Call ``split`` until ``what``; every answer is right all the while."""
    end_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end_s, (split.last, split.stats())
        assert call(split)
        time.sleep(0.01)


def remote(split: ts.SplitModule) -> bool:
    return split.last is not None and split.last.server is not None and split.last.degraded is None


def degraded(split: ts.SplitModule) -> str:
    assert split.last is not None
    return split.last.degraded or ""


def profile(layer_s: float, layer_j: float | None = None) -> ts.LayerProfile:
    """A profile of a machine that takes so long, and so much, for each layer."""
    measured = ts.profile(GRAPH, repeats=2, warmup=1, meter=None).to_json()
    energy = None if layer_j is None else {
        "meter": "known", "idle_power_w": 1.0,
        "layer_j": [layer_j] * LAYERS, "interval_j": [[layer_j, layer_j]] * LAYERS, "whole_j": [layer_j * LAYERS] * 3,
    }  # fmt: skip
    times = {"samples_s": [[layer_s] * LAYERS] * 2, "whole_s": [layer_s * LAYERS] * 2}
    return ts.LayerProfile.from_json(measured | times | {"energy": energy})


class Frozen(nn.Module):
    """The model itself as a frozen part of another: what a split is compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return truth(x, self.model)


def top() -> nn.Linear:
    """The layer behind the frozen part, which is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(5, 2)
