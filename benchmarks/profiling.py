"""What timing every layer costs, against the eager model and beside the usual ways to do it.

Every way runs once a round, in a new random order, in one process on one thread. Ratios are those of each round, of
seconds and of the thread's processor time, which a busy machine disturbs less. The chain of 200 one-element layers
shows the cost a layer without any work to hide it.

    python -m benchmarks.profiling [--rounds 60] [--out benchmarks/results/profiling.json]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torchvision.models import get_model

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.errors import NoisyProfileWarning

MODELS = ("alexnet", "mobilenet_v3_large", "resnet50")
CHAIN = 200
Run = Callable[[], Any]
Seconds = tuple[float, float]  # on the wall, on the processor


class TimingInterpreter(fx.Interpreter):
    """The textbook way: a clock around each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.nodes_ns: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        begin = time.perf_counter_ns()
        value = super().run_node(n)
        self.nodes_ns[n.name] = time.perf_counter_ns() - begin
        return value


def ways(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Seconds]]:
    graph = ts.trace(model, x)
    whole = tail_for(graph, [spec.name for spec in graph.inputs])
    interpreter = TimingInterpreter(fx.symbolic_trace(model))
    leaves = [module for module in model.modules() if not list(module.children())]
    begun: dict[nn.Module, int] = {}
    taken: dict[nn.Module, int] = {}

    def before(module: nn.Module, args: Any) -> None:
        begun[module] = time.perf_counter_ns()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        taken[module] = time.perf_counter_ns() - begun[module]

    def hooked() -> Seconds:
        hooks = [
            hook
            for leaf in leaves
            for hook in (leaf.register_forward_pre_hook(before), leaf.register_forward_hook(after))
        ]
        # Putting hooks on and taking them off again is not their cost a run.
        taken_s = seconds_of(lambda: model(x))()
        for hook in hooks:
            hook.remove()
        return taken_s

    def profiled() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(x)
        profiler.key_averages()

    return {
        "eager": seconds_of(lambda: model(x)),
        "torchsurgeon": seconds_of(lambda: whole.timed([x], time.perf_counter_ns)),
        "torchsurgeon, not timed": seconds_of(lambda: whole(x)),
        "module hooks": hooked,
        "fx.Interpreter": seconds_of(lambda: interpreter.run(x)),
        "torch.profiler": seconds_of(profiled),
    }


def seconds_of(run: Run) -> Callable[[], Seconds]:
    def measured() -> Seconds:
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        run()
        return time.perf_counter() - begin, time.thread_time() - cpu_begin

    return measured


def compare(model: nn.Module, x: torch.Tensor, rounds: int, layers: int) -> dict[str, Any]:
    order = random.Random(0)
    runs = list(ways(model, x).items())
    seconds: dict[str, list[Seconds]] = {name: [] for name, _ in runs}
    for round_number in range(-3, rounds):
        order.shuffle(runs)
        for name, run in runs:
            taken = run()
            if round_number >= 0:
                seconds[name].append(taken)
    rows = {}
    for name, samples in seconds.items():
        wall, cpu = zip(*samples, strict=True)
        eager_wall, eager_cpu = zip(*seconds["eager"], strict=True)
        ratios = [taken / eager for taken, eager in zip(wall, eager_wall, strict=True)]
        cpu_ratios = [taken / eager for taken, eager in zip(cpu, eager_cpu, strict=True)]
        extra = [(taken - eager) * 1e6 / layers for taken, eager in zip(wall, eager_wall, strict=True)]
        rows[name] = {
            "seconds": spread(wall),
            "ratio_to_eager": spread(ratios),
            "processor_ratio_to_eager": spread(cpu_ratios),
            "extra_us_per_layer": spread(extra),
        }
        print(
            f"  {name:24} {statistics.median(wall) * 1e3:9.3f} ms   ratio {text(ratios, 3)}   "
            f"processor {text(cpu_ratios, 3)}   µs a layer {text(extra, 2)}"
        )
    return rows


def spread(samples: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": middle, "low_quartile": low, "high_quartile": high, "samples": len(samples)}


def text(samples: Sequence[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(samples, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def sum_of_layers(model: nn.Module, x: torch.Tensor, repeats: int) -> dict[str, Any]:
    """How the layers' sum compares with the whole model: of medians, and pass by pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoisyProfileWarning)
        measured = ts.profile(ts.trace(model, x), inputs=[x], repeats=repeats, meter=None)
    passes = (measured.samples_s.sum(axis=1) / measured.whole_s).tolist()
    print(f"  {'sum of layers / whole':24} medians {1 / measured.whole_to_sum:.3f}   pass by pass {text(passes, 3)}")
    return {"of_medians": 1 / measured.whole_to_sum, "pass_by_pass": spread(passes)}


def chain() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*(nn.ReLU() if i % 2 else nn.Identity() for i in range(CHAIN))).eval(), torch.zeros(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=RESULTS / "profiling.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with torch.no_grad():
        print(f"chain of {CHAIN} one-element layers")
        results["chain"] = {"layers": CHAIN, "ways": compare(*chain(), max(options.rounds, 200), CHAIN)}
        for name in options.models:
            model, x = get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224)
            layers = len(ts.trace(model, x).layers)
            print(f"{name}, {layers} layers")
            results[name] = {
                "layers": layers,
                "ways": compare(model, x, options.rounds, layers),
                "sum_to_whole": sum_of_layers(model, x, options.rounds),
            }
    write(options.out, results)


if __name__ == "__main__":
    main()
