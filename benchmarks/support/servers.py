"""What the suites talk to over loopback: torchsurgeon's server, and beside it in the same process what a user would
write by hand: a raw socket, gRPC where it is installed, and an application of Starlette.

Each has one thread or event loop for a connection, and TCP_NODELAY set. The functions ``serve_…`` run in a process of
their own (``apart()``), send the ports, and serve until they are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import ExitStack
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.support.tail_process import seeded
from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon.serve import ModelRegistry, Server, create_app

SIZES = {"4 KB": 4_096, "150 KB": 153_600, "3 MB": 3_145_728}
"""Models that only answer, by name, and the bytes of their input."""
ANSWER_BYTES = 4_096
LENGTH = struct.Struct("<Q")
GRPC_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
Answer = Callable[[Any], bytes]


class Slice(nn.Module):
    """Costs next to nothing and answers ``ANSWER_BYTES``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.narrow(x, 1, 0, ANSWER_BYTES // 4)


def classifier(device: str) -> tuple[nn.Module, Tensor]:
    """A convolutional network that takes about a millisecond, and an image for it."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(32 * 49, 1000)
        )

    return seeded(make, 0).to(device), torch.rand(1, 3, 224, 224).to(device)


def serve_exchanges(core: int | None, told: Any) -> None:
    """Servers that answer every tensor with the same few bytes."""
    begin(core)
    answer = bytes(ANSWER_BYTES)
    ports = {"raw": by_socket(lambda _: answer), "raw, reused": by_socket(lambda _: answer, max(SIZES.values()))}
    with contextlib.suppress(ImportError):
        ports["grpc"] = by_grpc(lambda _: answer)
    registry = ModelRegistry()
    for name, size in SIZES.items():
        registry.add(name.replace(" ", ""), Slice().eval(), (torch.zeros(1, size // 4),))
    with Server(create_app(registry)) as server:
        told.send({**ports, "http": server.port})
        signal.pause()


def serve_classifier(device: str, core: int | None, told: Any) -> None:
    """Servers that run ``classifier()``, one inference at a time."""
    begin(core)
    model, x = classifier(device)
    one = threading.Lock()

    def answer(data: Any) -> bytes:
        with one, torch.no_grad():
            image = torch.frombuffer(data, dtype=torch.float32).view(x.shape)
            return model(image.to(device)).cpu().numpy().tobytes()

    registry = ModelRegistry()
    registry.add("classifier", model, (x,))
    with Server(create_app(registry)) as server:
        told.send({"raw": by_socket(answer), "starlette": by_starlette(answer), "http": server.port})
        signal.pause()


def begin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()


def by_socket(answer: Answer, buffer_bytes: int = 0) -> int:
    """A length and the bytes, read into memory of their own, as one that keeps them must, or all into one buffer."""

    def serve(link: socket.socket) -> None:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kept = memoryview(bytearray(buffer_bytes))
        with link:
            while head := link.recv(LENGTH.size, socket.MSG_WAITALL):
                size = LENGTH.unpack(head)[0]
                data = kept[:size] if buffer_bytes else numpy.empty(size, numpy.uint8).data
                receive_into(link, data)
                answered = answer(data)
                link.sendall(LENGTH.pack(len(answered)) + answered)

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    return int(listening.getsockname()[1])


def ask_socket(port: int, answer_bytes: int, stack: ExitStack) -> Callable[[Any], memoryview]:
    """The client of ``by_socket()``, on a connection that stays open."""
    link = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reply = memoryview(bytearray(LENGTH.size + answer_bytes))

    def ask(memory: Any) -> memoryview:
        link.sendall(LENGTH.pack(len(memory)))
        link.sendall(memory)
        receive_into(link, reply)
        return reply[LENGTH.size :]

    return ask


def receive_into(link: socket.socket, view: memoryview) -> None:
    while len(view):
        view = view[link.recv_into(view) :]


def by_grpc(answer: Answer) -> int:
    """Plain bytes each way."""
    import grpc

    server = grpc.server(futures.ThreadPoolExecutor(2), options=GRPC_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: answer(request))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Infer": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    threading.Thread(target=server.wait_for_termination, daemon=True).start()  # and keeps it alive
    return int(port)


def by_starlette(answer: Answer, *, pool: bool = True) -> int:
    """The application one writes in ten lines, with the model in a thread, so that the event loop goes on, or not."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def infer(request: Request) -> Response:
        body = bytearray(await request.body())
        return Response(await asyncio.to_thread(answer, body) if pool else answer(body))

    app = Starlette(routes=[Route("/infer", infer, methods=["POST"])])
    # asyncio sets TCP_NODELAY only on connections of a listening socket that it has made itself.
    # A connection is kept while its client runs something else for longer than uvicorn's five seconds.
    quiet = {"log_level": "critical", "access_log": False, "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(app, port=0, timeout_keep_alive=3600, **quiet))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(1e-2)
    return int(server.servers[0].sockets[0].getsockname()[1])
