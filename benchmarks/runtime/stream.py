"""A stream of inferences: ``SplitModule.map`` against one call after another, and against its slowest stage.

AlexNet on photographs over emulated links; the device is this process, paced so that the whole model takes 0.4 s on
it, the server a process on a core of its own where there is one. ``map`` chooses its cut for throughput, and the same
cut is then used for calls one after another, whose medians say what each stage takes alone: the head with encoding,
the bytes at the link's rate each way, the tail. No pipeline answers more often than 1/(slowest stage).

    python -m benchmarks.runtime.stream [--frames 40] [--out benchmarks/results/runtime_stream.json]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks.runtime.trace import alexnet
from benchmarks.support.paced_device import paced, warm
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.tail_process import TailProcess, two_cores
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Frontier
from torchsurgeon.transport import HttpTransport

LINKS = ("3g", "lte", "wifi")
DEVICE_S = 0.4
FILL = 5
"""Frames at the start while the pipeline fills, which are not counted."""


def stream(split: ts.SplitModule, x: torch.Tensor, frames: int) -> dict[str, Any]:
    ends = []
    chosen = []
    for _ in split.map(itertools.repeat(x, frames)):
        ends.append(time.perf_counter())
        assert split.last is not None
        chosen.append(split.last.partition)
    rate = (len(ends) - 1 - FILL) / (ends[-1] - ends[FILL])
    cuts = Counter(point.name for point in chosen)
    return {"answers_a_s": rate, "index": chosen[-1].index, "cut": chosen[-1].name, "cuts": dict(cuts)}


def one_by_one(split: ts.SplitModule, x: torch.Tensor, link: ts.Link, frames: int) -> dict[str, Any]:
    split(x)
    stages: dict[str, list[float]] = {"head": [], "uplink": [], "tail": [], "downlink": []}
    begin_s = time.perf_counter()
    for _ in range(frames):
        split(x)
        last = split.last
        assert last is not None
        stages["head"].append(last.head_s + last.encode_s)
        stages["uplink"].append(link.uplink_s(last.sent_bytes))
        stages["tail"].append(last.tail_s)
        stages["downlink"].append(link.downlink_s(last.received_bytes))
    rate = frames / (time.perf_counter() - begin_s)
    return {"answers_a_s": rate, "stages_s": {stage: statistics.median(took) for stage, took in stages.items()}}


def measure(frames: int) -> dict[str, Any]:
    own, other = two_cores()
    rows = {}
    with TailProcess(alexnet, core=other) as server:
        if own is not None:
            os.sched_setaffinity(0, {own})
        model, x = alexnet(0)
        graph, here, device = paced(model, x, DEVICE_S)
        with HttpTransport(server.url) as direct:
            there = ts.LayerProfile.from_json(direct.get_json("/v2/models/model/profile"))
        known: dict[str, Any] = {"device_profile": here, "server_profile": there, "backend": device.wrap}
        with ts.SplitModule(model, x, server=server.url, **known) as first:
            # Not over the link, which requests that are given up would leave full.
            warm(first, x, Frontier.build(graph, here, there).rows)
        for name in LINKS:
            with (
                LinkEmulator(0, "127.0.0.1", server.port, PRESETS[name]) as emulator,
                ts.SplitModule(model, x, server=f"http://127.0.0.1:{emulator.port}", **known) as split,
            ):
                split(x)
                together = stream(split, x, frames)
                split.partition = together["index"]
                alone = one_by_one(split, x, PRESETS[name], max(10, frames // 3))
            slowest, slowest_s = max(alone["stages_s"].items(), key=lambda stage: stage[1])
            rows[name] = {
                "cut": together["cut"],
                "cuts": together["cuts"],
                "map_answers_a_s": round(together["answers_a_s"], 3),
                "one_by_one_answers_a_s": round(alone["answers_a_s"], 3),
                "stages_s": {stage: round(took, 5) for stage, took in alone["stages_s"].items()},
                "slowest": slowest,
                "of_the_bound": round(together["answers_a_s"] * slowest_s, 3),
                "ratio_to_one_by_one": round(together["answers_a_s"] / alone["answers_a_s"], 3),
            }
            show(name, rows[name])
    return {"device_s": DEVICE_S, "frames": frames, "links": rows}


def show(name: str, row: dict[str, Any]) -> None:
    stages = ", ".join(f"{stage} {took * 1e3:.1f}" for stage, took in row["stages_s"].items())
    print(
        f"{name:5} map {row['map_answers_a_s']:6.2f}/s, {row['of_the_bound']:.3f} of 1/(slowest stage), "
        f"{row['ratio_to_one_by_one']:.2f} × one by one ({row['one_by_one_answers_a_s']:.2f}/s); "
        f"cut after {row['cut']} (ms: {stages})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_stream.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(options.out, measure(options.frames))


if __name__ == "__main__":
    main()
