"""Tensors as bytes, and a tensor up and 4 KB down over loopback, beside sockets, gRPC, requests and common formats.

Every way begins with a tensor. The server is a process of its own. ``apart``: device and server each have a core, as
they have in use. ``free``: the scheduler places both, often on one core; then nothing has to be woken, and both find
their data in one cache. A *stream* repeats each exchange for some milliseconds, as a stream of inferences would;
*single* exchanges each find the caches that the others have filled.
"""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
import requests
import torch
from torch import Tensor

from benchmarks.support.servers import ANSWER_BYTES, GRPC_OPTIONS, SIZES, ask_socket, serve_exchanges
from benchmarks.support.side_by_side import SideBySide
from benchmarks.support.tail_process import apart, beside
from torchsurgeon import wire
from torchsurgeon.transport import HttpTransport

Ways = dict[str, Callable[[], object]]


# --- tensors as bytes ---


def by_torch_save(x: Tensor) -> object:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_safetensors(x: Tensor) -> object:
    from safetensors.torch import load, save

    return load(save({"x": x}))


def by_numbers(x: Tensor) -> object:
    """JSON as most inference servers take it."""
    return torch.tensor(json.loads(json.dumps(x.tolist())))


def by_wire(x: Tensor) -> object:
    message = wire.encode_request({"x": x})
    return wire.decode_request(bytearray().join(message.buffers), message.header_bytes)


@pytest.mark.benchmark(group="a tensor to bytes and back", max_time=0.5, min_time=1e-3)
@pytest.mark.parametrize("size", SIZES)
def test_bytes(size: str, side_by_side: SideBySide, device: torch.device) -> None:
    x = torch.randn(1, SIZES[size] // 4).to(device)
    ways = {
        "its memory": lambda y: torch.frombuffer(bytearray(y.numpy().tobytes()), dtype=torch.float32),
        "torch.save": by_torch_save,
        "safetensors": by_safetensors,
        "torchsurgeon": by_wire,
    }
    if size == "4 KB":
        ways["JSON"] = by_numbers
    side_by_side({name: lambda way=way: way(x.cpu()) for name, way in ways.items()})


# --- over loopback ---


@pytest.fixture(scope="module")
def server_apart() -> Iterator[dict[str, int]]:
    with beside(serve_exchanges) as ports:
        yield ports


def by_socket(port: int, x: Tensor, stack: ExitStack) -> Callable[[], object]:
    ask = ask_socket(port, ANSWER_BYTES, stack)
    return lambda: ask(x.cpu().numpy().data.cast("B"))


def by_grpc(port: int, x: Tensor, stack: ExitStack) -> Callable[[], object]:
    import grpc

    channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS))
    call = channel.unary_unary("/bench/Infer")
    return lambda: call(x.cpu().numpy().tobytes())


def by_requests(url: str, x: Tensor, stack: ExitStack) -> Callable[[], object]:
    """Its own messages to torchsurgeon's server."""
    session = stack.enter_context(requests.Session())
    session.trust_env = False

    def exchange() -> object:
        message = wire.encode_request({"x": x})
        headers = {wire.HEADER_LENGTH: str(message.header_bytes), "Content-Type": "application/octet-stream"}
        return session.post(f"{url}/infer", data=b"".join(message.buffers), headers=headers).content

    return exchange


def by_http(url: str, x: Tensor, stack: ExitStack) -> Callable[[], object]:
    """A request to torchsurgeon's server whose bytes are ready but for the tensor's, so that only the server's side of
    a message is timed."""
    host, port = urlsplit(url).netloc.split(":")
    link = stack.enter_context(socket.create_connection((host, int(port))))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    header, size = wire.encode_request({"x": x}), 4 * x.numel()
    head = (
        f"POST {urlsplit(url).path}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
        f"{wire.HEADER_LENGTH}: {header.header_bytes}\r\nContent-Length: {header.header_bytes + size}\r\n\r\n"
    ).encode() + bytes(header.buffers[0])

    def exchange() -> bytes:
        link.sendall(head)
        link.sendall(x.cpu().numpy().data.cast("B"))
        received = b""
        while b"\r\n\r\n" not in received:
            received += link.recv(1 << 16)
        begin = received.index(b"\r\n\r\n") + 4
        length = int(received[:begin].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(received) < begin + length:
            received += link.recv(1 << 16)
        return received[begin:]

    return exchange


def ways_of(ports: dict[str, int], size: str, x: Tensor, stack: ExitStack) -> Ways:
    name, url = size.replace(" ", ""), f"http://127.0.0.1:{ports['http']}"
    transport = stack.enter_context(HttpTransport(url))
    return {
        "raw socket": by_socket(ports["raw"], x, stack),
        "raw socket, one buffer": by_socket(ports["raw, reused"], x, stack),
        **({"gRPC": by_grpc(ports["grpc"], x, stack)} if "grpc" in ports else {}),
        "requests": by_requests(f"{url}/v2/models/{name}", x, stack),
        "HTTP by hand": by_http(f"{url}/v2/models/{name}", x, stack),
        "torchsurgeon": lambda: transport.infer(name, {"x": x}, max_answer_bytes=ANSWER_BYTES),
    }


@pytest.mark.benchmark(group="exchanges in a stream, apart", min_time=4e-3)
@pytest.mark.parametrize("size", SIZES)
def test_stream(size: str, side_by_side: SideBySide, device: torch.device, server_apart: dict[str, int]) -> None:
    with ExitStack() as stack:
        side_by_side(ways_of(server_apart, size, torch.randn(1, SIZES[size] // 4).to(device), stack))


@pytest.mark.benchmark(group="single exchanges, apart")
@pytest.mark.parametrize("size", ["150 KB"])
def test_single(size: str, side_by_side: SideBySide, device: torch.device, server_apart: dict[str, int]) -> None:
    with ExitStack() as stack:
        side_by_side(ways_of(server_apart, size, torch.randn(1, SIZES[size] // 4).to(device), stack))


@pytest.mark.benchmark(group="exchanges in a stream, free", min_time=4e-3)
@pytest.mark.parametrize("size", ["150 KB"])
def test_stream_free(size: str, side_by_side: SideBySide, device: torch.device) -> None:
    with apart(serve_exchanges, None) as told, ExitStack() as stack:
        ports = told.recv()
        side_by_side(ways_of(ports, size, torch.randn(1, SIZES[size] // 4).to(device), stack))
