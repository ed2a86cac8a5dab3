"""A server's load rising to 90 % and falling again, as the Neurosurgeon paper's load experiment: adaptive and fixed.

ResNet-50 on photographs over an emulated Wi-Fi link; the device is this process, paced so that the whole model takes
four times as long on it as on the server, a process on a core of its own where there is one. A third process asks the
same server for whole inferences, past the link, at random times (Poisson) and as often as gives the load; the device's
own come on top of it. At each step of the load three ways take turns inference by inference: ``adaptive``, always
``server``, always ``device``.

Printed and written are mean, quartiles and 95th percentile of each way at each load, and the ratios to always server.

    python -m benchmarks.runtime.load [--seconds 40] [--out benchmarks/results/runtime_load.json]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks.support.paced_device import paced, warm
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.served import resnet50
from benchmarks.support.tail_process import TailProcess, apart, middle, two_cores
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.errors import ServerError
from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Frontier
from torchsurgeon.transport import HttpTransport

LOADS = (0.0, 0.3, 0.6, 0.9, 0.6, 0.3, 0.0)
WAYS = ("adaptive", "server", "device")
SLOWER = 4.0
PAUSE_S = 0.05
PRESSING_THREADS = 64


def press(url: str, core: int | None, told: Any) -> None:
    """The other users: whole inferences at as many a second as was last told, until told None."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    _, x = resnet50(0)
    chance = random.Random(0)
    rate = 0.0

    def ask() -> None:
        with contextlib.suppress(ServerError):
            transport.infer("model", {"photo": x}, max_answer_bytes=1 << 20)

    with HttpTransport(url) as transport, ThreadPoolExecutor(PRESSING_THREADS) as users:
        next_s = time.monotonic()
        while True:
            if told.poll(max(0.0, next_s - time.monotonic()) if rate else None):
                rate = told.recv()
                if rate is None:
                    return
                next_s = time.monotonic()
            elif rate:
                users.submit(ask)
            next_s += chance.expovariate(rate) if rate else 0.0


def service_s(url: str, x: torch.Tensor) -> float:
    """Seconds that the server computes for a whole inference, with nothing else to do."""
    with HttpTransport(url) as transport:
        taken = [
            transport.infer("model", {"photo": x}, max_answer_bytes=1 << 20).parameters["compute_s"] for _ in range(15)
        ]
    return float(statistics.median(taken))


def measure(seconds: float) -> dict[str, Any]:
    own, other = two_cores()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(TailProcess(resnet50, core=other))
        if own is not None:
            os.sched_setaffinity(0, {own})
        model, x = resnet50(0)
        whole_s = service_s(server.url, x)
        device_s = SLOWER * whole_s
        graph, here, device = paced(model, x, device_s)
        told = stack.enter_context(apart(press, server.url, own))
        emulator = stack.enter_context(LinkEmulator(0, "127.0.0.1", server.port, PRESETS["wifi"]))
        with HttpTransport(server.url) as direct:
            there = ts.LayerProfile.from_json(direct.get_json("/v2/models/model/profile"))
        splits = {
            way: stack.enter_context(
                ts.SplitModule(
                    model,
                    x,
                    server=f"http://127.0.0.1:{emulator.port}",
                    partition="auto" if way == "adaptive" else way,
                    device_profile=here,
                    server_profile=there,
                    backend=device.wrap,
                    fallback="local" if way == "adaptive" else "error",
                )
            )
            for way in WAYS
        }
        warm(splits["adaptive"], x, Frontier.build(graph, here, there).rows)
        for split in splits.values():
            split(x)
        steps = []
        for load in LOADS:
            told.send(load / whole_s)
            steps.append({"load": load, **step(splits, x, seconds)})
            show(steps[-1])
        told.send(None)
    return {"device_s": round(device_s, 5), "server_s": round(whole_s, 5), "steps": steps}


def step(splits: dict[str, ts.SplitModule], x: torch.Tensor, seconds: float) -> dict[str, Any]:
    taken: dict[str, list[float]] = {way: [] for way in splits}
    here = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for way in random.sample(WAYS, len(WAYS)):
            begin_s = time.perf_counter()
            splits[way](x)
            taken[way].append(time.perf_counter() - begin_s)
            last = splits[way].last
            here += way == "adaptive" and last is not None and last.sent_bytes == 0
            time.sleep(PAUSE_S)
    ways: dict[str, Any] = {way: {**middle(times), "inferences": len(times)} for way, times in taken.items()}
    for way in WAYS:
        for key in ("mean_s", "p95_s"):
            ways[way][f"{key}_ratio_to_server"] = round(ways[way][key] / ways["server"][key], 3)
    ways["adaptive"]["on_the_device"] = here
    believed = splits["adaptive"].stats()["servers"][0]
    ways["adaptive"]["believed"] = {key: believed[key] for key in ("load", "queue_s", "uplink_bit_s", "round_trip_s")}
    return ways


def show(row: dict[str, Any]) -> None:
    text = "; ".join(
        f"{way} mean {row[way]['mean_s'] * 1e3:4.0f}, p95 {row[way]['p95_s'] * 1e3:4.0f} ms"
        f" ({row[way]['p95_s_ratio_to_server']:.2f} ×)"
        for way in WAYS
    )
    adaptive, believed = row["adaptive"], row["adaptive"]["believed"]
    print(
        f"load {row['load']:4.0%}  {text}; {adaptive['on_the_device']} of {adaptive['inferences']} here, believed: "
        f"K {believed['load']:.2f}, wait {believed['queue_s'] * 1e3:.0f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="at each of seven loads")
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_load.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    write(options.out, measure(options.seconds))


if __name__ == "__main__":
    main()
