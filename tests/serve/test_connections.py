"""What one connection, or very many, can do to a server: it holds little for each, and goes on serving the others."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from serving import serving
from torch import nn

from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport

X = torch.zeros(1, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(nn.Linear(4, 2).eval(), X) as server:
        yield server


def connect(server: Server, timeout_s: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s)


def read_all(link: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := link.recv(1 << 16):
            received += piece
    return received


def error_in(answer: bytes) -> str:
    """The message of an answer that has to be JSON."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return str(json.loads(body)["error"])


def check_serves(server: Server) -> None:
    with HttpTransport(server.url, 10) as transport:
        assert transport.infer("net", {"input": X}, max_answer_bytes=1000).tensors["output"].shape == (1, 2)


# --- heads ---

START = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("head", "status", "text"),
    [
        (START + b"X-A: " + b"a" * 65_000 + b"\r\n\r\n", 200, None),
        (START + b"X-A: " + b"a" * 66_000 + b"\r\n\r\n", 431, "at most 64 KiB"),
        (START + b"X-A: b\r\n" * 98 + b"\r\n", 200, None),
        (START + b"X-A: b\r\n" * 99 + b"\r\n", 431, "at most 100 header lines"),
        (b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 431, "at most 64 KiB"),
    ],
    ids=["a long line", "too long a line", "many lines", "too many lines", "too long a target"],
)
def test_the_head_of_a_request_is_bounded(server: Server, head: bytes, status: int, text: str | None) -> None:
    with connect(server) as link:
        link.sendall(head)
        answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    if text is not None:
        assert text in error_in(answer)
        assert b"connection: close" in answer
    check_serves(server)


CHUNKED = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "lines": (START, b"X-1234567: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 100),
    "a line": (START + b"X-A: ", b"y" * 5000),
    "the target": (b"GET /", b"y" * 5000),
    "the trailer's lines": (CHUNKED + b"0\r\n", b"X-A: b\r\n" * 500),
    "a line of the trailer": (CHUNKED + b"0\r\nX-A: ", b"y" * 5000),
    "a chunk's extension": (CHUNKED + b"5;a=", b"y" * 5000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_refused_before_it_takes_memory(server: Server, name: str) -> None:
    first, more = ENDLESS[name]
    sent = 0
    with connect(server) as link, suppress(ConnectionError):
        link.sendall(first)
        # The server drops up to 16 MiB after its answer, so that the client can read it, and then closes.
        while sent < 64 << 20:
            link.sendall(more)
            sent += len(more)
    assert sent < 48 << 20
    check_serves(server)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_header_lines_without_end_do_not_grow_the_process(server: Server) -> None:
    def resident_kib() -> int:
        found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found[1])

    def flood() -> None:
        with connect(server) as link, suppress(ConnectionError):
            link.sendall(START)
            for _ in range(400):
                link.sendall(b"X-1234567: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 1000)

    check_serves(server)
    before_kib = resident_kib()
    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resident_kib() - before_kib < 16 << 10
