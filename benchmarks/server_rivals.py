"""A server under load from many connections, beside what one writes by hand and beside LitServe.

torchsurgeon's server and two applications of Starlette run in one process, with one thread per inference, and are up
the whole time; LitServe starts processes of its own. A round asks one after the other in a new random order, at 1, 20
and 200 connections that each send the next request once they have the answer. Then requests come at random moments to
torchsurgeon's server, and to Starlette's without a thread pool: half as many as each of them has answered at 20
connections. The client is another process, which does nothing but read and write sockets. Server and client share the
machine's cores.

    python -m benchmarks.server_rivals [--litserve PYTHON] [--rounds 5] [--seconds 1.5] [--network NAME]
    python -m benchmarks.server_rivals --device cuda --out FILE

With ``--device cuda`` the networks are on an NVIDIA GPU. Then calls in the server's process are in one thread, and
LitServe has one process.

Printed and written are, for each network and server, the medians and quartiles over rounds of requests a second and of
the 50th and 99th percentile of the time to an answer, and of the server's processor time a request, with the ratios of
the first and the last to the first server's. Where other programs use the cores too, a server with more threads gets a
larger share of them, so only the processor time can be compared then. For each network there is also what calls in the
server's process reach, without HTTP: as many threads as cores, with the best of several batch sizes.

``--litserve`` names the Python of an environment that has LitServe beside what this one has
(``benchmarks/support/requirements.txt``); without it LitServe is left out.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluate.markdown import table
from benchmarks.support import result_file
from benchmarks.support.load_client import family, serve_client
from benchmarks.support.load_networks import NETWORKS, ON_CPU, ON_GPU, Cut, network
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.servers import begin, by_starlette
from benchmarks.support.side_by_side import median_ratio, spread
from benchmarks.support.tail_process import apart
from torchsurgeon import wire
from torchsurgeon.serve import ModelRegistry, Server, create_app

OUT = RESULTS / "server_rivals.json"
PAGE = RESULTS.parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- rivals, by benchmarks.server_rivals -->", "<!-- end of rivals -->"
POOL, INLINE = "Starlette by hand, with a thread pool", "Starlette by hand, without"
LITSERVE, OURS = "LitServe", "torchsurgeon"
HALF_WAYS = (INLINE, OURS)
"""Which of them requests come to at random moments. The others may answer too few a second for that."""
CONNECTIONS = (1, 20, 200)
HALF = "half"
BATCHES = (1, 2, 4, 8, 16)
_START_S = 120.0
_FORM = "what-no-tensor-holds"


def serve(name: str, device: str, told: Any) -> None:
    """Serve one network in all ways, tell each one's port and request, and then how fast calls are in this process."""
    begin(None)
    found = network(name, device)
    (sent,) = found.tensors.values()

    def answer(data: Any) -> bytes:
        with torch.no_grad():
            (result,) = found.tail(torch.frombuffer(data, dtype=torch.float32).view(sent.shape).to(device))
            return bytes(result.cpu().numpy().tobytes())

    raw = sent.numpy().tobytes()
    message = wire.encode_request(found.tensors)
    body = b"".join(bytes(one) for one in message.buffers)
    registry = ModelRegistry(profiler=None, batching="rounded")
    served = registry.add("net", found.model, found.x)
    with Server(create_app(registry)) as server:
        told.send(
            {
                POOL: (os.getpid(), by_starlette(answer), request("/infer", raw)),
                INLINE: (os.getpid(), by_starlette(answer, pool=False), request("/infer", raw)),
                OURS: (
                    os.getpid(),
                    server.port,
                    request("/v2/models/net/infer", body, f"{wire.HEADER_LENGTH}: {message.header_bytes}\r\n"),
                ),
            }
        )
        told.send(served.together)
        while True:
            batch, seconds = told.recv()
            told.send(in_process(found, device, batch, seconds))


def in_process(found: Cut, device: str, batch: int, seconds: float) -> float:
    """Return how many samples a second calls of the tail reach, in as many threads as compute at once."""
    (sent,) = found.tensors.values()
    x = sent.repeat(batch, *[1] * (sent.dim() - 1))
    counts: list[int] = []

    def call() -> None:
        torch.set_num_threads(1)
        done, end_s = 0, time.perf_counter() + seconds
        with torch.no_grad():
            while time.perf_counter() < end_s:
                (result,) = found.tail(x.to(device))
                result.cpu()
                done += batch
        counts.append(done)

    threads = [threading.Thread(target=call) for _ in range(at_once(device))]
    begun_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun_s)


def at_once(device: str) -> int:
    """Return how many inferences compute at once on a device: one for each core, and one on a GPU."""
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


@contextmanager
def litserve(python: str, name: str, device: str, batch: int) -> Iterator[tuple[int, int, bytes]]:
    """Serve a network by LitServe, in batches of up to so many; yields its process, its port and a request."""
    (sent,) = network(name).tensors.values()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = f'--{_FORM}\r\nContent-Disposition: form-data; name="data"; filename="data"\r\n\r\n'
    body = head.encode() + sent.numpy().tobytes() + f"\r\n--{_FORM}--\r\n".encode()
    workers = str(at_once(device))
    command = [python, "-m", "benchmarks.support.litserve_tail", name, str(port), workers, str(batch), device]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + _START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end_s:
                    raise RuntimeError(f"{' '.join(command)} did not start") from None
                time.sleep(0.2)
        yield server.pid, port, request("/predict", body, f"Content-Type: multipart/form-data; boundary={_FORM}\r\n")
    finally:
        # Its workers would outlive a process that is told to end politely while they are busy.
        for pid in family(server.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait()


def request(path: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def compare(name: str, rounds: int, seconds: float, python: str | None, device: str = "cpu") -> dict[str, Any]:
    """Return, for one network, the rows of each number of connections by server, and what calls reach."""
    with ExitStack() as stack:
        server = stack.enter_context(apart(serve, name, device))
        client = stack.enter_context(apart(serve_client))
        ways, together = server.recv(), server.recv()
        if python is not None:
            ways[LITSERVE] = stack.enter_context(litserve(python, name, device, together))
        ways[OURS] = ways.pop(OURS)
        samples: dict[str, dict[str, list[dict[str, float]]]] = {}

        def ask(what: str, label: str, *how: Any) -> None:
            client.send((*ways[label], *how))
            of_each = samples.setdefault(what, {one: [] for one in (HALF_WAYS if what == HALF else ways)})
            of_each[label].append(client.recv())

        for index in range(rounds + 1):
            turns = [(count, label) for count in CONNECTIONS for label in ways]
            random.Random(index).shuffle(turns)
            for count, label in turns:
                ask(str(count), label, count, seconds if index else 0.5)
            if not index:  # the first round is the warm-up
                samples.clear()
        half = {way: statistics.median(one["rate_s"] for one in samples["20"][way]) / 2 for way in HALF_WAYS}
        for index in range(rounds):
            for label in random.Random(index).sample(HALF_WAYS, len(HALF_WAYS)):
                ask(HALF, label, 20, 2 * seconds, half[label], index)
        calls: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        for _ in range(rounds):
            for batch, rates in calls.items():
                server.send((batch, seconds / 3))
                rates.append(server.recv())
    inside = {str(batch): spread(rates) for batch, rates in calls.items()}
    best = max(one["median"] for one in inside.values())
    found = {"rows": {what: rows(of_each) for what, of_each in samples.items()}, "half_rates_s": half}
    found["together"] = together
    found |= {"in_process": inside, "of_in_process": found["rows"]["20"][OURS]["rate_s"]["median"] / best}
    for what, of_each in found["rows"].items():
        for label, row in of_each.items():
            print(f"{name}, {what}, {label}: {line(row)}", flush=True)
    print(f"{name}: {found['of_in_process']:.2f} of {best:.0f} a second without HTTP, ", end="")
    print(f"up to {together} samples together", flush=True)
    return found


def rows(of_each: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return spreads of what was measured by server, and ratios to the first server of each round."""
    base, *_ = of_each.values()
    found = {}
    for label, samples in of_each.items():
        row: dict[str, Any] = {key: spread([one[key] for one in samples]) for key in samples[0]}
        for key in ("rate_s", "processor_s"):
            row[f"{key}_ratio"] = median_ratio([one[key] for one in samples], [one[key] for one in base])
        row["tail_ratio"] = statistics.median(one["p99_s"] / one["median_s"] for one in samples)
        found[label] = row
    return found


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['rate_s']['median']:.1f} /s, {row['rate_s_ratio']:.2f} ×, p50 {row['median_s']['median'] * 1e3:.2f} ms, "
        f"p99 {row['p99_s']['median'] * 1e3:.2f} ms, processor {row['processor_s']['median'] * 1e3:.3f} ms, "
        f"{row['processor_s_ratio']:.2f} ×"
    )


def page(results: Mapping[str, Any]) -> str:
    """Return the tables of what was timed, as Markdown."""
    heads = ("network", "connections", "server", "requests a second", "× Starlette's", "× the quicker by hand")
    heads += ("p50, p99, ms", "processor time, ms", "× Starlette's")
    lines = []
    for name, found in results.items():
        for count in map(str, CONNECTIONS):
            for label, row in found["rows"][count].items():
                rate, took = row["rate_s"], row["processor_s"]
                lines.append(
                    (
                        name,
                        count,
                        label,
                        f"{rate['median']:.0f} ({rate['q1']:.0f} … {rate['q3']:.0f})",
                        f"{row['rate_s_ratio']:.2f}",
                        f"{over_by_hand(found['rows'][count], label):.2f}",
                        f"{row['median_s']['median'] * 1e3:.1f}, {row['p99_s']['median'] * 1e3:.1f}",
                        f"{took['median'] * 1e3:.2f}",
                        f"{row['processor_s_ratio']:.2f}",
                    )
                )
    summary = []
    for name, found in results.items():
        half = [waits(found, way) for way in (OURS, INLINE)]
        batch, best = max(found["in_process"].items(), key=lambda item: item[1]["median"])
        summary.append(
            (
                name,
                *half,
                f"{best['median']:.0f}, in batches of {batch}",
                f"{found['of_in_process']:.2f}",
            )
        )
    more = ("network", "at half of its rate: a second, p50, p99, p99 / p50", "Starlette without a pool at half of its")
    more += ("samples a second without HTTP", "of that at 20 connections")
    return table(heads, lines) + "\n\n" + table(more, summary) + "\n"


def over_by_hand(rows: Mapping[str, Any], server: str = OURS) -> float:
    """Return how many times as many requests a second a server answers as the quicker of both by hand.

    Args:
        rows: what all servers did with some number of connections.
        server: the server.
    """
    rate = {name: float(row["rate_s"]["median"]) for name, row in rows.items()}
    return rate[server] / max(rate[POOL], rate[INLINE])


def waits(found: Mapping[str, Any], way: str) -> str:
    """Return the rate of requests, percentiles of the time to an answer in ms, and the ratio of these."""
    row = found["rows"][HALF].get(way)
    if row is None:
        return ""
    low, high = (f"{row[key]['median'] * 1e3:.1f} ms" for key in ("median_s", "p99_s"))
    return f"{half_rate_s(found, way):.0f}, {low}, {high}, {row['tail_ratio']:.1f}"


def half_rate_s(found: Mapping[str, Any], way: str) -> float:
    """Return how many requests a second came at random moments; in older files as many to all as half of ours."""
    return float(found["half_rates_s"][way] if "half_rates_s" in found else found["half_rate_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litserve", metavar="PYTHON", help="the Python of an environment with LitServe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="by default all of the device's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.device != "cpu" and options.out == OUT:
        parser.error(f"{OUT.name} is of the CPU: give --out FILE")
    found = {}
    for name in options.network or (ON_CPU if options.device == "cpu" else ON_GPU):
        found[name] = compare(name, options.rounds, options.seconds, options.litserve, options.device)
    gpu = {} if options.device == "cpu" else {"gpu": torch.cuda.get_device_name()}
    write(options.out, found, seconds=options.seconds, rounds=options.rounds, **gpu)
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, page(found))


if __name__ == "__main__":
    main()
