"""What keeping freed memory is worth: inferences with ``keep_freed_memory`` against the C library's defaults.

Every sample is a process of its own, since the setting is for a process's whole life; those with it and those without
take turns. Each runs the model as it is on one thread, and tells the medians of its inferences' page faults and
processor time (the system's on its behalf included), which other processes disturb less than the time on the wall.
Printed and written are medians and quartiles over processes, and the median of the pairs' ratios to the defaults.

    python -m benchmarks.allocator [--pairs 9] [--out benchmarks/results/allocator.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model

from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.side_by_side import median_ratio, spread
from torchsurgeon._allocator import keep_freed_memory

MODELS = ("mobilenet_v2", "resnet50")
WAYS = ("defaults", "kept")
WARMUP, INFERENCES = 5, 25


def run_once(name: str, way: str) -> None:
    """In the process of a sample: print the processor's seconds and page faults of an inference."""
    torch.set_num_threads(1)
    if way == "kept" and not keep_freed_memory():
        raise SystemExit("this C library cannot be told to keep freed memory")
    model, x = get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224)
    taken, faults = [], []
    with torch.no_grad():
        for _ in range(WARMUP + INFERENCES):
            faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            begin = time.thread_time()
            model(x)
            taken.append(time.thread_time() - begin)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    print(json.dumps([statistics.median(taken[WARMUP:]), statistics.median(faults[WARMUP:])]))


def sample(name: str, way: str) -> tuple[float, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.allocator", "--sample", name, way]
    taken_s, faults = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return taken_s, faults


def compare(name: str, pairs: int) -> dict[str, Any]:
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for i in range(pairs):
        for way in WAYS if i % 2 else reversed(WAYS):
            samples[way].append(sample(name, way))
    seconds = {way: [one for one, _ in found] for way, found in samples.items()}
    rows = {}
    for way, times in seconds.items():
        faults = statistics.median(one for _, one in samples[way])
        row = {f"{key}_s": value for key, value in spread(times).items()}
        row |= {"ratio": median_ratio(times, seconds["defaults"]), "page_faults": faults}
        rows[way] = row
        low, middle, high = (row[key] * 1e3 for key in ("q1_s", "median_s", "q3_s"))
        times_text = f"{middle:9.2f} ms [{low:7.2f} … {high:7.2f}] {row['ratio']:6.3f} × defaults"
        print(f"{name:14}{way:10}{times_text} {faults:8.0f} page faults", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "allocator.json")
    parser.add_argument("--sample", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        run_once(*options.sample)
        return
    write(options.out, {name: compare(name, options.pairs) for name in MODELS})


if __name__ == "__main__":
    main()
