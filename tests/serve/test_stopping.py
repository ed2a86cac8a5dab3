"""A server that is told to stop: nobody who is served loses a request, and nobody delays it for long."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from paths import environment
from torch import nn

from torchsurgeon.serve import ModelRegistry, Server, create_app

BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.5] * 4}]}).encode()
# A negative input takes the model of factories:slow a second.
SLOW = BODY.replace(b"0.5", b"-1.0")
# For the model of factories:long, whose answers are 16 MiB.
LONG = json.dumps({**json.loads(BODY), "parameters": {"binary_data_output": True}}).encode()


@contextmanager
def serving_process(grace_s: float, name: str = "slow") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves a model; it is killed at the end of the block."""
    script = f"from torchsurgeon import serve; serve.run({{'{name}': 'factories:{name}'}}, port=0, grace_s={grace_s})"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("ready"):
                    break
            yield child, int(line.rpartition(":")[2])
        finally:
            child.kill()


def head(body: bytes, name: str = "slow", more: str = "") -> bytes:
    lines = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return lines.encode()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def ask_for_long(link: socket.socket, body: bytes = LONG, more: str = "") -> None:
    """Ask for an answer of which the systems keep only a part, and return once it is being sent."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    link.sendall(head(body, "long", more) + body)
    assert link.recv(1, socket.MSG_PEEK)


def answer_on(link: socket.socket) -> tuple[int, dict[str, str]]:
    with contextlib.closing(http.client.HTTPResponse(link)) as response:
        response.begin()
        response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}


def client(port: int, answered: list[dict[str, str]], begun: threading.Event) -> None:
    """Ask again and again, until an answer says that the connection closes."""
    with connect(port) as link:
        headers: dict[str, str] = {}
        while headers.get("connection") != "close":
            link.sendall(head(BODY) + BODY)
            status, headers = answer_on(link)
            assert status == 200
            begun.set()
        answered.append(headers)


def test_a_server_that_stops_answers_what_it_has_taken_and_says_that_it_closes() -> None:
    with serving_process(20) as (child, port), contextlib.ExitStack() as stack:
        assert child.stdout is not None
        last_answers: list[dict[str, str]] = []
        begun = [threading.Event() for _ in range(4)]
        threads = [threading.Thread(target=client, args=(port, last_answers, one)) for one in begun]
        for thread in threads:
            thread.start()
        assert all(one.wait(30) for one in begun)
        slow = stack.enter_context(connect(port))
        slow.sendall(head(SLOW) + SLOW)
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline().startswith("stopping: ")
        late = stack.enter_context(connect(port))
        for path, expected in (("live", 200), ("ready", 503)):
            late.sendall(f"GET /v2/health/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            status, headers = answer_on(late)
            assert status == expected
        assert headers["retry-after"] == "1"
        late.sendall(head(BODY) + BODY)
        status, headers = answer_on(late)
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        status, headers = answer_on(slow)
        assert (status, headers["connection"]) == (200, "close")
        for thread in threads:
            thread.join()
        assert len(last_answers) == 4
        assert child.wait(20) == -signal.SIGTERM
        assert child.stdout.read().rstrip().endswith("0 requests were cut off")


def test_half_a_request_delays_the_end_no_longer_than_the_grace() -> None:
    with serving_process(1.0, "long") as (child, port), contextlib.ExitStack() as stack:
        assert child.stdout is not None
        half, dribbling, silent, unread = [stack.enter_context(connect(port)) for _ in range(4)]
        half.sendall(head(LONG, "long") + LONG[:-5])
        dribbling.sendall(head(LONG, "long")[:-10])
        ask_for_long(silent)
        assert answer_on(silent)[0] == 200
        ask_for_long(unread)
        begin_s = time.monotonic()
        child.send_signal(signal.SIGTERM)
        child.wait(60)
        # Otherwise a body would have 30 s, and a head 10 s.
        assert time.monotonic() - begin_s < 9
        assert child.stdout.read().rstrip().endswith("2 requests were cut off")


def test_an_answer_that_is_being_sent_is_sent_to_its_end() -> None:
    with serving_process(60, "long") as (child, port), contextlib.ExitStack() as stack:
        assert child.stdout is not None
        direct, closing, compressed = [stack.enter_context(connect(port)) for _ in range(3)]
        ask_for_long(direct)
        ask_for_long(closing, more="Connection: close\r\n")
        ask_for_long(compressed, gzip.compress(LONG), "Content-Encoding: gzip\r\n")
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline().startswith("stopping: 3 connections, 3 with a request under way")
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(3)
        for link in (direct, closing, compressed):
            assert answer_on(link)[0] == 200
        assert child.wait(20) == -signal.SIGTERM
        assert child.stdout.read().rstrip().endswith("0 requests were cut off")


@pytest.mark.parametrize("direct", [True, False])
def test_a_model_that_is_not_ready_says_when_to_ask_again(direct: bool) -> None:
    registry = ModelRegistry()
    model = registry.add("trained", nn.Linear(4, 2).eval(), torch.zeros(1, 4)).graph.model
    registry.announce("late")
    with contextlib.closing(registry), Server(create_app(registry), direct=direct) as server:
        model.train()
        body = BODY.replace(b'"x"', b'"input"')
        requests = [
            f"GET /v2/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            for path in ("health/ready", "models/late", "models/late/ready")
        ]
        requests += [head(body).replace(b"slow", name) + body for name in (b"late", b"trained")]
        for request in requests:
            with connect(server.port) as link:
                link.sendall(request)
                status, headers = answer_on(link)
                assert (status, headers["retry-after"]) == (503, "1")
