"""What timing every layer of an inference adds to it, beside the usual ways to time layers."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import torchsurgeon as ts
from benchmarks.support.networks import Network
from benchmarks.support.side_by_side import SideBySide
from torchsurgeon.meters import Clock, CudaEventClock, WallClock


class TimingInterpreter(fx.Interpreter):
    """The textbook way: a mark after each node."""

    def __init__(self, module: fx.GraphModule, mark: Callable[[], object]) -> None:
        super().__init__(module)
        self.mark = mark

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.mark()
        return value


def hooked(model: nn.Module, mark: Callable[[], object]) -> nn.Module:
    """The same model, its weights shared, with a mark before and after each of its layers."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)

    def before(module: nn.Module, args: Any) -> None:
        mark()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        mark()

    for layer in [module for module in twin.modules() if not list(module.children())]:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    return twin


def rivals(model: nn.Module, x: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    graph = ts.trace(model, x)
    whole = ts.tail_for(graph, [spec.name for spec in graph.inputs])
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def profiled() -> None:
        with torch.profiler.profile(activities=activities) as profiler:
            model(x)
        profiler.key_averages()

    if device.type == "cuda":
        clock: Clock = CudaEventClock(len(whole.steps) + 1)
        mark: Callable[[], object] = lambda: torch.cuda.Event(enable_timing=True).record()  # noqa: E731
    else:
        clock, mark = WallClock(), time.perf_counter_ns

    def timed() -> None:
        whole.timed([x], clock.mark)
        clock.intervals_ns()

    interpreter, with_hooks = TimingInterpreter(fx.symbolic_trace(model), mark), hooked(model, mark)
    return {
        "the model, not timed": lambda: model(x),
        "torchsurgeon, not timed": lambda: whole(x),
        "torchsurgeon": timed,
        "module hooks": lambda: with_hooks(x),
        "fx.Interpreter": lambda: interpreter.run(x),
        "torch.profiler": profiled,
    }


@pytest.mark.benchmark(group="timing every layer")
@pytest.mark.parametrize("name", ["chain of 200", "mobilenet_v3_large", "resnet50"])
def test_timing_every_layer(name: str, side_by_side: SideBySide, network: Network, device: torch.device) -> None:
    model, x = network(name)
    layers = len(ts.trace(model, x).layers)
    for stats in side_by_side(rivals(model, x, device)).values():
        added_us = {key: value / layers * 1e6 for key, value in stats.extra_info["added_s"].items()}
        stats.extra_info |= {"layers": layers, "added_us_per_layer": added_us}
