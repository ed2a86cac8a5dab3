"""Every kind of bad request: its answer, the metric that counts it, and that everything is afterwards as it was."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from waiting import wait_for

from torchsurgeon.serve import ModelRegistry, Server, create_app, guarded
from torchsurgeon.serve.metrics import Metrics
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.tokens import Tokens

TOKEN = "a-token-0123456789abc"
TENSOR = '{"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 1.0, 1.0, 1.0]}'
BODY = b'{"inputs": [%s]}' % TENSOR.encode()
BEARER = f"Authorization: Bearer {TOKEN}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
MOST_BYTES = 1 << 20


def post(body: bytes = BODY, more: str = "", *, token: str = BEARER, length: int | None = None) -> bytes:
    """A request for an inference, which closes its connection."""
    size = f"Content-Length: {len(body) if length is None else length}\r\n" if length != -1 else ""
    return f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n{token}{size}{more}\r\n".encode() + body


class Bad(NamedTuple):
    """What is sent, and what comes of it.

    Attributes:
        data: the bytes.
        statuses: of the answers; none where the client does not wait for one.
        kinds: the kinds of errors that are counted, in any order; "" for a request that is answered with its result.
        model: the model under which they are counted; empty where nobody knows which is meant.
        then: what the client does once it has sent them: wait for answers, "reset" or "close" the connection, or "end"
            its half of it.
    """

    data: bytes
    statuses: tuple[int, ...]
    kinds: tuple[str, ...]
    model: str = "net"
    then: str = "wait"


P = "ProtocolError"
# A deadline that has passed is noticed before the request waits or after that, as it comes.
TOO_LATE = "BusyError or ExpiredError"
ONE_OF = {"BusyError": TOO_LATE, "ExpiredError": TOO_LATE}
TWICE = BODY.replace(b"]}]}", f"]}}, {TENSOR}]}}".encode())
CASES = {
    # malformed
    "no HTTP": Bad(b"\x16\x03\x01\x02\x00nonsense\r\n\r\n", (400,), (P,), ""),
    "no JSON": Bad(post(b"{]" * 50), (400,), (P,)),
    "JSON that is not UTF-8": Bad(post(b'{"inputs": "\xff"}'), (400,), (P,)),
    "no tensors": Bad(post(b"{}"), (400,), (P,)),
    "a datatype that there is not": Bad(post(BODY.replace(b"FP32", b"FP33")), (400,), (P,)),
    "a shape that does not fit": Bad(post(BODY.replace(b"[1, 4]", b"[1, 5]")), (400,), (P,)),
    "a name that the model has not": Bad(post(BODY.replace(b'"input"', b'"output"')), (400,), ("PartitionError",)),
    "a header longer than the body": Bad(post(more="Inference-Header-Content-Length: 999999\r\n"), (400,), (P,)),
    "a length that is no number": Bad(post(more="Inference-Header-Content-Length: x\r\n"), (400,), (P,)),
    "an encoding that there is not": Bad(post(more="Content-Encoding: br\r\n"), (400,), (P,)),
    "bytes that are no gzip": Bad(post(b"no gzip", "Content-Encoding: gzip\r\n"), (400,), (P,)),
    "a deadline that is none": Bad(post(more="Torchsurgeon-Deadline-S: soon\r\n"), (400,), (P,)),
    "a priority that is none": Bad(post(more="Torchsurgeon-Priority: first\r\n"), (400,), (P,)),
    "a model that there is not": Bad(post().replace(b"/net/", b"/nothing/"), (404,), ("ModelNotServedError",), ""),
    "another method": Bad(post().replace(b"POST ", b"PUT ", 1), (405,), ("HTTPException",), ""),
    "no host": Bad(post().replace(b"Host: x\r\n", b""), (400,), (P,), ""),
    "another version of HTTP": Bad(post().replace(b"HTTP/1.1", b"HTTP/2.0"), (505,), ("VersionError",), ""),
    "a version that there is not": Bad(post().replace(b"HTTP/1.1", b"HTTP/1.2"), (505,), ("VersionError",), ""),
    "no version": Bad(b"GET /v2/health/live\r\n\r\n", (505,), ("VersionError",), ""),
    "a transfer coding of two": Bad(
        post(b"0\r\n\r\n", "Transfer-Encoding: gzip, chunked\r\n", length=-1), (501,), ("TransferCodingError",), ""
    ),
    "another transfer coding": Bad(
        post(b"abc", "Transfer-Encoding: xchunked\r\n", length=-1), (501,), ("TransferCodingError",), ""
    ),
    # oversized
    "a body that is declared too large": Bad(post(b"", length=1 << 40), (413,), ("BodyTooLargeError",)),
    "a chunked body that is too large": Bad(
        post(b"", CHUNKED, length=-1) + b"200000\r\n" + bytes(1 << 21) + b"\r\n0\r\n\r\n",
        (413,),
        ("BodyTooLargeError",),
    ),
    "a head that is too large": Bad(post(more=f"X: {'x' * 70_000}\r\n"), (431,), ("HeadTooLargeError",), ""),
    "too many header lines": Bad(post(more="X: x\r\n" * 200), (431,), ("HeadTooLargeError",), ""),
    # unauthorised
    "no token": Bad(post(token=""), (401,), ("UnauthorizedError",), ""),
    "a wrong token": Bad(post(token=BEARER.replace("abc", "abd")), (401,), ("UnauthorizedError",), ""),
    # duplicated
    "the same request twice": Bad(post(more="X-Request-Id: same\r\n") * 2, (200, 200), ("", "")),
    "a bad request twice": Bad(post(b"{}") * 2, (400, 400), (P, P)),
    "a tensor twice": Bad(post(TWICE), (400,), (P,)),
    "a key twice": Bad(post(BODY.replace(b'"shape"', b'"shape": [1, 4], "shape"')), (400,), (P,)),
    "two lengths of a body": Bad(post(more="Content-Length: 5\r\n"), (400,), (P,), ""),
    "two lengths of a header": Bad(post(more="Inference-Header-Content-Length: 5\r\n" * 2), (400,), (P,)),
    "two hosts": Bad(post(more="Host: x\r\n"), (400,), (P,), ""),
    "two tokens": Bad(post(more=BEARER), (400,), (P,)),
    "two deadlines": Bad(post(more="Torchsurgeon-Deadline-S: 5\r\nTorchsurgeon-Deadline-S: 6\r\n"), (400,), (P,)),
    "two priorities": Bad(post(more="Torchsurgeon-Priority: low\r\nTorchsurgeon-Priority: high\r\n"), (400,), (P,)),
    # late
    "a deadline that cannot be kept": Bad(post(more="Torchsurgeon-Deadline-S: 0.0\r\n"), (503,), (TOO_LATE,)),
    "a head that does not end": Bad(post()[:40], (408,), ("LateError",), ""),
    "a body that does not end": Bad(post()[:-5], (408,), ("LateError",)),
    # half-sent, and cut off
    "half a head, and no more": Bad(post()[:40], (), (), "", "end"),
    "half a body, and no more": Bad(post()[:-5], (), ("GoneError",), "net", "end"),
    "half a body, cut off": Bad(post()[:-5], (), ("GoneError",), "net", "reset"),
    "half a chunk, cut off": Bad(
        post(b"", CHUNKED, length=-1) + b"100\r\n{", (), ("GoneError",), "net", "reset"
    ),
    "half a head, cut off": Bad(post()[:40], (), (), "", "reset"),
}  # fmt: skip


class Watched(NamedTuple):
    server: Server
    outcomes: list[Outcome]


@pytest.fixture(scope="module", params=["direct", "asgi"])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Linear(4, 2).eval(), torch.ones(1, 4))
    app = create_app(registry)
    file = tmp_path_factory.mktemp("served") / "tokens"
    file.write_text(TOKEN)
    app.tokens = Tokens(file)
    metrics = Metrics(registry, lambda: 0)
    outcomes: list[Outcome] = []
    # The metrics first: whoever sees the outcome finds it counted.
    app.listeners += [metrics, outcomes.append]
    app.metrics = metrics.text
    with Server(app, direct=request.param == "direct") as server:
        yield Watched(server, outcomes)
    registry.close()


def statuses(link: socket.socket, count: int) -> list[int]:
    """Read until there are so many answers, and return their statuses."""
    data = b""
    while len(found := re.findall(rb"HTTP/1\.1 (\d+) ", data)) < count or not _whole(data):
        piece = link.recv(1 << 16)
        if not piece:
            break
        data += piece
    return [int(one) for one in found]


def _whole(data: bytes) -> bool:
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is None or len(data) < int(length[1]):
            return False
        if head.split()[1] >= b"400":
            json.loads(data[: int(length[1])])["error"]
        data = data[int(length[1]) :]
    return True


def send(watched: Watched, bad: Bad) -> None:
    """Do what a case says, and check its answers."""
    with socket.create_connection(("127.0.0.1", watched.server.port), timeout=30) as link:
        # The server may refuse a request, and close, before all of it is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(bad.data)
        if bad.then == "wait":
            assert statuses(link, len(bad.statuses)) == list(bad.statuses)
            return
        # So that the server has begun to read the request.
        wait_for(lambda: len(watched.server.connections) >= 1)
        time.sleep(0.02)
        if bad.then == "reset":
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            link.shutdown(socket.SHUT_WR)
            assert link.recv(1000) == b""


def good(watched: Watched) -> None:
    with socket.create_connection(("127.0.0.1", watched.server.port), timeout=30) as link:
        link.sendall(post())
        assert statuses(link, 1) == [200]


def counted(watched: Watched) -> Counter[tuple[str, str]]:
    """Return how many errors of each kind are counted, by model and kind."""
    text = watched.server.app.metrics()[0].decode()
    lines = re.findall(r'^torchsurgeon_errors_total\{kind="(\w+)",model="(\w*)"\} (\S+)$', text, re.MULTILINE)
    found = Counter[tuple[str, str]]()
    for kind, model, value in lines:
        found[model, ONE_OF.get(kind, kind)] += int(float(value))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_is_answered_and_counted_and_leaves_nothing_behind(
    watched: Watched, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = CASES[name]
    good(watched)
    wait_for(lambda: len(watched.server.connections) == 0)
    watched.outcomes.clear()
    gc.collect()
    before, descriptors = counted(watched), len(os.listdir("/proc/self/fd"))
    if 408 in bad.statuses:
        monkeypatch.setattr(guarded, "HEAD_TIMEOUT_S", 0.2)
        app: Any = watched.server.app
        monkeypatch.setattr(app, "body_timeout_s", 0.2)
        monkeypatch.setattr(app.direct, "_timeout_s", 0.2)
    send(watched, bad)
    monkeypatch.undo()
    wait_for(lambda: len(watched.outcomes) == len(bad.kinds))
    told = [ONE_OF.get(one.error, one.error) for one in watched.outcomes]
    assert sorted(told) == sorted(bad.kinds)
    assert {one.model for one in watched.outcomes} <= {bad.model, "nothing"}
    assert counted(watched) - before == Counter((bad.model, kind) for kind in bad.kinds if kind)
    good(watched)
    wait_for(lambda: len(watched.server.connections) == 0)
    assert watched.server.app.registry.get("net").worker.waiting == 0
    wait_for(lambda: gc.collect() >= 0 and len(os.listdir("/proc/self/fd")) <= descriptors)


def test_bad_requests_leave_no_memory_behind(watched: Watched) -> None:
    """Each with a megabyte that the server reads before it knows better; so 300 would leave 300 MB."""
    large = MOST_BYTES - 1000
    refused = [
        CASES["a chunked body that is too large"],
        Bad(post(b"x" * large), (400,), (P,)),
        Bad(post(b'{"inputs": "%s"}' % (b"x" * (large // 2))), (400,), (P,)),
        Bad(post(b"x" * large)[:-5], (), ("GoneError",), "net", "reset"),
        Bad(post(b"", CHUNKED, length=-1) + b"F0000\r\n" + bytes(0xE0000), (), (P,), "net", "reset"),
    ]  # fmt: skip

    def round_of(count: int) -> int:
        for i in range(count):
            send(watched, refused[i % len(refused)])
        good(watched)
        wait_for(lambda: len(watched.server.connections) == 0)
        gc.collect()
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    before_kib = round_of(60)
    assert round_of(300) - before_kib < 64 << 10
