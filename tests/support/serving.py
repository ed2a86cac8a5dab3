"""Servers of any model on this machine, and the same model split against one.

``serving``      a model behind a server in this process
``process``      a server in a process of its own, which can be stopped and killed
``split``        a model split against a server that holds it too
``check_split``  compares a split model's answers with the model's own, bit for bit; ``points_in`` and ``spread`` choose
                 where to cut for it
``signed_by_itself``  a certificate for this machine
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from partitions import assert_same, copied
from paths import environment
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app, run

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["serving", "torch._dynamo"])

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


@contextmanager
def serving(
    model: nn.Module,
    example: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "net",
    port: int = 0,
    **options: Any,
) -> Iterator[Server]:
    """A server of one model in this process; ``options`` are its registry's."""
    registry = ModelRegistry(**options)
    try:
        registry.add(name, model, example, kwargs)
        with Server(create_app(registry), port=port) as server:
            yield server
    finally:
        registry.close()


@contextmanager
def process(name: str, spec: str, port: int, *, seed: int = 0) -> Iterator[BaseProcess]:
    """A process that serves as ``torchsurgeon serve NAME=SPEC --port PORT --seed SEED --exact`` does, once it is ready.

    It is forked from a process that has imported PyTorch, which takes most of the time that starting a server does.
    """
    os.environ["PYTHONPATH"], before = environment()["PYTHONPATH"], os.environ.get("PYTHONPATH")
    ours, theirs = _processes.Pipe(duplex=False)
    child = _processes.Process(target=_serve, args=(name, spec, port, seed, theirs), daemon=True)
    try:
        child.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    theirs.close()
    try:
        while not str(ours.recv()).startswith("ready"):
            pass
        yield child
    finally:
        ours.close()
        child.kill()
        child.join()


def signed_by_itself(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in a folder."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl: apt-get install openssl")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem")]
    subprocess.run([*command, "-out", str(folder / "cert.pem")], check=True, capture_output=True)
    return folder


def _serve(name: str, spec: str, port: int, seed: int, said: Connection) -> None:
    torch.set_num_threads(1)
    run({name: spec}, port=port, seed=seed, batching="exact", say=said.send)


@contextmanager
def split(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[ts.SplitModule]:
    """``model`` split against a server that holds it too, over loopback; it starts with everything on the server."""
    with (
        serving(model, args, kwargs) as server,
        ts.SplitModule(model, args or kwargs, server=server.url, name="net", partition=0) as module,
    ):
        yield module


def points_in(graph: ts.LayerGraph, *parts: str) -> list[ts.PartitionPoint]:
    """Both ends, and the last point inside each of the named parts of the model."""
    found = [graph.points[0], graph.points[-1]]
    for part in parts:
        inside = [p for p in graph.points if p.name == part or p.name.startswith(f"{part}.")]
        assert inside, f"no point in {part!r}; there are {[p.name for p in graph.points]}"
        found.append(inside[-1])
    return found


def spread(graph: ts.LayerGraph, count: int = 5) -> list[ts.PartitionPoint]:
    """Both ends and points evenly between."""
    last = len(graph.points) - 1
    return [graph.points[round(i * last / (count - 1))] for i in range(count)]


def check_split(module: ts.SplitModule, points: Sequence[ts.PartitionPoint], *calls: Arguments) -> None:
    """At each of ``points`` and for each call, the split model's answer is the model's own, bit for bit.

    It is the server's, too: an answer that the device gave in its place would show nothing. Only that of a server which
    is late may be the device's, since a test does not judge how busy the machine is.
    """
    with torch.no_grad():
        for args, kwargs in calls:
            expected = module.model(*copied(list(args)), **copied(dict(kwargs)))
            for point in points:
                module.partition = point.index
                where = f"point {point.index} ({point.name})"
                assert_same(module(*args, **kwargs), expected, where, strides=False)
                assert module.last is not None
                why = module.last.degraded
                assert why is None or why.startswith("late: "), f"{where}: {why}"
