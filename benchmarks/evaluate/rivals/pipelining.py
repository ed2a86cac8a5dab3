"""``torch.distributed.pipelining`` over gloo, with the emulated link between its two processes.

Gloo connects the processes by itself, at addresses that each writes into a store. The device's process therefore reads
them through a store of its own, which puts the emulated link's port in place of the server's. Of two processes, gloo
lets the one connect whose address is the larger, whichever byte of a port counts more. So the link listens on a port
below those that the kernel gives out, whose lower byte is zero, and the server is told the largest port there is for
the device, to which it never connects. Gloo also refuses a connection from a process whose address it has not read yet,
which over a link looks like a connection that breaks. So the device connects once the server has read its address.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import torchsurgeon as ts
from benchmarks.evaluate.rivals import sockets
from benchmarks.evaluate.rivals.rival import Rival, seconds
from benchmarks.evaluate.study import Study, network
from benchmarks.support import tail_process
from torchsurgeon.backends import Part
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS, Link

_PATIENCE = datetime.timedelta(seconds=120)
_CPU = torch.device("cpu")
_INTERNET = struct.pack("=H", socket.AF_INET)
_LOOPBACK = socket.inet_aton("127.0.0.1")
_MOST_PORT = (1 << 16) - 1
_READ, _SETTLING_S = "the server has read the device's address", 0.5


class RelayedStore(dist.Store):
    """A store of the process group that changes the port in the other process's address.

    Args:
        store: the store that both processes share.
        rank: this process.
        relay: takes the port that the other one listens on, and returns the port to use instead.
    """

    def __init__(self, store: dist.Store, rank: int, relay: Callable[[int], int]) -> None:
        super().__init__()
        self._store, self._other, self._relay = store, f"//{1 - rank}", relay

    def set(self, key: str, value: bytes) -> None:
        """Write a value."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Read a value; the other process's address with another port."""
        value = bytes(self._store.get(key))
        at = value.find(_LOOPBACK) - 4
        if at < 0 or value[at : at + 2] != _INTERNET or not key.endswith(f"/{self._other[-1]}"):
            return value
        port = int.from_bytes(value[at + 2 : at + 4], "big")
        return value[: at + 2] + self._relay(port).to_bytes(2, "big") + value[at + 4 :]

    def wait(self, keys: list[str], timeout: datetime.timedelta = _PATIENCE) -> None:
        """Wait until keys are there."""
        self._store.wait(keys, timeout)

    def add(self, key: str, amount: int) -> int:
        """Add to a number."""
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        """Return whether keys are there."""
        return self._store.check(keys)

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Change how long reading waits."""
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> datetime.timedelta:
        """How long reading waits."""
        return _PATIENCE


def serve(name: str, core: int | None, port: int, told: Any) -> None:
    """Be the second stage, cut and run as the pipe says; send each answer back over gloo."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, example = network(name)
    with torch.no_grad():
        graph = ts.trace(model, example)
        _join(1, port, lambda _: _MOST_PORT)
        points = {point.index: point for point in graph.points}
        schedules: dict[tuple[int, int], ScheduleGPipe] = {}
        while True:
            index, count = key = told.recv()
            if key not in schedules:
                schedules[key] = _schedule(sockets.tail(graph, points[index]), 1, count)
            (answer,) = schedules[key].eval()
            dist.send(answer, 0)


def _join(rank: int, port: int, relay: Callable[[int], int]) -> None:
    """Open the process group of both processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    shared = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=_PATIENCE, wait_for_workers=False)

    def relayed(other: int) -> int:
        if rank:
            shared.set(_READ, "yes")
        else:
            shared.wait([_READ], _PATIENCE)
            time.sleep(_SETTLING_S)
        return relay(other)

    dist.init_process_group(
        "gloo", store=RelayedStore(shared, rank, relayed), rank=rank, world_size=2, timeout=_PATIENCE
    )


def _schedule(module: nn.Module, stage: int, count: int) -> ScheduleGPipe:
    return ScheduleGPipe(PipelineStage(module, stage, 2, _CPU), n_microbatches=count)


class Pipelining(Rival):
    """Two stages of ``torch.distributed.pipelining``, with GPipe's schedule; a stream is a batch in micro-batches.

    Args:
        study: the network.
        core: the server's core.
        device: the slow device, which runs the first stage.
        stack: closes the link and ends the process.
    """

    streams = True
    of_any_length = False

    def __init__(self, study: Study, core: int | None, device: SlowDevice, stack: ExitStack) -> None:
        super().__init__("torch.distributed.pipelining over gloo")
        self._study, self._device = study, device
        # Of its own, since a stage moves the weights that it is given, and parts of other rivals would be built anew.
        model, example = network(study.name)
        with torch.no_grad():
            self._graph = ts.trace(model, example)
        self._point, self._link = study.graph.points[0], PRESETS["wifi"]
        self._schedules: dict[tuple[int, int], ScheduleGPipe] = {}
        self._replanning_s: dict[int, float] = {}
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
        self._told = stack.enter_context(tail_process.apart(serve, study.name, core, port))
        self._stack = stack
        _join(0, port, self._relayed)
        stack.callback(dist.destroy_process_group)

    def use(self, link: Link) -> None:
        """Take on a link, and cut inside the network where that is foretold to be the quickest."""
        super().use(link)
        self._link = link
        self._point = sockets.best_inner(self._study, link)
        if self._point.index not in self._replanning_s:
            first_s = seconds(self.infer)
            self._replanning_s[self._point.index] = first_s - statistics.median(seconds(self.infer) for _ in range(2))

    def infer(self) -> Tensor:
        """Return the network's answer for its example."""
        return self._run(1)

    def before_stream(self, count: int) -> None:
        """Cut where the slowest stage is the quickest, and build the stages for so many micro-batches on both sides."""
        self._point = sockets.best_inner(self._study, self._link, stream=True)
        self._run(count)

    def rate(self, count: int) -> float:
        """Return how many answers come in a second of one batch after the other, each of so many micro-batches."""
        return count / seconds(lambda: self._run(count))

    def replanning_s(self) -> float | None:
        """Return what new stages on both sides, with their first inference, took beyond another inference."""
        return self._replanning_s[self._point.index]

    def chosen(self) -> str:
        """Return where it cuts over the present link."""
        return self._point.name

    def _run(self, count: int) -> Tensor:
        key, study = (self._point.index, count), self._study
        self._told.send(key)
        if key not in self._schedules:
            point = self._graph.points[self._point.index]
            head = self._device.wrap(Part.head(self._graph, point).segment)
            self._schedules[key] = _schedule(head, 0, count)
        self._schedules[key].eval(torch.cat([study.example] * count) if count > 1 else study.example)
        spec = study.graph.outputs[0]
        answer = torch.empty((count * spec.shape[0], *spec.shape[1:]), dtype=spec.dtype)
        dist.recv(answer, 1)
        return answer

    def _relayed(self, port: int) -> int:
        """Put the emulated link before the server's port."""
        if not self.emulators:
            link = LinkEmulator(_free_port(), "127.0.0.1", port, PRESETS["wifi"])
            self.emulators.append(self._stack.enter_context(link))
        return self.emulators[0].port


def _free_port() -> int:
    """Return a free port below those that the kernel gives out, whose lower byte is zero."""
    for port in range(0x2000, 0x8000, 0x100):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of the ports from 8192 to 32512 whose lower byte is zero is free")
