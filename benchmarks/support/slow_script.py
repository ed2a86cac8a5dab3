"""Run a script of others on an emulated slow device: calls of its outermost modules take so many times as long.

Pictures of CIFAR-10 are random ones, so that nothing is downloaded, and a socket that the script binds to all addresses
is bound to one of this machine only.

Connecting takes the link's round trip. An emulated link begins on this machine, so that a script would be connected at
once, and its first messages would arrive in one piece.

    python -m benchmarks.support.slow_script FACTOR CORE ADDRESS ROUND_TRIP_S SCRIPT ARGUMENTS…
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchsurgeon.emulate import SlowDevice


def main() -> None:
    factor, core, address, round_trip_s, script, *arguments = sys.argv[1:]
    if core != "any":
        os.sched_setaffinity(0, {int(core)})
    torch.set_num_threads(1)
    _slow_down(SlowDevice(float(factor)))
    _bind_to(address)
    _connect_after(float(round_trip_s))
    _invent_pictures()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _slow_down(device: SlowDevice) -> None:
    call = nn.Module.__call__
    state = threading.local()

    def slowly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(state, "inside", False):
            return call(module, *args, **kwargs)
        state.inside = True
        try:
            return device.call(call, module, *args, **kwargs)
        finally:
            state.inside = False

    if device.factor > 1:
        nn.Module.__call__ = slowly  # type: ignore[method-assign]


def _bind_to(address: str) -> None:
    bind = socket.socket.bind

    def bound(self: socket.socket, where: Any) -> None:
        bind(self, (address, where[1]) if where[0] == "0.0.0.0" else where)

    socket.socket.bind = bound  # type: ignore[method-assign]


def _connect_after(round_trip_s: float) -> None:
    connect = socket.socket.connect

    def connected(self: socket.socket, where: Any) -> None:
        connect(self, where)
        time.sleep(round_trip_s)

    socket.socket.connect = connected  # type: ignore[method-assign]


def _invent_pictures() -> None:
    import torchvision.datasets

    def invented(*args: Any, transform: Any = None, **kwargs: Any) -> Any:
        return torchvision.datasets.FakeData(256, (3, 32, 32), 10, transform=transform)

    torchvision.datasets.CIFAR10 = invented


if __name__ == "__main__":
    main()
