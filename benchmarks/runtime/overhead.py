"""What a SplitModule adds to an inference: estimating, deciding, bookkeeping, and being able to fall back.

A tiny model, so that little else is timed, on one thread, with the server in the same process or behind HTTP in
another. Ways take turns in blocks of 50 inferences, in a new random order each time:

* ``by hand``: the head is called, its tensors sent with the transport and checksums both ways, the answer taken.
  Ratios are to this one.
* ``by a thread``: the same, sent by another thread, as whoever shall do something else when it is late must do.
* ``fixed``: a SplitModule with the same partition and ``fallback="error"``, which checks weights and answers.
* ``adaptive``: one that also estimates and decides at every inference, among all cuts.
* ``always``: one that can fall back as well, and so sends from a thread.
* ``local``: an adaptive one that runs everything here, against ``model``, the model itself.

So estimating, deciding and bookkeeping is what ``adaptive`` adds to ``by hand``. Printed and written are the medians
over blocks, quartiles, and the median difference to ``by hand`` (or ``model``) within a round.

    python -m benchmarks.runtime.overhead [--rounds 100] [--out benchmarks/results/runtime_overhead.json]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.tail_process import TailProcess, in_process, seeded
from torchsurgeon.transport import HttpTransport, Transport

BLOCK = 50
AT = 2
SLOWER = 1000.0
"""How much slower the device is said to be, so that the adaptive module never stays on it."""


def tiny(seed: int) -> tuple[nn.Module, torch.Tensor]:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))

    return seeded(make, seed), torch.rand(1, 64, generator=torch.Generator().manual_seed(1))


def ways_over(transport: Transport, stack: contextlib.ExitStack) -> dict[str, Callable[[], object]]:
    model, x = tiny(0)
    graph = ts.trace(model, x)
    head = ts.cut(graph, AT).head
    names = [spec.name for spec in graph.point(AT).tensors]
    answered = graph.outputs[0].name

    def by_hand() -> torch.Tensor:
        with torch.no_grad():
            boundary = head(x)
            tensors = dict(zip(names, boundary, strict=True))
            return transport.infer("model", tensors, max_answer_bytes=1 << 16, crc32=True).tensors[answered]

    sender = stack.enter_context(ThreadPoolExecutor(1))

    def by_a_thread() -> torch.Tensor:
        with torch.no_grad():
            tensors = dict(zip(names, head(x), strict=True))
            sent = sender.submit(transport.infer, "model", tensors, max_answer_bytes=1 << 16, crc32=True)
            return sent.result().tensors[answered]

    here = ts.profile(graph, meter=None)
    options: dict[str, Any] = {"server": transport, "device_profile": here.scaled(SLOWER), "server_profile": here}
    fixed = stack.enter_context(ts.SplitModule(model, x, partition=AT, fallback="error", **options))
    adaptive = stack.enter_context(ts.SplitModule(model, x, fallback="error", **options))
    always = stack.enter_context(ts.SplitModule(model, x, **options))
    return {
        "by hand": by_hand,
        "by a thread": by_a_thread,
        "fixed": lambda: fixed(x),
        "adaptive": lambda: adaptive(x),
        "always": lambda: always(x),
    }


def ways_here(transport: Transport, stack: contextlib.ExitStack) -> dict[str, Callable[[], object]]:
    model, x = tiny(0)
    here = ts.profile(ts.trace(model, x), meter=None)
    local = stack.enter_context(
        ts.SplitModule(model, x, server=transport, device_profile=here, server_profile=here.scaled(SLOWER))
    )

    def itself() -> object:
        with torch.no_grad():
            return model(x)

    return {"model": itself, "local": lambda: local(x)}


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    base = next(iter(ways))
    for way in ways.values():
        for _ in range(2 * BLOCK):
            way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            way = ways[name]
            begin = time.perf_counter()
            for _ in range(BLOCK):
                way()
            taken[name].append((time.perf_counter() - begin) / BLOCK * 1e6)
    found = {}
    for name, times in taken.items():
        low, median, high = statistics.quantiles(times, n=4)
        more = [one - other for one, other in zip(times, taken[base], strict=True)]
        less_us, added_us, more_us = statistics.quantiles(more, n=4)
        found[name] = {
            "us": round(median, 1),
            "quartiles_us": [round(low, 1), round(high, 1)],
            "ratio": round(statistics.median(a / b for a, b in zip(times, taken[base], strict=True)), 3),
            "added_us": round(added_us, 1),
            "added_quartiles_us": [round(less_us, 1), round(more_us, 1)],
        }
    return found


def show(title: str, rows: dict[str, Any]) -> None:
    base = next(iter(rows))
    print(title)
    for name, row in rows.items():
        low, high = row["quartiles_us"]
        print(
            f"  {name:11} {row['us']:7.1f} µs [{low:.1f} … {high:.1f}], {row['ratio']:.2f} × {base}, "
            f"{row['added_us']:+.1f} µs [{row['added_quartiles_us'][0]:+.1f} … {row['added_quartiles_us'][1]:+.1f}]",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    results = {}
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(in_process(tiny))
        results["in process"] = measure(ways_over(inside, stack), options.rounds)
        show("in process", results["in process"])
        server = stack.enter_context(TailProcess(tiny))
        over = stack.enter_context(HttpTransport(server.url))
        results["HTTP"] = measure(ways_over(over, stack), options.rounds)
        show("over HTTP, loopback", results["HTTP"])
        results["device"] = measure(ways_here(over, stack), options.rounds)
        show("all on the device", results["device"])
    write(options.out, results)


if __name__ == "__main__":
    main()
