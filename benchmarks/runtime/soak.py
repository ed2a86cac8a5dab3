"""Many inferences of a tiny model: whether memory, threads and open files stay where they were.

Inferences one after another, half with the server in this process, half over HTTP to one in another, by a SplitModule
that decides each time. Read fifty times on the way: resident memory of this process and of the server, threads, and
open file descriptors. Printed and written are what they were after a tenth and at the end, and the line through them:
memory that would leak 100 bytes an inference shows as 100.

    python -m benchmarks.runtime.soak [--count 100000] [--out benchmarks/results/soak.json]
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.served import SLOWER, tiny
from benchmarks.support.tail_process import TailProcess, in_process
from torchsurgeon.transport import HttpTransport, Transport

READINGS = 50


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reading(done: int, server: int | None) -> dict[str, int]:
    now = {
        "inferences": done,
        "memory_bytes": resident_bytes(os.getpid()),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
    if server is not None:
        now["server_memory_bytes"] = resident_bytes(server)
        now["server_descriptors"] = len(os.listdir(f"/proc/{server}/fd"))
    return now


def soak(transport: Transport, count: int, server: int | None) -> dict[str, Any]:
    model, x = tiny(0)
    here = ts.profile(ts.trace(model, x), meter=None)
    with torch.no_grad():
        truth = model(x)
    wrong = degraded = 0
    readings = []
    begin_s = time.perf_counter()
    with ts.SplitModule(model, x, server=transport, device_profile=here.scaled(SLOWER), server_profile=here) as split:
        for done in range(count):
            if done % max(1, count // READINGS) == 0:
                readings.append(reading(done, server))
            wrong += not torch.equal(split(x), truth)
            last = split.last
            degraded += last is not None and last.degraded is not None
        readings.append(reading(count, server))
        taken_s = time.perf_counter() - begin_s
    return {
        "inferences": count,
        "wrong": wrong,
        "degraded": degraded,
        "inferences_a_s": round(count / taken_s),
        "growth": growth(readings),
        "readings": readings,
    }


def growth(readings: list[dict[str, int]]) -> dict[str, Any]:
    """What each quantity was once caches were full, a tenth in, and at the end; and its slope per inference between."""
    settled = readings[len(readings) // 10 :]
    done = np.array([entry["inferences"] for entry in settled], dtype=float)
    found = {}
    for key in settled[0]:
        if key != "inferences":
            values = np.array([entry[key] for entry in settled], dtype=float)
            slope = float(np.polyfit(done, values, 1)[0])
            found[key] = {"first": settled[0][key], "last": settled[-1][key], "each": round(slope, 3)}
    return found


def show(title: str, row: dict[str, Any]) -> None:
    print(
        f"{title}: {row['inferences']} inferences, {row['wrong']} wrong, {row['degraded']} degraded, "
        f"{row['inferences_a_s']} a second"
    )
    for key, entry in row["growth"].items():
        print(
            f"  {key:20} {entry['first']:>12,} → {entry['last']:>12,}  {entry['each']:+8.2f} an inference", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with in_process(tiny) as inside:
        results["in process"] = soak(inside, options.count // 2, None)
        show("in process", results["in process"])
    with TailProcess(tiny) as server, HttpTransport(server.url) as over:
        results["HTTP"] = soak(over, options.count - options.count // 2, server.pid)
        show("over HTTP", results["HTTP"])
    write(options.out, results)


if __name__ == "__main__":
    main()
