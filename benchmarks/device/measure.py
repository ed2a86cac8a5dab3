"""What the native hooks measure and cost on the device at hand: kernels by layer, clocks, overheads and layer times.

Each step writes a JSON file of its own to the output folder, with its environment, and again after each model, so that
a step that is cut short leaves what it had. On a CPU there are no kernels, and the clocks and overheads are the host's.
Runs that are compared take turns within each round.

    python -m benchmarks.device.measure --device cuda --out results/
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon import _native, hooks, meters
from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.profiling import layer_trace, provenance

MODELS = ("alexnet", "resnet50", "vit_b_16")
CHAIN = 200
Run = Callable[[], Any]


def environment(device: str) -> dict[str, Any]:
    facts = provenance(device) | {"extension": _native.available()}
    if device == "cuda":
        facts["driver"] = driver()
        facts["meter"] = meters.find_meter("cuda").name
    return facts


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    except OSError as error:
        return str(error)


def model_and_input(name: str, device: str) -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import get_model

    return get_model(name, weights=None).eval().to(device), torch.rand(1, 3, 224, 224, device=device)


def clock_for(device: str, capacity: int) -> meters.Clock:
    return meters.CudaEventClock(capacity) if device == "cuda" else meters.WallClock()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(samples: Iterable[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": middle, "low_quartile": low, "high_quartile": high}


def layer_times(name: str, device: str, repeats: int) -> dict[str, Any]:
    """The model's profile: seconds, memory and joules of every layer, beside the whole model's."""
    model, x = model_and_input(name, device)
    profile = ts.profile(ts.trace(model, x), device, inputs=[x], repeats=repeats, warmup=5)
    print(profile)
    return {"sum_to_whole": profile.sum_to_whole, "spread": profile.spread, "profile": profile.to_json()}


def kernels(name: str, device: str, out: Path) -> dict[str, Any]:
    model, x = model_and_input(name, device)
    try:
        trace = layer_trace(ts.trace(model, x), device, [x])
    except TorchSurgeonError as error:
        print(f"{name:12} no kernels: {error}")
        return {"model": name, "error": str(error)}
    print(f"\n{name}\n{trace.table()}")
    if name == MODELS[0]:
        with gzip.open(out / f"{name}-trace.json.gz", "wt", encoding="utf-8") as file:
            json.dump(trace.to_chrome(), file)
    rows = [vars(row) for row in trace.by_layer()]
    outside = sum(kernel.layer == "(outside any layer)" for kernel in trace.kernels)
    return {
        "model": name,
        "kernels": len(trace.kernels),
        "outside_layers": outside,
        "dropped": trace.dropped,
        "layers": rows,
    }


def clocks(name: str, device: str, repeats: int) -> dict[str, Any]:
    """Each layer's seconds by CUDA events beside those of its kernels by CUPTI, which no event can undercut.

    An event is recorded on the stream before and after a layer's kernels, so its interval holds the kernels and the
    gaps between them. On a CPU there are only the seconds of the clock, and the kernels' are left out.
    """
    model, x = model_and_input(name, device)
    graph = ts.trace(model, x)
    profile = ts.profile(graph, device, inputs=[x], repeats=repeats, warmup=5, meter=None)
    event_s = dict(zip(profile.layers, map(float, profile.layer_s), strict=True))
    found: dict[str, Any] = {"model": name, "clock": profile.provenance["clock"], "event_s": event_s}
    try:
        rows = layer_trace(graph, device, [x]).by_layer()
    except TorchSurgeonError as error:
        print(f"{name:20} {profile.provenance['clock']}: {sum(event_s.values()) * 1e3:.3f} ms; no kernels: {error}")
        return found | {"error": str(error)}
    kernel_s = {row.name: row.busy_s / row.calls for row in rows if row.calls}
    known = [layer for layer in event_s if kernel_s.get(layer)]
    if len(known) < 2:
        print(f"{name:20} {profile.provenance['clock']}: {sum(event_s.values()) * 1e3:.3f} ms; no kernels by layer")
        return found
    ratios = [event_s[layer] / kernel_s[layer] for layer in known]
    found |= {
        "kernel_s": kernel_s,
        "event_to_kernel": spread(ratios),
        "below_kernels": sum(ratio < 1 for ratio in ratios),
        "sum_event_s": sum(event_s.values()),
        "sum_kernel_s": sum(kernel_s[layer] for layer in known),
    }
    print(
        f"{name:20} events {found['sum_event_s'] * 1e3:.3f} ms, kernels {found['sum_kernel_s'] * 1e3:.3f} ms; "
        f"a layer's event over its kernels: median {found['event_to_kernel']['median']:.2f}; below 1 in "
        f"{found['below_kernels']} of {len(known)} layers"
    )
    return found


def in_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; the order turns from round to round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-3, rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = time.perf_counter()
            runs[name]()
            if index >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def chain_overhead(device: str, rounds: int) -> dict[str, Any]:
    """Cost a layer of a mark after each of 200 one-element layers in a straight line."""
    layers = [nn.Identity() if index % 2 else nn.ReLU() for index in range(CHAIN)]
    x = torch.zeros(1, device=device)

    def marked(mark: Callable[[], Any]) -> None:
        y = x
        mark()
        for layer in layers:
            y = layer(y)
            mark()
        synchronize(device)

    def plain() -> None:
        y = x
        for layer in layers:
            y = layer(y)
        synchronize(device)

    def profiled() -> None:
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(
            activities=[activity.CPU, *([activity.CUDA] if device == "cuda" else [])]
        ) as profiler:
            plain()
        profiler.key_averages()

    runs: dict[str, Run] = {"eager": plain}
    clock = clock_for(device, CHAIN + 1)

    def clocked() -> None:
        marked(clock.mark)
        clock.intervals_ns()

    runs[clock.name] = clocked
    if device == "cuda":

        def torch_events() -> None:
            marked(lambda: torch.cuda.Event(enable_timing=True).record())

        runs["torch.cuda.Event"] = torch_events
    if _native.available():
        recorder = hooks.SpanRecorder(CHAIN + 1)

        def spans() -> None:
            recorder.clear()
            y = x
            for index, layer in enumerate(layers):
                slot = recorder.begin(index)
                y = layer(y)
                recorder.end(slot)
            synchronize(device)

        def span_marks() -> None:
            recorder.clear()
            y, mark = x, recorder.mark
            for index, layer in enumerate(layers):
                mark(index)
                y = layer(y)
            mark(-1)
            synchronize(device)

        runs["spans"] = spans
        runs["span marks"] = span_marks
    runs["torch.profiler"] = profiled
    with torch.no_grad():
        return compared(in_turns(runs, rounds), CHAIN)


def model_overhead(name: str, device: str, rounds: int) -> dict[str, Any]:
    """A real model, plain and with a clock read after each step."""
    model, x = model_and_input(name, device)
    graph = ts.trace(model, x)
    whole = tail_for(graph, [spec.name for spec in graph.inputs])
    clock = clock_for(device, len(whole.steps) + 1)

    def eager() -> None:
        model(x)
        synchronize(device)

    def clocked() -> None:
        whole.timed([x], clock.mark)
        clock.intervals_ns()

    with torch.no_grad():
        return compared(in_turns({"eager": eager, clock.name: clocked}, rounds), len(whole.steps))


def compared(seconds: dict[str, list[float]], layers: int) -> dict[str, Any]:
    eager = seconds["eager"]
    rows: dict[str, Any] = {}
    for name, samples in seconds.items():
        ratios = [sample / base for sample, base in zip(samples, eager, strict=True)]
        extra_us = (statistics.median(samples) - statistics.median(eager)) * 1e6 / layers
        rows[name] = {"seconds": spread(samples), "ratio_to_eager": spread(ratios), "extra_us_per_layer": extra_us}
        ratio = rows[name]["ratio_to_eager"]
        print(
            f"  {name:18} {statistics.median(samples) * 1e3:9.3f} ms  ratio {ratio['median']:.3f} "
            f"({ratio['low_quartile']:.3f} … {ratio['high_quartile']:.3f})  {extra_us:+8.2f} µs a layer"
        )
    return rows


STEPS = ("kernels", "clocks", "overhead", "layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, nargs="+", default=STEPS)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)
    facts = environment(options.device)

    def write(name: str, content: Any) -> None:
        text = json.dumps({"environment": facts, "results": content}, indent=1)
        (options.out / f"{name}.json").write_text(text + "\n")

    print(json.dumps(facts, indent=1))
    measured: dict[str, Callable[[str], Any]] = {
        "kernels": lambda name: kernels(name, options.device, options.out),
        "clocks": lambda name: clocks(name, options.device, options.rounds),
        "overhead": lambda name: model_overhead(name, options.device, options.rounds),
        "layers": lambda name: layer_times(name, options.device, options.rounds),
    }
    for step in options.step:
        print(f"\n{step}")
        results: dict[str, Any] = {}
        if step == "overhead":
            print(f"chain of {CHAIN} one-element layers")
            results["chain"] = chain_overhead(options.device, options.rounds)
            write(step, results)
        for name in options.models:
            print(name)
            results[name] = measured[step](name)
            write(step, results)


if __name__ == "__main__":
    main()
