"""Everything on the device: eager PyTorch, torch.compile, ONNX Runtime and OpenVINO, as a user would call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.backends import bare_runtime
from benchmarks.evaluate.rivals.rival import Rival
from benchmarks.support import exports
from torchsurgeon.backends import Part
from torchsurgeon.emulate import SlowDevice
from torchsurgeon.tracing.graph import LayerGraph

RUNTIMES = {
    "onnxruntime": "device, ONNX Runtime",
    "openvino": "device, OpenVINO f32",
    "openvino:bf16": "device, OpenVINO bf16",
}


class OnDevice(Rival):
    """A whole network on the slow device.

    Args:
        name: what tables call it.
        run: runs the network once on the example.
        device: the slow device.
    """

    def __init__(self, name: str, run: Callable[[], Tensor], device: SlowDevice) -> None:
        super().__init__(name)
        self._run, self._device = run, device

    def infer(self) -> Tensor:
        """Return the network's answer for its example."""
        return self._device.call(self._run)


def all_of(model: nn.Module, example: Tensor, graph: LayerGraph, device: SlowDevice) -> Iterator[OnDevice]:
    """Yield a network by each runtime of the device, ready to be called."""
    yield OnDevice("device, eager", lambda: model(example), device)
    compiled = torch.compile(model)
    compiled(example)
    yield OnDevice("device, torch.compile", lambda: compiled(example), device)
    whole = Part.head(graph, graph.points[-1])
    with exports.made_once():
        for backend, name in RUNTIMES.items():
            run = whole_by(backend, whole, example)
            yield OnDevice(name, run, device)


def whole_by(backend: str, whole: Part, example: Tensor) -> Callable[[], Tensor]:
    """Return a call of a runtime itself on a whole network, for what the example's memory holds at that time."""
    bare = bare_runtime(backend, whole, [example])
    assert bare is not None
    run: Callable[[], Any] = bare

    def answer() -> Tensor:
        # What OpenVINO returns is its own memory, which the next call overwrites.
        return torch.from_numpy(run()[0].copy())

    return answer
