"""A small classifier, servers of it in this process and in one of their own, and its true answers."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from paths import environment
from torch import nn

from torchsurgeon.serve import ModelRegistry, Server, create_app

EXAMPLE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.norm(self.stem(x))).mean((2, 3)))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval()


@contextmanager
def serving(model: nn.Module, port: int = 0) -> Iterator[Server]:
    registry = ModelRegistry()
    registry.add("net", model, (EXAMPLE,))
    with Server(create_app(registry), port=port) as running:
        yield running
    registry.close()


def truth(x: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
    with torch.no_grad():
        return (net() if model is None else model)(x)


def read_message(link: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of one HTTP message, without the empty line between them; None when the connection ends."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = link.recv(1 << 16)
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    while len(body) < int(found[1] if found else 0):
        piece = link.recv(1 << 16)
        if not piece:
            return None
        body += piece
    return head, body


@contextmanager
def process(*arguments: str, seed: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``torchsurgeon serve`` and the port it is ready on."""
    child = subprocess.Popen(
        [sys.executable, "-m", "torchsurgeon", "serve", *arguments, "--threads", "1", "--seed", str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    try:
        port = next(int(found[1]) for line in child.stdout if (found := re.search(r"^ready.*127\.0\.0\.1:(\d+)", line)))
        yield child, port
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
