"""The client of the benchmarks of servers under load: ``torchsurgeon.loadtest`` in a process of its own, and the clock
of the server's processor time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon.loadtest import Arrivals, LoadRequest, Target, drive
from torchsurgeon.loadtest.result import quantile


class LoadFailed(RuntimeError):
    """A server did not answer a request with 200."""


def processor_s(pid: int) -> float:
    """Return the processor time that a process and its descendants have used, in seconds."""
    # The clock of another process, as clock_getcpuclockid() makes it. Its unit is a nanosecond; /proc counts in 10 ms.
    return sum(time.clock_gettime((~one << 3) | 2) for one in family(pid))


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in file.read_text().split()]
    return found


def load(
    pid: int,
    port: int,
    data: bytes,
    connections: int,
    seconds: float,
    rate_per_s: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Put a server under load.

    Args:
        pid: its process.
        port: its port.
        data: the request.
        connections: how many connections there are.
        seconds: how long requests are due.
        rate_per_s: requests a second, at exponential gaps; None to send each connection's next once it has its answer.
        seed: of the gaps.

    Returns:
        Requests a second, percentiles of the time to an answer, and the server's processor time a request.
    """
    target = Target.at(f"http://127.0.0.1:{port}")
    times_s = None if rate_per_s is None else Arrivals.named("exponential").times_s(seconds, rate_per_s, seed)
    used_s = -processor_s(pid)
    run = drive(target, [LoadRequest("", "", "", data, len(data))], times_s, devices=connections, seconds=seconds)
    used_s += processor_s(pid)
    if run.errors:
        raise LoadFailed(f"{dict(run.errors)} {dict(run.reasons)}")
    taken_s = run.latencies_s
    return {
        "rate_s": run.answered_per_s,
        "median_s": quantile(taken_s, 50),
        "p99_s": quantile(taken_s, 99),
        "processor_s": used_s / len(taken_s),
        "late_s": float(np.max(run.late_s, initial=0.0)),
    }


def serve_client(told: Any) -> None:
    """Be the client: answer each load that is asked for with its result."""
    while True:
        told.send(load(*told.recv()))
