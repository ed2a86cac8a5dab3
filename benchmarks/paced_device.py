"""A device on which every part of a model takes a set time, whatever else this machine does meanwhile.

:class:`~torchsurgeon.emulate.SlowDevice` multiplies what a call took, and with it every disturbance of a shared
machine. Here a part's time is a factor times the least of a few runs when it is first called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import torchsurgeon as ts

RUNS = 5
SPIN_S = 3e-4


class PacedDevice:
    """A device on which the whole ``model`` takes ``total_s``; ``wrap`` is a backend for SplitModule."""

    def __init__(self, model: nn.Module, x: torch.Tensor, total_s: float) -> None:
        self.factor = total_s / least_s(model, (x,), {})

    def wrap(self, module: nn.Module) -> Callable[..., Any]:
        takes_s: float | None = None

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal takes_s
            if takes_s is None:
                takes_s = self.factor * least_s(module, args, kwargs)
            end_s = time.perf_counter() + takes_s
            result = module(*args, **kwargs)
            time.sleep(max(0.0, end_s - SPIN_S - time.perf_counter()))
            while time.perf_counter() < end_s:
                pass
            return result

        return call


def warm(split: ts.SplitModule, x: torch.Tensor, rows: Iterable[ts.Row]) -> None:
    """Connect, shake hands, and have both sides cut and time whatever of ``rows`` may be chosen later."""
    for row in rows:
        split.partition = row.point(split.graph)
        split(x)
    split.partition = "auto"
    split(x)


def least_s(module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The least seconds that a call took in a few runs."""
    taken = []
    with torch.no_grad():
        for _ in range(RUNS):
            begin = time.perf_counter()
            module(*args, **kwargs)
            taken.append(time.perf_counter() - begin)
    return min(taken)
