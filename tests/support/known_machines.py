"""A model split between a device and a server whose speeds are known, so that the choice is known, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.cutting.partition import Head
from torchsurgeon.transport import Answer, Transport

EXAMPLE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


PATIENCE_S = 30.0


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(196, 10)
        ).eval()


MODEL = net()
GRAPH = ts.trace(MODEL, EXAMPLE)
LAYERS = len(GRAPH.layers)
FAST, SLOW = ts.Link("fast", 1e9, 1e9, 1e-3), ts.Link("slow", 1e5, 1e5, 0.3)


def profile(layer_s: float) -> ts.LayerProfile:
    """A profile of a machine that takes so long for each layer."""
    measured = ts.profile(GRAPH, repeats=2, warmup=1, meter=None)
    return ts.LayerProfile.from_json(
        measured.to_json() | {"samples_s": [[layer_s] * LAYERS] * 2, "whole_s": [layer_s * LAYERS] * 2}
    )


def device(module: nn.Module) -> Callable[..., Any]:
    """A backend of a device that takes what its profile says, for the whole model or a part of it."""
    segment = module.segment if isinstance(module, Head) else module
    layers = LAYERS if isinstance(module, nn.Sequential) else len({*segment.steps} & {*GRAPH.flow.layers})

    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01 * layers)
        return module(*args, **kwargs)

    return run


def split_of(where: Any, **options: Any) -> ts.SplitModule:
    return ts.SplitModule(net(), EXAMPLE, server=where, name="net", **options)


def right(split: ts.SplitModule, x: torch.Tensor = EXAMPLE) -> bool:
    with torch.no_grad():
        return torch.equal(split(x), MODEL(x))


def until(what: Callable[[], bool], split: ts.SplitModule) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end_s, (split.last, split.stats())
        assert right(split)
        time.sleep(0.01)


class Between(Transport):
    """Hands on to another transport, after ``delay_s``, and may tell another load than the server's."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner.timeout_s)
        self.inner, self.delay_s, self.told, self.asked = inner, 0.0, {}, 0

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self.inner.get_json(path, timeout_s=timeout_s)

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        self.asked += 1
        deadline = options["deadline"]
        end_s = time.monotonic() + self.delay_s
        while time.monotonic() < end_s:
            deadline.left_s()
            time.sleep(0.002)
        answer = self.inner.infer(model, tensors, **options)
        timing = answer.timing._replace(end_s=answer.timing.end_s + self.told.get("queue_s", 0.0))
        return Answer(answer.tensors, {**answer.parameters, **self.told}, timing)

    def probe(self, up_bytes: int, down_bytes: int, **options: Any) -> Any:
        return self.inner.probe(up_bytes, down_bytes, **options)

    def _post(self, *_: Any) -> Any:
        raise AssertionError

    def close(self) -> None:
        self.inner.close()
