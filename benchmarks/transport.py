"""Transport alone: a tensor up, 4 KB down, over loopback, with the server in a process of its own.

Side by side in one run; every contestant has one client, this process's main thread, and one serving thread or event
loop in the same server process, with TCP_NODELAY set:

* ``raw socket``: a length prefix, then the bytes. The receiver reads each message into memory of its own, as one that
  keeps the tensor must. Ratios are to this one. ``raw, reused`` reads every message into one buffer instead.
* ``torchsurgeon``: HttpTransport and torchsurgeon's server with a model that only slices its input.
* ``http bytes``: that server asked by prepared bytes over a raw socket, which leaves out torchsurgeon's client.
* ``grpc``: plain bytes each way, already serialised. ``requests``: a Session and torchsurgeon's server.

Two orders. ``burst``: each round has 20 consecutive exchanges of every contestant, contestants in a new random order,
so that each runs as warm as a stream of inferences would. ``single``: one exchange of every contestant a round, each
with caches that the others have filled. Two layouts. ``apart``: each process has a core of its own, as device and
server have. ``free``: the scheduler places both processes, often on one core; then a raw socket never waits for another
core to wake, and two processes of some size take turns in one core's caches. Printed are medians, quartiles, and the
median of the rounds' ratios.

Copies of the tensor in user space, beside the kernel's own: torchsurgeon none going out, and none coming in once the
connection has seen a request with the same head (for the first one, what arrives in one read with it); raw none; gRPC
and ``requests`` one or more each way, of which joining header and body (done beforehand) is not timed.

    python -m benchmarks.transport [--rounds 100] [--out benchmarks/results/transport.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy
import requests
import torch
from torch import Tensor, nn

from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.side_by_side import spread, text
from torchsurgeon import wire
from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import HttpTransport

SIZES = {"4KB": 4_096, "37KB": 37_888, "150KB": 153_600, "800KB": 819_200, "3MB": 3_145_728}
DOWN_BYTES = 4_096
BASE = "raw socket"
BURST = 20
LENGTH = struct.Struct("<Q")
GRPC_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


class Slice(nn.Module):
    """Costs next to nothing and answers 4 KB."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.narrow(x, 1, 0, DOWN_BYTES // 4)


def serve() -> None:
    """The server process: raw sockets, gRPC and torchsurgeon, each on a port it prints."""
    torch.set_num_threads(1)
    keep_freed_memory()
    answer = bytes(DOWN_BYTES)

    def echo(link: socket.socket, reuse: bool) -> None:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kept = memoryview(bytearray(64 << 20 if reuse else 0))
        with link:
            while head := link.recv(LENGTH.size, socket.MSG_WAITALL):
                size = LENGTH.unpack(head)[0]
                receive_into(link, kept[:size] if reuse else numpy.empty(size, numpy.uint8).data)
                link.sendall(LENGTH.pack(len(answer)) + answer)

    def accept(listening: socket.socket, reuse: bool) -> None:
        while True:
            threading.Thread(target=echo, args=(listening.accept()[0], reuse), daemon=True).start()

    plain = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for reuse, listening in enumerate(plain):
        threading.Thread(target=accept, args=(listening, bool(reuse)), daemon=True).start()
    rpc = grpc.server(futures.ThreadPoolExecutor(2), options=GRPC_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Infer": handler}),))
    rpc_port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    registry = ModelRegistry()
    for name, size in SIZES.items():
        registry.add(name, Slice().eval(), (torch.zeros(1, size // 4),))
    with Server(create_app(registry)) as server:
        raw, reused = (listening.getsockname()[1] for listening in plain)
        print(json.dumps({"raw": raw, "reused": reused, "grpc": rpc_port, "http": server.port}), flush=True)
        sys.stdin.read()


def receive_into(link: socket.socket, view: memoryview) -> None:
    while len(view):
        view = view[link.recv_into(view) :]


def contestants(ports: dict[str, int], name: str, x: Tensor) -> dict[str, Callable[[], object]]:
    memory = x.numpy().data.cast("B")
    reply = memoryview(bytearray(LENGTH.size + DOWN_BYTES))

    def by_socket(port: int) -> Callable[[], None]:
        link = socket.create_connection(("127.0.0.1", port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def exchange() -> None:
            link.sendall(LENGTH.pack(len(memory)))
            link.sendall(memory)
            receive_into(link, reply)

        return exchange

    channel = grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}", options=GRPC_OPTIONS)
    call = channel.unary_unary("/bench/Infer")
    payload = bytes(memory)

    transport = HttpTransport(f"http://127.0.0.1:{ports['http']}")
    answer_bytes = DOWN_BYTES

    message = wire.encode_request({"x": x})
    body = b"".join(message.buffers)
    session = requests.Session()
    session.trust_env = False
    url = f"http://127.0.0.1:{ports['http']}/v2/models/{name}/infer"
    headers = {wire.HEADER_LENGTH: str(message.header_bytes), "Content-Type": "application/octet-stream"}

    def by_requests() -> object:
        return session.post(url, data=body, headers=headers).content

    plain = socket.create_connection(("127.0.0.1", ports["http"]))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    head = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()

    def by_bytes() -> None:
        plain.sendall(head)
        plain.sendall(body)
        received = plain.recv(1 << 16)
        while b"\r\n\r\n" not in received:
            received += plain.recv(1 << 16)
        start = received.index(b"\r\n\r\n") + 4
        length = int(received.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(received) < start + length:
            received += plain.recv(1 << 16)

    return {
        "raw socket": by_socket(ports["raw"]),
        "raw, reused": by_socket(ports["reused"]),
        "http bytes": by_bytes,
        "torchsurgeon": lambda: transport.infer(name, {"x": x}, max_answer_bytes=answer_bytes),
        "grpc": lambda: call(payload),
        "requests": by_requests,
    }


def measure(ways: dict[str, Callable[[], object]], rounds: int, burst: int) -> dict[str, dict[str, float]]:
    """Time ``burst`` consecutive exchanges of every way in each round, in a new random order every round.

    A ratio is that of a round's medians, so that both were taken within milliseconds of each other.
    """
    for way in ways.values():
        for _ in range(50):
            way()
    samples: dict[str, list[float]] = {label: [] for label in ways}
    ratios: dict[str, list[float]] = {label: [] for label in ways}
    order = list(ways.items())
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        medians = {}
        for label, way in order:
            taken = []
            for _ in range(burst):
                start = time.perf_counter()
                way()
                taken.append(time.perf_counter() - start)
            samples[label] += taken
            medians[label] = statistics.median(taken)
        for label, middle in medians.items():
            ratios[label].append(middle / medians[BASE])
    result = {}
    for label, taken in samples.items():
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios[label], n=4)
        result[label] = spread(taken) | {"ratio": ratio, "ratio_q1": ratio_low, "ratio_q3": ratio_high}
    return result


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(title)
    for label, row in rows.items():
        ratios = f"{row['ratio']:5.2f} × raw  [{row['ratio_q1']:.2f} … {row['ratio_q3']:.2f}]"
        print(f"  {label:13}{text(row, 'µs')}  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS / "transport.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    torch.set_num_threads(1)
    everywhere = os.sched_getaffinity(0)
    results: dict[str, dict[str, Any]] = {}
    for layout in ("free", "apart") if len(everywhere) > 1 else ("free",):
        first, second, *_ = ({core} for core in sorted(everywhere)) if layout == "apart" else (everywhere, everywhere)
        os.sched_setaffinity(0, second)
        # The device's process is not a server; it keeps the C library's defaults.
        server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transport", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(0, first)
        try:
            assert server.stdout is not None
            ports = json.loads(server.stdout.readline())
            for name in options.sizes.split(","):
                ways = contestants(ports, name, torch.randn(1, SIZES[name] // 4))
                orders = {
                    "burst": measure(ways, options.rounds, BURST),
                    "single": measure(ways, options.rounds * 4, 1),
                }
                results.setdefault(name, {})[layout] = orders
                for order, rows in orders.items():
                    show(f"{name} up, 4 KB down, {layout}, {order}", rows)
        finally:
            os.sched_setaffinity(0, everywhere)
            assert server.stdin is not None
            server.stdin.close()
            server.wait(10)
    write(options.out, results, grpc=grpc.__version__, requests=requests.__version__)


if __name__ == "__main__":
    main()
