"""Whatever a server does, a split model answers, with the model's own bits, says why, and goes back to the server."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, net, process, read_message, serving, truth
from factories import Slow

import torchsurgeon as ts
from torchsurgeon.serve import Server

# A faulty server is found out, and a returned one used again, in far less; a busy machine may take its time.
PATIENCE_S = 20.0


class Gate:
    """Stands before a server and lets its traffic through, or does to it what ``fault`` says."""

    def __init__(self, port: int) -> None:
        self.port_behind = port
        self.fault = "none"
        self.requests = 0
        self._held: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._held:
            link.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            self._held.append(device)
            threading.Thread(target=self._attend, args=(device,), daemon=True).start()

    def _attend(self, device: socket.socket) -> None:
        with device, suppress(OSError), socket.create_connection(("127.0.0.1", self.port_behind)) as link:
            while message := read_message(device):
                request = bytearray(b"\r\n\r\n".join(message))
                self.requests += 1
                fault = self.fault if self.fault != "none" else None
                if fault == "black hole":
                    while self.fault == "black hole":
                        time.sleep(0.02)
                    return
                if fault == "reset":
                    device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if fault in STATUS:
                    device.sendall(STATUS[fault])
                    continue
                if fault == "flipped going":
                    request[-40] ^= 4
                link.sendall(request)
                message = read_message(link)
                if message is None:
                    return
                answer = bytearray(b"\r\n\r\n".join(message))
                if fault == "flipped coming":
                    answer[-9] ^= 16
                if fault == "cut short":
                    device.sendall(answer[: len(answer) * 2 // 3])
                    return
                if fault == "a byte at a time":
                    for i in range(len(answer)):
                        if self.fault != fault:
                            return
                        device.sendall(answer[i : i + 1])
                        time.sleep(0.1)
                device.sendall(answer)


STATUS = {
    "500": b'HTTP/1.1 500 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "503": b'HTTP/1.1 503 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "400": b'HTTP/1.1 400 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "404": b'HTTP/1.1 404 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "a lie": b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n[1, 2]",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}
FAULTS = {
    "reset": "unavailable",
    "cut short": "unavailable",
    "flipped going": "refused",
    "flipped coming": "damaged",
    "a byte at a time": "late",
    "black hole": "late",
    "500": "refused",
    "503": "refused",
    "400": "refused",
    "404": "refused",
    "a lie": "damaged",
    "not HTTP": "unavailable|damaged",
}


@contextmanager
def gate(port: int) -> Iterator[Gate]:
    one = Gate(port)
    try:
        yield one
    finally:
        one.fault = "none"
        one.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(net()) as running:
        yield running


def split_of(server: Any, **options: Any) -> ts.SplitModule:
    return ts.SplitModule(net(), EXAMPLE, server=server, name="net", **{"partition": "stem", **options})


def answers(split: ts.SplitModule, count: int = 1) -> None:
    for _ in range(count):
        x = torch.rand(1, 3, 8, 8)
        assert torch.equal(split(x), truth(x))


def until(what: Callable[[], bool], split: ts.SplitModule) -> None:
    """Call ``split`` until ``what``; every answer is right all the while."""
    end_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end_s, (split.last, split.stats())
        answers(split)
        time.sleep(0.01)


def degraded(split: ts.SplitModule) -> str:
    assert split.last is not None
    return split.last.degraded or ""


def remote(split: ts.SplitModule) -> bool:
    return split.last is not None and split.last.server is not None and split.last.degraded is None


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_answered_named_and_left_behind(server: Server, fault: str) -> None:
    with gate(server.port) as before, split_of(before.url) as split:
        answers(split, 3)
        assert remote(split)
        before.fault = fault
        answers(split)
        assert re.match(f"({FAULTS[fault]}): ", degraded(split)), degraded(split)
        assert split.last is not None
        assert split.last.local_s > 0
        assert split.last.server is None
        until(lambda: degraded(split).startswith("nobody: "), split)
        assert split.stats()["servers"][0]["breaker"] != "closed"
        before.fault = "none"
        until(lambda: remote(split), split)
        assert split.stats()["degraded"]["nobody"] >= 1


@pytest.mark.parametrize("url", ["refused", "http://no-such-host.invalid:8000"])
def test_a_server_that_was_never_there_is_no_reason_not_to_answer(url: str) -> None:
    if url == "refused":
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for partition in ("stem", "auto"):
        with split_of(url, partition=partition) as split, warnings.catch_warnings():
            warnings.simplefilter("ignore", ts.NoisyProfileWarning)
            answers(split, 3)
            assert "unavailable" in degraded(split)
            assert split.stats()["degraded"] == {"nobody": 3}


def test_a_server_that_comes_up_later_is_used_from_then_on() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with split_of(f"http://127.0.0.1:{port}") as split:
        answers(split)
        with serving(net(), port):
            until(lambda: remote(split), split)


def test_another_model_on_the_server_is_never_used_and_warned_of_once() -> None:
    with serving(net()) as first, split_of(first.url) as split:
        port = first.port
        answers(split)
        first.stop()
        with serving(net(7), port):
            with pytest.warns(ts.MismatchWarning, match=r"stem\.weight") as caught:
                until(lambda: "mismatch" in degraded(split), split)
            assert [warning.filename for warning in caught] == [__file__]
            answers(split, 3)
            assert not remote(split)
        with serving(net(), port):
            until(lambda: remote(split), split)


def test_the_wrong_model_from_the_start_is_warned_of() -> None:
    with serving(net(7)) as running, split_of(running.url) as split:
        with pytest.warns(ts.MismatchWarning, match="Serve the weights") as caught:
            answers(split)
        assert [warning.filename for warning in caught] == [__file__]
        answers(split)
        assert "mismatch" in degraded(split)


@pytest.mark.parametrize("partition", ["stem", "act"])
def test_weights_that_change_here_give_the_new_models_answers(server: Server, partition: str) -> None:
    model = net()
    split = ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=partition)
    with split:
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE, model))
        model.stem.bias = torch.nn.Parameter(model.stem.bias + 1)
        with torch.no_grad():
            model.head.weight.mul_(2)
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE, model))
        assert degraded(split).startswith("weights: ")
        with pytest.warns(ts.MismatchWarning):
            assert torch.equal(split(EXAMPLE), truth(EXAMPLE, model))
        model.load_state_dict(net().state_dict())
        until(lambda: remote(split), split)


def test_the_next_of_several_servers_is_asked(server: Server) -> None:
    with gate(server.port) as one, gate(server.port) as two, split_of([one.url, two.url]) as split:
        answers(split, 3)
        assert split.last is not None
        assert split.last.server == one.url
        one.fault = "reset"
        answers(split)
        assert split.last.server == two.url
        assert degraded(split).startswith("unavailable: ")
        answers(split, 3)
        two.fault = "500"
        until(lambda: split.last is not None and split.last.server is None, split)
        two.fault = "none"
        until(lambda: remote(split), split)
        assert split.last.server == two.url


def test_a_refusal_of_what_was_put_in_is_not_held_against_the_server(server: Server) -> None:
    with split_of(server.url) as split:
        answers(split)
        many = torch.rand(70, 3, 8, 8)
        for _ in range(4):
            assert torch.equal(split(many), truth(many))
            assert degraded(split).startswith("refused: ")
        answers(split)
        assert remote(split)
        with pytest.raises(RuntimeError):
            split(EXAMPLE.double())


def test_a_process_is_stopped_continued_killed_and_restarted() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Slow().eval()

    def answers(split: ts.SplitModule) -> None:
        x = torch.rand(1, 4)
        assert torch.equal(split(x), truth(x, model))

    def until(what: Callable[[], bool], split: ts.SplitModule) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < end_s, (split.last, split.stats())
            answers(split)
            time.sleep(0.01)

    with process("slow=factories:slow", "--port", "0") as (child, port):
        url = f"http://127.0.0.1:{port}"
        split = ts.SplitModule(model, torch.ones(1, 4), server=url, name="slow", partition=0)
        answers(split)
        answers(split)
        assert remote(split)
        child.send_signal(signal.SIGSTOP)
        answers(split)
        assert degraded(split).startswith("late: ")
        until(lambda: degraded(split).startswith("nobody: "), split)
        child.send_signal(signal.SIGCONT)
        until(lambda: remote(split), split)
        child.kill()
        child.wait()
        answers(split)
        assert not remote(split)
    with process("slow=factories:slow", "--port", str(port)):
        until(lambda: remote(split), split)
    split.close()
    assert os.getpid()
