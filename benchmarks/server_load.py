"""A server under load from many connections, beside the application of Starlette that one writes by hand.

All servers of a network run in one process, with one thread per inference, and are up the whole time. A round asks one
after the other in a new random order, for a few seconds, with a fixed number of connections that each send the next
request once they have the answer. The client is another process, which does nothing but read and write sockets. Server
and client share the machine's cores.

    python -m benchmarks.server_load [--rounds 5] [--seconds 3] [--connections 20] [--network NAME] [--extras]

Printed and written are, for each network and server, the medians and quartiles over rounds of requests a second and of
the 50th and 99th percentile of the time to an answer, and of the server's processor time a request, with the ratios of
the first and the last to the first server's. Where other programs use the cores too, a server with more threads gets a
larger share of them, so only the processor time can be compared then.

The last server is also timed with an access log, and with metrics and a token, which each row compares with the last
server itself (``beside``). With ``--extras`` nothing else is timed.
"""

from __future__ import annotations

import argparse
import os
import random
import selectors
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.evaluate.markdown import table
from benchmarks.support import result_file
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.servers import begin, by_starlette
from benchmarks.support.side_by_side import median_ratio, spread
from benchmarks.support.tail_process import apart, seeded
from torchsurgeon import wire
from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.access import AccessLog, access
from torchsurgeon.serve.logs import log_handler
from torchsurgeon.serve.metrics import Metrics
from torchsurgeon.serve.tokens import Tokens
from torchsurgeon.tracing.tracer import trace

OUT = RESULTS / "server_load.json"
PAGE = RESULTS.parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- load, by benchmarks.server_load -->", "<!-- end of load -->"
BASELINE = "Starlette by hand, with a thread pool"
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "torchsurgeon, one request at a time": {"concurrency": 1, "batching": "off"},
    "torchsurgeon, several at once": {"batching": "off"},
    "torchsurgeon, several at once, and together": {"batching": "rounded"},
}
PLAIN = list(OPTIONS)[-1]
LOGGED, WATCHED = "the last, with an access log", "the last, with metrics and a token"
TOKEN = "a-token-of-this-benchmark"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "an MLP of three layers": (mlp, (1, 64), "input"),
    "SqueezeNet 1.1 after features.8": (lambda: torchvision.models.squeezenet1_1(), (1, 3, 224, 224), "features.8"),
    "ResNet-18 after layer3": (lambda: torchvision.models.resnet18(), (1, 3, 224, 224), "layer3.1.relu_1"),
    "AlexNet after features.12": (lambda: torchvision.models.alexnet(), (1, 3, 224, 224), "features.12"),
}
"""How each network is made, the shape of its input, and the layer after which it is cut."""


def network(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor], Any]:
    """Return a network, its input, what crosses at its cut, and its tail."""
    make, shape, point = NETWORKS[name]
    model, x = seeded(make, 0), torch.rand(shape, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x)
    found = graph.points[0] if point == "input" else graph.point(point)
    with torch.no_grad():
        sent = (x,) if found.index == 0 else cut(graph, found).head(x)
    tensors = dict(zip([spec.name for spec in found.tensors], sent, strict=True))
    return model, x, tensors, tail_for(graph, tuple(tensors), flat=True)


def serve(name: str, told: Any) -> None:
    """Serve one network in all ways, and tell each one's port and request."""
    begin(None)
    model, x, tensors, tail = network(name)
    (sent,) = tensors.values()

    def answer(data: Any) -> bytes:
        with torch.no_grad():
            (result,) = tail(torch.frombuffer(data, dtype=torch.float32).view(sent.shape))
            return result.numpy().tobytes()

    raw = sent.numpy().tobytes()
    ports = {BASELINE: (by_starlette(answer), _request("/infer", raw))}
    message = wire.encode_request(tensors)
    body = b"".join(bytes(one) for one in message.buffers)
    request = _request("/v2/models/net/infer", body, f"{wire.HEADER_LENGTH}: {message.header_bytes}\r\n")
    with ExitStack() as stack:
        for label, options in OPTIONS.items():
            registry = ModelRegistry(profiler=None, **options)
            registry.add("net", model, x)
            ports[label] = (stack.enter_context(Server(create_app(registry))).port, request)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        access.addHandler(log_handler(stack.enter_context(open(folder / "log", "w")), "text"))
        logged, watched = create_app(registry), create_app(registry)
        logged.listeners.append(AccessLog())
        ports[LOGGED] = (stack.enter_context(Server(logged)).port, request)
        (folder / "tokens").write_text(TOKEN)
        watched.tokens = Tokens(folder / "tokens")
        watched.listeners.append(Metrics(registry, lambda: 0))
        bearer = request.replace(b"\r\n", f"\r\nAuthorization: Bearer {TOKEN}\r\n".encode(), 1)
        ports[WATCHED] = (stack.enter_context(Server(watched)).port, bearer)
        told.send((os.getpid(), ports))
        signal.pause()


def _request(path: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


class Client:
    """One connection, which sends its request again once it has the answer."""

    def __init__(self, port: int, request: bytes) -> None:
        self.link = socket.create_connection(("127.0.0.1", port))
        self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request, self.begun_s, self.received, self.missing = request, 0.0, b"", 0

    def send(self) -> None:
        self.begun_s, self.received, self.missing = time.perf_counter(), b"", 0
        self.link.sendall(self.request)

    def receive(self) -> float | None:
        """Return how long the answer took; None while it is not complete."""
        data = self.link.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed a connection")
        self.received += data
        if not self.missing:
            head, end, _ = self.received.partition(b"\r\n\r\n")
            if not end:
                return None
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(bytes(self.received[:500]).decode("latin-1"))
            lines = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
            self.missing = len(head) + 4 + int(lines[b"content-length"])
        return time.perf_counter() - self.begun_s if len(self.received) >= self.missing else None


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(pid: int, port: int, request: bytes, connections: int, seconds: float) -> dict[str, float]:
    """Return requests a second, percentiles of the time to an answer, and the server's processor time a request."""
    taken: list[float] = []
    used_s = -processor_s(pid)
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        clients = [Client(port, request) for _ in range(connections)]
        for client in clients:
            stack.enter_context(client.link)
            selector.register(client.link, selectors.EVENT_READ, client)
            client.send()
        begun_s = time.perf_counter()
        # On a busy machine a round goes on until there is something to tell.
        while (now_s := time.perf_counter()) < begun_s + seconds or len(taken) < 2 * connections:
            for key, _ in selector.select(1.0):
                duration_s = key.data.receive()
                if duration_s is not None:
                    taken.append(duration_s)
                    key.data.send()
    cuts = statistics.quantiles(taken, n=100)
    used_s += processor_s(pid)
    rate_s = len(taken) / (now_s - begun_s)
    return {"rate_s": rate_s, "median_s": cuts[49], "p99_s": cuts[98], "processor_s": used_s / len(taken)}


def drive(told: Any) -> None:
    """Be the client: answer each load that is asked for with its result."""
    while True:
        told.send(load(*told.recv()))


def compare(name: str, rounds: int, seconds: float, connections: int, extras: bool) -> dict[str, Any]:
    with apart(serve, name) as server, apart(drive) as client:
        pid, ports = server.recv()
        if extras:
            ports = {label: ports[label] for label in (PLAIN, LOGGED, WATCHED)}
        samples: dict[str, list[dict[str, float]]] = {label: [] for label in ports}
        order = list(ports)
        for index in range(rounds + 1):
            random.Random(index).shuffle(order)
            for label in order:
                client.send((pid, *ports[label], connections, seconds if index else 1.0))
                found = client.recv()
                if index:  # the first round is the warm-up
                    samples[label].append(found)
    rows = {}
    for label, found in samples.items():
        row: dict[str, Any] = {key: spread([one[key] for one in found]) for key in found[0]}
        row["beside"] = PLAIN if extras or label in (LOGGED, WATCHED) else BASELINE
        for key in ("rate_s", "processor_s"):
            others = [one[key] for one in samples[row["beside"]]]
            row[f"{key}_ratio"] = median_ratio([one[key] for one in found], others)
        rows[label] = row
        rate = row["rate_s"]
        print(
            f"{name:34}{label:46}{rate['median']:8.1f} /s [{rate['q1']:.1f} … {rate['q3']:.1f}] "
            f"{row['rate_s_ratio']:6.3f} ×  p50 {row['median_s']['median'] * 1e3:7.2f} ms  "
            f"p99 {row['p99_s']['median'] * 1e3:7.2f} ms  processor {row['processor_s']['median'] * 1e3:7.3f} ms "
            f"{row['processor_s_ratio']:6.3f} ×",
            flush=True,
        )
    return rows


def page(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table of what was timed, as Markdown."""
    heads = ("network", "server", "requests a second", "× Starlette's", "p50, p99, ms", "processor time, × Starlette's")
    lines = []
    for name, rows in results.items():
        base = rows[BASELINE]
        for label, row in rows.items():
            rate = row["rate_s"]
            times, cost = f"{row['rate_s_ratio']:.2f}", f"{row['processor_s_ratio']:.2f}"
            if row["beside"] != BASELINE:
                times = f"{rate['median'] / base['rate_s']['median']:.2f}"
                taken = row["processor_s"]["median"] / base["processor_s"]["median"]
                cost = f"{taken:.2f} ({row['processor_s_ratio'] - 1:+.1%} beside the last)"
            rates = f"{rate['median']:.0f} ({rate['q1']:.0f} … {rate['q3']:.0f})"
            waits = f"{row['median_s']['median'] * 1e3:.1f}, {row['p99_s']['median'] * 1e3:.1f}"
            lines.append((name, label, rates, times, waits, cost))
    return table(heads, lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="by default all")
    parser.add_argument("--extras", action="store_true", help="time only what access log, metrics and token cost")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = {
        name: compare(name, options.rounds, options.seconds, options.connections, options.extras)
        for name in options.network or NETWORKS
    }
    write(options.out, rows, connections=options.connections, seconds=options.seconds, rounds=options.rounds)
    if options.out == OUT and not options.extras:
        result_file.show(PAGE, BEGIN, END, page(rows))


if __name__ == "__main__":
    main()
