"""What reads bytes of strangers, as functions of one text of bytes each, for a fuzzer and for a replay of its corpus.

A target returns where the bytes are answered or refused as they should be. Anything else that is raised is a fault.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from paths import ROOT
from torch import nn
from uvicorn.server import ServerState

from torchsurgeon import wire
from torchsurgeon.codec import find_codec
from torchsurgeon.errors import ProtocolError
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.serve.connections import Connections
from torchsurgeon.serve.protocol import ServeProtocol

CORPUS = ROOT / "tests" / "fixtures" / "fuzz"
# Far above what a message of a few kilobytes holds unless it is a bomb.
MAX_DECODED_BYTES = 1 << 20
_JSON_ONLY = 0xFFFF
_TICKS = 200


def request(data: bytes) -> None:
    """An inference request: two bytes for the length of its JSON header, and its body."""
    header_bytes, body = _split(data)
    with_refusals(lambda: wire.decode_request(body, header_bytes, max_decoded_bytes=MAX_DECODED_BYTES))


def response(data: bytes) -> None:
    """An answer, in the same form."""
    header_bytes, body = _split(data)
    with_refusals(lambda: wire.decode_response(body, header_bytes, max_decoded_bytes=MAX_DECODED_BYTES))


def connection(data: bytes) -> None:
    """Everything that a client sends on one connection to a server, up to where it stops sending."""
    loop, protocol, unhandled = _server()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        received = loop.run_until_complete(_exchange(loop, protocol, ours, theirs, data))
    if unhandled:
        raise AssertionError(unhandled.pop(0))
    check_answers(received)


TARGETS: dict[str, Callable[[bytes], None]] = {"request": request, "response": response, "connection": connection}


def with_refusals(decode: Callable[[], Any]) -> None:
    """Decode, and touch every byte of the tensors, or take a refusal in words."""
    try:
        found = decode()
    except ProtocolError as error:
        if not 0 < len(str(error)) < 2000:
            raise AssertionError("a refusal must say why, and not at any length") from error
        return
    for tensor in found.tensors.values():
        assert tensor.nbytes <= max(MAX_DECODED_BYTES, 1 << 16)
        tensor.clone()


def check_answers(received: bytes) -> None:
    """Check that what a server has sent is answers, of which the refusals say why in JSON."""
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, f"an answer is cut short: {received[:200]!r}"
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        assert found, f"no answer: {received[:200]!r}"
        status = int(found[1])
        if status < 200:
            received = rest
            continue
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert length, f"an answer without a length: {head!r}"
        body, received = rest[: int(length[1])], rest[int(length[1]) :]
        if b"\r\nallow: " not in head.lower() and status >= 400 and body:
            assert json.loads(body)["error"]
        assert status < 500 or status in (501, 503, 505), f"{head!r} {body[:500]!r}"


def lines_of(target: str, folder: Path = CORPUS) -> list[bytes]:
    """The corpus of a target."""
    path = folder / f"{target}.txt"
    return [base64.b64decode(line) for line in path.read_text().split()] if path.exists() else []


def write_lines(target: str, found: list[bytes], folder: Path = CORPUS) -> None:
    """Write a corpus, the shortest first."""
    ordered = sorted(set(found), key=lambda data: (len(data), data))
    (folder / f"{target}.txt").write_text("".join(base64.b64encode(data).decode() + "\n" for data in ordered))


def seeds(target: str) -> Iterator[bytes]:
    """Valid messages of every kind, from which a fuzzer starts."""
    generator = torch.Generator().manual_seed(0)
    if target == "connection":
        yield b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        yield b"GET /v2/models/net HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\nConnection: close\r\n\r\n"
        body = b'{"inputs":[{"name":"input","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
        head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n"
        whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        yield whole
        yield whole + whole
        yield head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        yield head + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"
        yield head + b"Torchsurgeon-Deadline-S: 0.5\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
        yield head + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 2\r\n\r\n{}"
        binary = wire.encode_request({"input": torch.ones(1, 4)})
        sent = b"".join(bytes(part) for part in binary.buffers)
        lengths = b"Content-Length: %d\r\nInference-Header-Content-Length: %d\r\n" % (
            len(sent),
            binary.header_bytes or 0,
        )
        yield head + lengths + b"\r\n" + sent
        yield b"POST /v2/probe?down=100 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
        return
    floats = torch.rand(2, 3, 4, 4, generator=generator)
    pixels = (torch.rand(1, 3, 8, 8, generator=generator) * 255).to(torch.uint8)
    values = {
        "raw": {"x": floats, "y": torch.arange(5), "z": torch.tensor(True)},
        "zstd": {"x": torch.zeros(1, 64)},
        "int8+zstd": {"x": floats},
        "int4": {"x": floats},
        "int8-channel": {"x": floats},
        "bfloat16": {"x": floats},
        "png": {"x": pixels},
        "jpeg-80": {"x": pixels.repeat(1, 1, 3, 3)},
    }
    for name, tensors in values.items():
        codec = find_codec(name)
        if target == "request":
            encoded = wire.encode_request(tensors, codecs=dict.fromkeys(tensors, codec), crc32=name == "int4")
        else:
            encoded = wire.encode_response("net", "1", tensors, codec=codec, parameters={"queue_s": 0.1})
        yield _joined(encoded)
    last = {"x": floats.contiguous(memory_format=torch.channels_last)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch means to give up quantized dtypes some day
        quantized = {"x": torch.quantize_per_tensor(floats, 0.05, 3, torch.quint8)}
    for tensors in (last, quantized, {"x": torch.zeros(1, dtype=torch.complex64)}):
        yield _joined(
            wire.encode_request(tensors, outputs=["y"], request_id="1")
            if target == "request"
            else wire.encode_response("net", "1", tensors, crc32=True)
        )
    in_json = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}
    told = {"inputs": [in_json]} if target == "request" else {"model_name": "net", "outputs": [in_json]}
    yield _JSON_ONLY.to_bytes(2, "little") + json.dumps(told).encode()


def _joined(encoded: wire.Encoded) -> bytes:
    length = _JSON_ONLY if encoded.header_bytes is None else encoded.header_bytes
    return length.to_bytes(2, "little") + b"".join(bytes(part) for part in encoded.buffers)


def _split(data: bytes) -> tuple[int | None, bytearray]:
    length = int.from_bytes(data[:2], "little")
    # In memory that may be written, as bodies are that were read from a connection.
    return None if length == _JSON_ONLY else length, bytearray(data[2:])


@functools.cache
def _server() -> tuple[asyncio.AbstractEventLoop, Callable[[], ServeProtocol], list[str]]:
    """An event loop, what makes a connection's protocol, and what nobody has caught."""
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Linear(4, 2).eval(), torch.zeros(1, 4))
    registry.announce("later")
    app = create_app(registry, body_timeout_s=5.0)
    connections = Connections()
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=75)
    config.load()
    state = ServerState()
    loop = asyncio.new_event_loop()
    unhandled: list[str] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(repr(context)))

    def protocol() -> ServeProtocol:
        return ServeProtocol(app.direct, connections, [], config=config, server_state=state, app_state={}, _loop=loop)

    return loop, protocol, unhandled


async def _exchange(
    loop: asyncio.AbstractEventLoop,
    protocol: Callable[[], ServeProtocol],
    ours: socket.socket,
    theirs: socket.socket,
    data: bytes,
) -> bytes:
    ours.setblocking(False)
    transport, _ = await loop.connect_accepted_socket(protocol, theirs)
    received = bytearray()
    try:
        sending = loop.create_task(loop.sock_sendall(ours, data))
        quiet = 0
        for tick in range(_TICKS):
            # An answer that a thread computes comes a little later than one of the event loop.
            await asyncio.sleep(0 if tick < _TICKS // 2 else 0.0005)
            if sending.done() and tick == 8:
                ours.shutdown(socket.SHUT_WR)
            try:
                piece = ours.recv(1 << 20)
            except BlockingIOError:
                quiet += 1
                # After a refusal the server reads on for a while, in which it says no more.
                if received and quiet > _TICKS // 4:
                    break
                continue
            except ConnectionError:
                break
            if not piece:
                break
            received += piece
            quiet = 0
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await sending
    finally:
        transport.abort()
        await asyncio.sleep(0)
    return bytes(received)
