"""What loading, and a busy time, leave behind in a server's process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import requests
import torch
from torch import nn

from torchsurgeon.serve import ModelRegistry, Server, create_app, idle
from torchsurgeon.serve.idle import IdleMemory

_GIVES_BACK = """
import torch
from torchsurgeon.serve.loading import settle

def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) >> 10

before = resident_mib()
# Too small to be mapped one by one, and the last keeps the heap from shrinking by itself.
tensors = [torch.ones(12_000) for _ in range(4000)]
last = torch.ones(12_000)
del tensors
settle()
print(resident_mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not Linux: memory is read from /proc")
def test_memory_that_loading_took_is_given_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", _GIVES_BACK], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 40, "of 183 MiB"


def test_a_server_gives_memory_back_once_after_each_busy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(idle, "give_freed_memory_back", lambda: given.append(1))
    registry = ModelRegistry()
    registry.announce("other")
    net = registry.add("net", nn.Linear(3, 2).eval(), torch.ones(1, 3))
    name = net.graph.inputs[0].name
    body = {"inputs": [{"name": name, "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}]}
    memory = IdleMemory(registry)
    with Server(create_app(registry)) as server:
        assert not memory.look(), "nothing has been asked yet"
        for busy in (1, 2):
            for _ in range(2):
                ended = net.statistics.ended
                assert requests.post(f"{server.url}/v2/models/net/infer", json=body, timeout=60).ok
                # An answer may be here before the server has counted it.
                end_s = time.monotonic() + 60
                while net.statistics.ended == ended:
                    assert time.monotonic() < end_s
                    time.sleep(0.001)
                assert not memory.look(), "a request has ended since the look before"
            assert memory.look()
            assert not memory.look(), "it has been given back"
            assert len(given) == busy


def test_the_idle_thread_gives_memory_back_and_ends() -> None:
    registry = ModelRegistry()
    model = registry.add("net", nn.Linear(3, 2).eval(), torch.ones(1, 3))
    memory = IdleMemory(registry, idle_s=0.01)
    memory.start()
    model.statistics.failed(0.1)
    deadline_s = time.monotonic() + 60
    while memory._given_back != 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    memory.close()
    assert not memory._thread.is_alive()
