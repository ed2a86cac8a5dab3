"""A thread or a socket that the system refuses costs no answer: the device gives it, and says why."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
from classifier import EXAMPLE, degraded, remote, right, split_of, until
from paths import environment

import torchsurgeon as ts
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport, InProcessTransport

_SOON_S = 60.0


class Refusing:
    """Stands for a system that starts no thread, since the process has as many threads as it may have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses, self.refused = True, 0
        start = threading.Thread.start

        def instead(thread: threading.Thread) -> None:
            if self.refuses and thread.name.startswith("torchsurgeon") and "serve" not in thread.name:
                self.refused += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", instead)


@pytest.fixture
def refusing(server: Server, monkeypatch: pytest.MonkeyPatch) -> Refusing:
    return Refusing(monkeypatch)


@pytest.mark.parametrize("partition", [1, "auto"])
def test_the_device_answers_from_the_first_call_on_and_servers_are_asked_once_threads_are_there(
    server: Server, refusing: Refusing, partition: Any
) -> None:
    with split_of(server, partition=partition) as split:
        for _ in range(3):
            assert right(split)
            assert "no thread could be started" in degraded(split)
        assert refusing.refused
        refusing.refuses = False
        until(lambda: remote(split) or (partition == "auto" and degraded(split) == ""), split)


def test_the_device_answers_later_calls_that_need_a_thread(server: Server, refusing: Refusing) -> None:
    refusing.refuses = False
    with split_of(server, partition=1, codec="zstd") as split:
        assert right(split)
        # As if there had never been threads.
        split._engine._pool.close()
        split._engine._pool.reset_after_fork()
        refusing.refuses = True
        for _ in range(3):
            assert right(split)
            assert degraded(split).startswith("threads: no thread could be started")
        assert [one["opened"] for one in split.stats()["servers"]] == [0]
        refusing.refuses = False
        assert right(split)
        assert degraded(split) == ""


def test_a_call_over_an_open_connection_needs_no_thread(server: Server, refusing: Refusing) -> None:
    refusing.refuses = False
    with split_of(server, partition=1) as split:
        assert right(split)
        split._engine._pool.close()
        split._engine._pool.reset_after_fork()
        refusing.refuses = True
        for _ in range(3):
            assert right(split)
            assert remote(split)


@pytest.mark.parametrize("allowed", [(), ("torchsurgeon-request",), ("torchsurgeon-request", "torchsurgeon-heads")])
def test_streams_answer_too(server: Server, monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...]) -> None:
    start = threading.Thread.start

    def instead(thread: threading.Thread) -> None:
        if thread.name in ("torchsurgeon-heads", "torchsurgeon-answers", "torchsurgeon-request") and (
            thread.name not in allowed
        ):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", instead)
    with split_of(server, partition=1) as split:
        own = split.model(EXAMPLE)
        assert split.submit(EXAMPLE).result(_SOON_S).equal(own)
        assert all(answer.equal(own) for answer in split.map([EXAMPLE] * 20, depth=4))


def test_without_a_fallback_the_error_says_what_is_refused(server: Server, refusing: Refusing) -> None:
    with split_of(server, partition=1, fallback="error") as split:
        with pytest.raises(ts.ServerUnavailableError, match="no thread could be started"):
            split(EXAMPLE)
        refusing.refuses = False
        assert right(split)
        refusing.refuses = True
        assert right(split)  # an exchange without a fallback needs no other thread


def test_transports_say_what_is_refused(server: Server, refusing: Refusing) -> None:
    with HttpTransport(server.url) as transport:
        with pytest.raises(ts.ServerUnavailableError, match="no thread could be started"):
            transport.get_json("/v2")
        assert transport.probe(1, 1).sent_bytes == 1
    with pytest.raises(ts.ServerUnavailableError, match="no thread could be started"):
        InProcessTransport(lambda *_: None)


_FILES = """
import os, resource, sys
import torch, torchsurgeon as ts
from classifier import EXAMPLE, degraded, remote, right, split_of

torch.set_num_threads(1)
url, when = sys.argv[1:]
split = split_of(url, partition=1)
if when == "later":
    assert right(split) and remote(split), degraded(split)
    split._engine.servers.peers[0].transport._idle.clear()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
for _ in range(3):
    assert right(split)
    said = degraded(split)
    assert said, said
assert "ulimit -n" in said, said
for number in held:
    os.close(number)
"""

_EXIT = """
import atexit, sys
import torch
from classifier import EXAMPLE, degraded, right, split_of

torch.set_num_threads(1)
split = split_of(sys.argv[1], partition=1)
if sys.argv[2] == "later":
    assert right(split)

def last():
    assert right(split)
    print("answered:", degraded(split))

atexit.register(last)
import threading
threading._register_atexit(last)
"""


def run(code: str, *arguments: str) -> str:
    program = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("when", ["first", "later"])
def test_too_many_open_files_are_named_and_the_device_answers(server: Server, when: str) -> None:
    run(_FILES, server.url, when)


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_call_while_the_interpreter_exits_is_answered(server: Server, when: str) -> None:
    assert run(_EXIT, server.url, when).count("answered") == 2
