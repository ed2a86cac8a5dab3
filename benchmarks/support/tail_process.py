"""A tail server in a process of its own, which can be killed, stopped, and started again on the same port in a moment.

Processes are forked from one that has imported PyTorch already (``multiprocessing``'s fork server), so a restart takes
tens of milliseconds and not seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import InProcessTransport, Transport

START_S = 60.0
Factory = Callable[[int], tuple[nn.Module, torch.Tensor]]

_processes = multiprocessing.get_context("forkserver")
# What a first trace imports takes a second, which a server that is started again must not take each time.
_processes.set_forkserver_preload(["benchmarks.support.tail_process", "torch._dynamo", "torchsurgeon.emulate"])


class TailProcess:
    """Serves ``model``, which ``factory`` makes from a seed, at ``port`` while it runs; on the ``core`` given."""

    def __init__(self, factory: Factory, core: int | None = None) -> None:
        self._factory, self._core = factory, core
        # Bound, though not listening, so that no other process is given the port while the server is down.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port: int = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: Any = None

    def start(self, seed: int = 0) -> None:
        """Return once requests are answered."""
        ours, theirs = _processes.Pipe(duplex=False)
        self._process = _processes.Process(
            target=_serve, args=(self._factory, seed, self.port, self._core, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        if not ours.poll(START_S):
            raise RuntimeError(f"the server did not start within {START_S:g} s")
        ours.recv()
        ours.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def pause(self) -> None:
        """Return once all of it has stopped: the thread that takes the signal may not be the one that serves."""
        os.kill(self.pid, signal.SIGSTOP)
        while any("T (stopped)" not in task.read_text() for task in Path(f"/proc/{self.pid}/task").glob("*/status")):
            time.sleep(1e-3)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> TailProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._reserved.close()


def _serve(factory: Factory, seed: int, port: int, core: int | None, ready: Any) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    model, example = factory(seed)
    registry = ModelRegistry()
    registry.add("model", model, (example,))
    with Server(create_app(registry), port=port):
        ready.send(port)
        signal.pause()


@contextmanager
def in_process(factory: Factory) -> Iterator[Transport]:
    """The same server in this process, without HTTP."""
    model, example = factory(0)
    registry = ModelRegistry()
    registry.add("model", model, (example,))
    try:
        with InProcessTransport(create_app(registry)) as transport:
            yield transport
    finally:
        registry.close()


@contextmanager
def apart(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run ``function(*arguments, told)`` in a process; yields the end of a pipe to tell it things."""
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=function, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


@contextmanager
def beside(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run ``function(*arguments, core, told)`` apart, each process on a core of its own where there are two; yields
    what it tells first."""
    everywhere = os.sched_getaffinity(0)
    own, other = two_cores()
    with apart(function, *arguments, other) as told:
        if own is not None:
            os.sched_setaffinity(0, {own})
        try:
            yield told.recv()
        finally:
            os.sched_setaffinity(0, everywhere)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model with the same random weights for the same seed, in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def two_cores() -> tuple[int | None, int | None]:
    """A core for the device and one for the server, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, mean and 95th percentile of seconds."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    ordered = sorted(values)
    return {
        "mean_s": round(statistics.mean(values), 6),
        "median_s": round(median, 6),
        "q1_s": round(low, 6),
        "q3_s": round(high, 6),
        "p95_s": round(ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)], 6),
    }
