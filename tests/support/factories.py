"""Models that tests name by a SPEC such as ``factories:tiny``."""

from __future__ import annotations

import time

import torch
from torch import fx, nn


def tiny() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.rand(1, 3, 8, 8)


def nested() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests, of a model with parts that can be kept whole."""
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(block, nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)), torch.rand(1, 4)


class Parallel(nn.Module):
    """Two branches of pictures, of which the second shrinks its input more."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.thin = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 2, 3, stride=2)
        self.last = nn.Linear(8 * 36 + 2 * 9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.wide(x).flatten(1), self.thin(x).flatten(1)], 1))


def parallel() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests, of a model that can be cut across parallel branches."""
    return Parallel().eval(), torch.rand(1, 3, 8, 8)


def nap(x: torch.Tensor) -> torch.Tensor:
    """Negative inputs make a server that is slow on request."""
    if float(x.min()) < 0:
        time.sleep(1.0)
    return x * 1


fx.wrap("nap")


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nap(x) + self.first(x))


def slow() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests."""
    return Slow(), torch.ones(1, 4)


class Long(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 1 << 20)


def long() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests, of a model whose answers are longer than what a system keeps of them: 16 MiB.

    They have to be asked for as bytes, since so many numbers would take seconds to write as text.
    """
    return Long().eval(), torch.ones(1, 4)


def small() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests."""
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4)


def wide() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests, of a model whose last bits depend on the number of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.rand(1, 64)


def thick() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests, of a model whose first layers can be thinned."""
    torch.manual_seed(0)
    head = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, stride=2), nn.ReLU()
    rest = nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)
    return nn.Sequential(*head, *rest).eval(), torch.rand(1, 3, 16, 16)


def scores() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7))
    return layers, torch.zeros(1, 3, 8, 8)
